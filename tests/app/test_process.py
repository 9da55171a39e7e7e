"""The service as a real process: what it imports, how it starts, and clients that go away."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest

from chains import artifact
from chains.testing import pico_chain

ROOT = Path(__file__).parents[2]
ROOMY = {"limits": {"max_macs": 10**12}}
SERVE_IN_PROCESS = """
import sys
from fastapi.testclient import TestClient
from app.db.migrate import migrate
from app.main import create_app
from chains import artifact
from chains.testing import pico_chain

app = create_app()
migrate(app.state.services.database)
app.state.services.registry.prepare_storage()
app.state.services.registry.publish(open(sys.argv[1], "rb").read())
with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 50000)) as client:
    assert client.post("/models", json={"limits": {"max_macs": 10**9}}).status_code == 200
    assert client.get("/chains/stable/frontier").status_code == 200
heavy = {"torch", "boto3", "onnxruntime", "scipy"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WIDTHWISE_") and name != "PORT"}
    return kept | {"WIDTHWISE_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def widthwise(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(environment, "-m", "app.cli", *arguments)


def test_importing_the_app_loads_no_torch(environment: dict[str, str]) -> None:
    done = python(environment, "-c", "import app.main, sys; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_importing_the_app_reads_no_settings_and_touches_no_disk(environment: dict[str, str], tmp_path: Path) -> None:
    done = python(environment | {"WIDTHWISE_PORT": "no number"}, "-c", "import app.main, app.cli")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "data").exists()


def test_serving_a_request_loads_nothing_heavy(environment: dict[str, str], chain_file: bytes, tmp_path: Path) -> None:
    (tmp_path / "chain").write_bytes(chain_file)
    without_torch = environment | {"PYTHONPATH": str(ROOT)}
    done = python(
        without_torch,
        "-c",
        SERVE_IN_PROCESS.replace("from chains.testing import pico_chain\n", ""),
        str(tmp_path / "chain"),
    )
    assert done.returncode == 0, done.stderr


@contextmanager
def serving(environment: dict[str, str], log: Path) -> Iterator[tuple[str, int]]:
    """`widthwise serve` on a port of the system's choice, from when it says that it answers; (host, port)."""
    with log.open("w") as sink:
        command = [sys.executable, "-u", "-m", "app.cli", "serve", "--port", "0"]
        server = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=sink, text=True)
        with server:
            assert server.stdout is not None
            try:
                first_line = server.stdout.readline()
                assert first_line.startswith("Widthwise answers on http://127.0.0.1:"), log.read_text()
                yield "127.0.0.1", int(first_line.split()[3].rsplit(":", 1)[1])
            finally:
                server.send_signal(signal.SIGTERM)
                said = server.stdout.read()
                assert server.wait(30) in (0, -signal.SIGTERM), log.read_text()
                assert "curl --fail-with-body --json" in said


def publish(environment: dict[str, str], content: bytes) -> None:
    from app.db.migrate import migrate
    from app.main import wire
    from app.settings import Settings

    services = wire(Settings(data_dir=Path(environment["WIDTHWISE_DATA_DIR"])))
    migrate(services.database)
    services.registry.prepare_storage()
    services.registry.publish(content)
    services.database.dispose()


def ask(address: tuple[str, int], method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    headers = {"content-type": "application/json"} if body is not None else {}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def by_curl(curl: str, address: tuple[str, int], file: Path) -> bytes:
    """The line that the service prints, as people type it."""
    url = f"http://{address[0]}:{address[1]}/models"
    command = [curl, "--silent", "--fail-with-body", "--json", json.dumps(ROOMY), url, "-o", str(file)]
    subprocess.run(command, check=True, timeout=60)
    return file.read_bytes()


def test_serve_migrates_answers_and_stops(environment: dict[str, str], tmp_path: Path, chain_file: bytes) -> None:
    publish(environment, chain_file)
    log = tmp_path / "log"
    with serving(environment, log) as address:
        assert ask(address, "GET", "/health/ready")[0] == 200
        status, content = ask(address, "POST", "/models", ROOMY)
        assert status == 200
        assert len(content) > 500_000
    requests = [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "request"]
    assert ("/models", 200) in {(line["path"], line["status"]) for line in requests}


def test_the_printed_curl_line_gives_the_model(
    environment: dict[str, str], tmp_path: Path, chain_file: bytes, curl: str
) -> None:
    publish(environment, chain_file)
    with serving(environment, tmp_path / "log") as address:
        _, content = ask(address, "POST", "/models", ROOMY)
        assert by_curl(curl, address, tmp_path / "model.onnx") == content


def go_away_after(address: tuple[str, int], received: int) -> None:
    """Ask for the file, read some of it, and reset the connection."""
    payload = json.dumps(ROOMY).encode()
    head = (
        "POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection(address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(head.encode() + payload)
        while received > 0:
            received -= len(client.recv(min(received, 4096)))


def test_clients_that_go_away_break_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    publish(
        environment, artifact.dump(pico_chain(stem=48, narrowest=16, rungs=2))
    )  # 25 MB: more than any socket buffers
    log = tmp_path / "log"
    with serving(environment, log) as address:
        manifest = json.loads(ask(address, "GET", "/chains/stable/frontier")[1])
        for received in (0, 1, 5000, 300_000, 1_000_000):
            go_away_after(address, received)
        status, content = ask(address, "POST", "/models", ROOMY)
        assert (status, len(content)) == (200, manifest["widths"][-1]["costs"]["artifact_bytes"])
        time.sleep(0.2)
    assert "Traceback" not in log.read_text()
    assert "unexpected" not in log.read_text()


def test_a_client_that_stalls_does_not_keep_the_service_from_stopping(
    environment: dict[str, str], tmp_path: Path
) -> None:
    publish(environment, artifact.dump(pico_chain(stem=48, narrowest=16, rungs=2)))
    log, payload = tmp_path / "log", json.dumps(ROOMY)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with serving(environment, log) as address:
            client.connect(address)
            head = f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n{payload}"
            client.sendall(f"POST /models HTTP/1.1\r\nHost: localhost\r\n{head}".encode())
            assert client.recv(12) == b"HTTP/1.1 200"
            patience = Timer(20, client.close)
            patience.start()
        assert patience.is_alive(), "the service waited for the client"
        patience.cancel()
    assert "Traceback" not in log.read_text()


def test_binding_to_the_network_without_keys_is_refused_at_start(environment: dict[str, str], tmp_path: Path) -> None:
    done = widthwise(environment | {"WIDTHWISE_AUTH": "open"}, "serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1
    assert "WIDTHWISE_ALLOW_OPEN_BIND" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_the_network_is_not_answered_before_there_is_an_admin_key(environment: dict[str, str]) -> None:
    done = widthwise(environment, "serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1
    assert "widthwise keys create NAME --scope admin" in done.stderr
    assert "WIDTHWISE_ADMIN_KEY" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_made_by_the_command_line_is_alone_on_standard_output_and_opens_the_server(
    environment: dict[str, str], tmp_path: Path, chain_file: bytes
) -> None:
    made = widthwise(environment, "keys", "create", "camera")
    assert made.returncode == 0, made.stderr
    assert re.fullmatch(r"ww_[0-9a-f]{12}_[0-9a-f]{64}\n", made.stdout)
    assert made.stdout.strip() not in made.stderr
    publish(environment, chain_file)
    guarded = environment | {"WIDTHWISE_AUTH": "keys", "WIDTHWISE_ADMIN_KEY": "k" * 32}
    log = tmp_path / "log"
    with serving(guarded, log) as address:
        statuses = []
        for key in (None, made.stdout.strip(), "k" * 32):
            connection = http.client.HTTPConnection(*address, timeout=60)
            connection.request("GET", "/chains", headers={"authorization": f"Bearer {key}"} if key else {})
            statuses.append(connection.getresponse().status)
            connection.close()
        assert statuses == [401, 200, 200]
    assert made.stdout.strip() not in log.read_text()
    assert "k" * 32 not in log.read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"WIDTHWISE_STORAGE_URL": "ftp://x"}, "storage URL"),
        ({"WIDTHWISE_DATABASE_URL": "nonsense"}, "WIDTHWISE_DATABASE_URL"),
        ({"WIDTHWISE_DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:9/x"}, "database"),
        ({"WIDTHWISE_DATA_DIR": "/dev/null/data"}, "database"),
        ({"WIDTHWISE_PORT": "none"}, "integer"),
    ],
)
def test_a_wrong_setting_ends_with_one_clear_line(
    environment: dict[str, str], settings: dict[str, str], words: str
) -> None:
    done = widthwise(environment | settings, "migrate")
    assert done.returncode == 1
    assert done.stderr.startswith("widthwise: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr


def test_a_damaged_database_ends_with_one_clear_line(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "widthwise.db").write_bytes(b"no database" * 1000)
    done = widthwise(environment, "serve", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "widthwise: the database cannot be migrated: file is not a database"
    assert "Traceback" not in done.stderr


def test_migrate_prepares_and_can_be_repeated(environment: dict[str, str], tmp_path: Path) -> None:
    for _ in range(2):
        done = widthwise(environment, "migrate")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "widthwise.db").exists()
    assert (tmp_path / "data" / "objects").is_dir()


def test_a_chain_file_is_published_by_hand(environment: dict[str, str], tmp_path: Path, chain_file: bytes) -> None:
    (tmp_path / "chain").write_bytes(chain_file)
    (tmp_path / "broken").write_bytes(chain_file[:-1])
    assert widthwise(environment, "migrate").returncode == 0
    for _ in range(2):
        done = widthwise(environment, "publish", str(tmp_path / "chain"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("published pico (")
    done = widthwise(environment, "publish", str(tmp_path / "broken"))
    assert done.returncode == 1
    assert done.stderr.startswith("widthwise: ")


def test_demo_without_a_service_says_so(environment: dict[str, str]) -> None:
    done = widthwise(environment, "demo", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("widthwise: no service answers at http://127.0.0.1:9")
    assert "widthwise serve" in done.stderr
