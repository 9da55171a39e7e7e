"""Runs a command that reads untrusted files: capped, without network, without credentials, away from other files.

Works unprivileged and in containers, on Linux for x86_64 and aarch64. Where the kernel refuses a part of it nothing is
run at all and `SandboxUnavailable` says which part (`app.worker.confine` is what asks the kernel). The child cannot
start further processes, only threads, so ending it ends everything.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import app
import chains
from app.errors import SandboxUnavailable

_LAUNCHER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("confine.py")))
KEPT_LINES = 50
MAX_LINE_BYTES = 4000
MAX_OPEN_FILES = 256
POLL_S = 0.2
STANDARD_ERROR = 2
THREADS = 2  # of numerical libraries; each costs address space
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/opt", "/proc/cpuinfo", "/proc/meminfo", "/proc/self", "/sys")
_OF_ETC = ("/etc/ld.so.cache", "/etc/localtime", "/etc/ssl/openssl.cnf")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
Stopped = Literal["time", "disk"]


@dataclass(frozen=True)
class CompletedSandbox:
    """How a confined command ended. returncode: negative for a signal; stopped: the limit of ours that ended it, where
    one did (memory and processor time make the command fail by itself); lines: its last ones."""

    returncode: int
    stopped: Stopped | None
    lines: tuple[str, ...]


def run_sandboxed(
    command: Sequence[str],
    *,
    folder: Path,
    memory_bytes: int,
    seconds: float,
    readable: Sequence[Path] = (),
    disk_bytes: int = 16 * 1024**3,
    on_line: Callable[[str], None] | None = None,
    tick: Callable[[], None] | None = None,
) -> CompletedSandbox:
    """Run `command` (its first word a path) in `folder`, the only place it may write to, and wait for its end.

    memory_bytes: of address space; seconds: of wall clock; readable: what it may read besides; disk_bytes: of all that
    is in `folder`. on_line gets each line of output; tick is called about five times a second and may raise, which ends
    the command. Raises `SandboxUnavailable` where this machine cannot confine it."""
    with _started(command, folder, readable, memory_bytes, seconds, disk_bytes) as process:
        return _watched(process, folder, seconds, disk_bytes, on_line or _ignore, tick or _nothing)


def confinement(folder: Path, memory_bytes: int, seconds: float) -> tuple[list[str], dict[str, str]]:
    """For a program that a child of ours starts: the words in front of its own, and all of its environment. It may read
    `folder`, as what every program reads, and write nothing but its output. Where this machine cannot confine it, it
    says so on standard error and ends with status 126. The rest as for `run_sandboxed`."""
    plan = {
        "parent": None,
        "status": STANDARD_ERROR,
        "limits": _limits(memory_bytes, seconds, disk_bytes=0),
        "list": _importable(),
        "read": [*_readable(), str(folder)],
        "write": _DEVICES,
    }
    return [*_LAUNCHER, json.dumps(plan)], environment(folder)


@contextmanager
def _started(
    command: Sequence[str],
    folder: Path,
    readable: Sequence[Path],
    memory_bytes: int,
    seconds: float,
    disk_bytes: int,
) -> Iterator[subprocess.Popen[bytes]]:
    if sys.platform != "linux":
        raise SandboxUnavailable(
            f"untrusted files are only read on Linux, where they can be confined; not {sys.platform}"
        )
    read_end, write_end = os.pipe()
    plan = {
        "parent": os.getpid(),
        "status": write_end,
        "limits": _limits(memory_bytes, seconds, disk_bytes),
        "list": _importable(),
        "read": [*_readable(), *map(str, readable)],
        "write": [str(folder), *_DEVICES],
    }
    with os.fdopen(read_end, "rb") as status:
        try:
            process = subprocess.Popen(  # noqa: S603 - no shell, and the command is ours
                [*_LAUNCHER, json.dumps(plan), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment(folder),
                start_new_session=True,
                pass_fds=(write_end,),
            )
        except OSError as error:
            raise SandboxUnavailable(f"the confined process could not be started: {error}") from error
        finally:
            os.close(write_end)
        with process:
            try:
                if refusal := status.read():  # ends when the launcher has become the command
                    why = refusal.decode(errors="replace")
                    raise SandboxUnavailable(f"this machine cannot confine a process that reads untrusted files: {why}")
                yield process
            finally:
                _end(process)


def environment(folder: Path) -> dict[str, str]:
    """All the child sees: nothing of ours but where Python finds the modules."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(_importable()),
        "PYTHONSAFEPATH": "1",  # never import from the folder, where the untrusted file lies
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(THREADS),
        "OPENBLAS_NUM_THREADS": str(THREADS),
        "MALLOC_ARENA_MAX": "2",
    }


def _limits(memory_bytes: int, seconds: float, disk_bytes: int) -> dict[str, int]:
    return {
        "AS": memory_bytes,
        "CPU": math.ceil(seconds) * max(1, os.cpu_count() or 1),  # over all threads
        "FSIZE": disk_bytes,
        "NOFILE": MAX_OPEN_FILES,
        "CORE": 0,
    }


def _packages() -> list[Path]:
    return [Path(path) for package in (app, chains) for path in package.__path__]


def _importable() -> list[str]:
    """The folders that hold our packages."""
    return list(dict.fromkeys(str(package.parent) for package in _packages()))


def _readable() -> list[str]:
    """Python, its libraries, our packages, and what every program reads; no data, no configuration."""
    python = (sys.prefix, sys.base_prefix, *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")))
    return list(dict.fromkeys([*_SYSTEM, *_OF_ETC, *python, *map(str, _packages())]))


def _watched(
    process: subprocess.Popen[bytes],
    folder: Path,
    seconds: float,
    disk_bytes: int,
    on_line: Callable[[str], None],
    tick: Callable[[], None],
) -> CompletedSandbox:
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    deadline = time.monotonic() + seconds
    next_look = 0.0
    stopped: Stopped | None = None
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    for new in _lines(process.stdout):
        for line in new:
            lines.append(line)
            on_line(line)
        tick()
        if stopped is None and time.monotonic() >= next_look:
            began = time.monotonic()
            stopped = _exceeded(folder, disk_bytes, deadline)
            # a folder of a million files takes long to add up, and must not keep us from the output
            next_look = time.monotonic() + max(POLL_S, 10 * (time.monotonic() - began))
            if stopped is not None:
                process.send_signal(signal.SIGKILL)
    return CompletedSandbox(process.wait(), stopped, tuple(lines))


def _exceeded(folder: Path, disk_bytes: int, deadline: float) -> Stopped | None:
    if time.monotonic() > deadline:
        return "time"
    return "disk" if _bytes_below(folder) > disk_bytes else None


def _bytes_below(folder: Path) -> int:
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it may be gone again
                total += (Path(top) / name).lstat().st_size
    return total


def _lines(output: IO[bytes]) -> Iterator[list[str]]:
    """Lines as they come, until the output ends; an empty list whenever nothing came for a while. Long ones are cut."""
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if not selector.select(POLL_S):
                yield []
                continue
            chunk = os.read(output.fileno(), 64 * 1024)
            *whole, held = (held + chunk).split(b"\n")
            if not chunk or len(held) > MAX_LINE_BYTES:
                whole, held = [*whole, held], b""
            yield [line[:MAX_LINE_BYTES].decode(errors="replace") for line in whole if line.strip()]
            if not chunk:
                return


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()


def _ignore(_line: str) -> None:
    """For callers who read the last lines only."""


def _nothing() -> None:
    """For callers who never cancel."""
