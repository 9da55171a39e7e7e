"""The proxy's configuration in a real nginx, before a stand-in for the API: what passes, how, and what does not."""

import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "proxy" / "nginx.conf"


@pytest.fixture(scope="module")
def nginx() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        pytest.skip("not installed: nginx (Debian: nginx-light); the proxy's configuration is not tried")
    return found


class StandIn(BaseHTTPRequestHandler):
    """Answers with what it was sent, and remembers when the first bytes of a body came."""

    protocol_version = "HTTP/1.1"
    first_bytes = threading.Event()

    def do_GET(self) -> None:
        if self.path.endswith("/events"):
            self._events()
        else:
            self._answer({"path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}})

    def do_PUT(self) -> None:
        size, read = int(self.headers["content-length"]), 0
        while read < size:
            read += len(self.rfile.read1(size - read))
            self.first_bytes.set()
        self._answer({"read": read})

    def _answer(self, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _events(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: 1\n\n")
        self.wfile.flush()
        time.sleep(2)
        self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def proxy(nginx: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Its port. Only the two addresses and the folder for temporary files are others than in the container."""
    folder = tmp_path_factory.mktemp("proxy")
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        port = free_port()
        text = CONFIG.read_text()
        for mine, theirs in (
            ("listen 8080;", f"listen 127.0.0.1:{port};"),
            ("http://api:8000", f"http://127.0.0.1:{api.server_port}"),
            (" /tmp/", f" {folder}/"),
            ("/dev/stdout", f"{folder}/access.log"),
            ("/dev/stderr", f"{folder}/error.log"),
        ):
            assert mine in text
            text = text.replace(mine, theirs)
        config = folder / "nginx.conf"
        config.write_text(text)
        folder.chmod(0o777)  # nginx's workers are `nobody` when root starts it
        for parent in folder.parents[:2]:
            parent.chmod(parent.stat().st_mode | 0o011)
        with subprocess.Popen([nginx, "-c", config, "-p", folder, "-g", "daemon off;"]) as process:
            try:
                wait_for(port, process)
                yield port
            finally:
                process.terminate()
        api.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "nginx ended"
        time.sleep(0.1)
    pytest.fail("nginx does not answer")


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def test_the_configuration_is_one(nginx: str, tmp_path: Path) -> None:
    config = tmp_path / "nginx.conf"
    config.write_text(CONFIG.read_text().replace(" /tmp/", f" {tmp_path}/"))
    done = subprocess.run([nginx, "-t", "-c", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_pass_as_they_came_and_clients_cannot_lie_about_themselves(proxy: int) -> None:
    status, content = get(proxy, "/chains/a%2Fb?x=1", x_forwarded_for="203.0.113.9", x_request_id="mine-1")
    seen = json.loads(content)
    assert (status, seen["path"]) == (200, "/chains/a%2Fb?x=1")
    assert seen["headers"]["x-forwarded-for"] == "127.0.0.1"
    assert seen["headers"]["x-request-id"] == "mine-1"
    assert seen["headers"]["host"] == f"127.0.0.1:{proxy}"


def test_request_ids_that_are_no_plain_words_are_replaced(proxy: int) -> None:
    _, content = get(proxy, "/chains", x_request_id='"} injected')
    assert re.fullmatch(r"[0-9a-f]{32}", json.loads(content)["headers"]["x-request-id"])


def test_metrics_stay_inside(proxy: int) -> None:
    assert get(proxy, "/metrics")[0] == 404


def test_the_proxy_answers_for_itself(proxy: int) -> None:
    assert get(proxy, "/proxy-health") == (200, b"ok\n")


def test_an_upload_reaches_the_api_while_it_is_sent(proxy: int) -> None:
    StandIn.first_bytes.clear()
    size = 8 * 1024 * 1024
    with socket.create_connection(("127.0.0.1", proxy), timeout=20) as client:
        client.sendall(f"PUT /teachers/t/weights HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        client.sendall(b"\0" * (size // 2))
        assert StandIn.first_bytes.wait(5), "the proxy keeps the body to itself"
        client.sendall(b"\0" * (size // 2))
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert json.loads(answer.read()) == {"read": size}


def test_an_event_arrives_when_it_happens(proxy: int) -> None:
    started = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", proxy, timeout=20)
    connection.request("GET", "/jobs/0123/events")
    answer = connection.getresponse()
    assert answer.readline() == b"data: 1\n"
    assert time.monotonic() - started < 1.5, "the proxy holds events back"
    connection.close()


def test_the_configuration_is_the_one_that_compose_mounts() -> None:
    assert f"./{CONFIG.relative_to(ROOT)}:/etc/nginx/nginx.conf:ro" in (ROOT / "docker-compose.yml").read_text()
