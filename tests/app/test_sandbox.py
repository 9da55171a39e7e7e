"""The sandbox: what reads untrusted files has no network, no credentials, no other files, and only its share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import JobCancelled, SandboxUnavailable
from app.worker import confine, sandbox
from app.worker.sandbox import CompletedSandbox, run_sandboxed

GIB = 2**30
SECRET = "hunter2"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "WIDTHWISE_DATABASE_URL", "PGPASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


def python(code: str, folder: Path, *, memory: float = 1, seconds: float = 30, **more: object) -> CompletedSandbox:
    return run_sandboxed(
        [sys.executable, "-c", code],
        folder=folder,
        memory_bytes=int(memory * GIB),
        seconds=seconds,
        **more,  # type: ignore[arg-type]
    )


def lines(code: str, folder: Path) -> str:
    completed = python(code, folder)
    assert completed.returncode == 0, completed.lines
    return "\n".join(completed.lines)


def refusal(code: str, folder: Path) -> str:
    completed = python(code, folder)
    assert completed.returncode == 1, completed
    return completed.lines[-1]


def test_a_command_runs_and_its_lines_come_back(folder: Path) -> None:
    seen: list[str] = []
    completed = python("print('one'); print('two')", folder, on_line=seen.append)
    assert completed == CompletedSandbox(0, None, ("one", "two"))
    assert seen == ["one", "two"]


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_it_cannot_connect_to_a_port_that_listens(folder: Path, listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    code = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
    subprocess.run([sys.executable, "-c", code], check=True)  # without the sandbox it can
    assert "PermissionError" in refusal(code, folder)


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"])
def test_no_socket_of_any_family_can_be_opened(folder: Path, family: str) -> None:
    code = f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM)"
    assert "Operation not permitted" in refusal(code, folder)


def test_it_sees_no_credentials(folder: Path) -> None:
    environment = json.loads(lines("import json, os; print(json.dumps(dict(os.environ)))", folder))
    assert SECRET not in environment.values()
    assert environment.keys() <= {*sandbox.environment(folder), "LC_CTYPE"}


def test_it_cannot_read_the_environment_of_its_parent(folder: Path) -> None:
    assert "PermissionError" in refusal(f"open('/proc/{os.getpid()}/environ').read()", folder)


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess, sys; subprocess.run([sys.executable, '-V'])",
        "import os; os.fork()",
        "import os; os.setsid()",
        "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
    ],
)
def test_it_starts_and_ends_no_other_process(folder: Path, code: str) -> None:
    assert "PermissionError" in refusal(code, folder)


@pytest.mark.parametrize("name", ["ptrace", "io_uring_setup", "bpf", "mount", "unshare", "keyctl", "process_vm_readv"])
def test_rarely_used_corners_of_the_kernel_are_closed(folder: Path, name: str) -> None:
    known = confine.ARCHITECTURES[os.uname().machine]
    number = {**known.never, "io_uring_setup": 425}[name]
    code = (
        "import ctypes, errno; libc = ctypes.CDLL(None, use_errno=True);"
        f"assert libc.syscall({number}, 0, 0, 0, 0, 0) == -1; print(errno.errorcode[ctypes.get_errno()])"
    )
    assert lines(code, folder) == "EPERM"


def test_threads_still_work(folder: Path) -> None:
    code = "import threading; t = threading.Thread(target=print, args=('from a thread',)); t.start(); t.join()"
    assert lines(code, folder) == "from a thread"


def test_it_reads_and_writes_its_folder_and_no_other_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    assert lines("open('mine', 'w').write('x'); print(open('mine').read())", folder) == "x"
    assert "PermissionError" in refusal(f"open({str(tmp_path / 'secret')!r})", folder)
    assert "PermissionError" in refusal(f"open({str(tmp_path / 'new')!r}, 'w')", folder)
    assert not (tmp_path / "new").exists()


def test_it_imports_nothing_from_its_folder(folder: Path) -> None:
    (folder / "json.py").write_text("print('the file ran')")
    assert lines("import json; print(json.__name__)", folder) == "json"


def test_too_much_memory_ends_it(folder: Path) -> None:
    assert "MemoryError" in refusal("bytearray(2 * 2**30)", folder)


def test_too_much_time_ends_it(folder: Path) -> None:
    started = time.monotonic()
    completed = python("while True: pass", folder, seconds=1)
    assert (completed.returncode, completed.stopped) == (-9, "time")
    assert time.monotonic() - started < 10


def test_one_large_file_is_refused(folder: Path) -> None:
    completed = python("open('large', 'wb').write(bytes(2 * 2**20))", folder, disk_bytes=2**20)
    assert completed.returncode == 1
    assert "File too large" in completed.lines[-1]
    assert (folder / "large").stat().st_size <= 2**20


def test_many_files_that_fill_the_disk_end_it(folder: Path) -> None:
    code = (
        "import itertools, time\nfor i in itertools.count(): open(str(i), 'wb').write(bytes(2**19)); time.sleep(0.05)"
    )
    completed = python(code, folder, disk_bytes=2**20)
    assert (completed.returncode, completed.stopped) == (-9, "disk")


def test_endless_output_is_cut_and_not_kept(folder: Path) -> None:
    completed = python("print('x' * 10**7); [print(i) for i in range(1000)]", folder)
    assert len(completed.lines) == sandbox.KEPT_LINES
    assert completed.lines[-1] == "999"


def test_what_the_caller_raises_ends_it(folder: Path) -> None:
    def cancelled() -> None:
        raise JobCancelled("x")

    started = time.monotonic()
    with pytest.raises(JobCancelled):
        python("import time; time.sleep(60)", folder, tick=cancelled)
    assert time.monotonic() - started < 10


def test_it_dies_with_its_parent(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from app.worker.sandbox import run_sandboxed;"
        "run_sandboxed([sys.executable, '-c', 'import os, time; print(os.getpid()); time.sleep(60)'],"
        f"folder=Path({str(folder)!r}), memory_bytes=2**30, seconds=60, on_line=lambda line: print(line, flush=True))"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        threading.Event().wait(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_where_the_kernel_refuses_nothing_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_limits", lambda *_: {"NO_SUCH_LIMIT": 1})
    with pytest.raises(SandboxUnavailable, match=r"cannot confine.*RLIMIT_NO_SUCH_LIMIT"):
        python("open('ran', 'w')", folder)
    assert not (folder / "ran").exists()


def test_an_unknown_processor_has_no_filter_and_so_no_sandbox() -> None:
    with pytest.raises(confine.CannotConfine, match="no system-call filter for riscv64"):
        confine.filter_program("riscv64", 1)


def test_the_filter_of_the_other_processor_has_its_form() -> None:
    for machine in confine.ARCHITECTURES:
        program = confine.filter_program(machine, 1234)
        assert len(program) % 8 == 0
        assert program.endswith(confine.op(confine.RETURN, confine.ALLOW))


def test_a_program_that_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(SandboxUnavailable, match="No such file"):
        run_sandboxed(["/no/such/program"], folder=folder, memory_bytes=GIB, seconds=5)
