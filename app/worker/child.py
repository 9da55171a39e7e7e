"""Programs that steps start.

Each runs in a session of its own under a guard (`app/worker/guard.py`), which kills the program and everything it has
started when the worker dies, however it dies. Its environment is made of a few harmless names: no credential of the
worker is in it. Where the kernel has Landlock it can write below its folder and nowhere else, data sets least of all.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import structlog

from app.errors import ChildFailed
from app.worker.landlock import write_only_below

GUARD = Path(__file__).with_name("guard.py")
NO_RULESET = -1
LAST_LINES = 20
MAX_LINE_BYTES = 64 * 1024
LOOK_EVERY_S = 0.2
_PASSED_ON = frozenset({"PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV"})
_PASSED_ON_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "OMP_", "MKL_", "OPENBLAS_", "TORCH_")
_log = structlog.get_logger(__name__)


def environment(folder: Path) -> dict[str, str]:
    """What a child sees of ours: names that programs need to run, none that holds a secret. `folder` is its home."""
    kept = {
        name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    return kept | {"HOME": str(folder), "TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}


def run_child(
    command: Sequence[str],
    *,
    folder: Path,
    on_line: Callable[[str], None],
    look: Callable[[], None],
    tick: Callable[[], None],
    every_s: float,
    grace_s: float,
) -> None:
    """Run `command` in `folder` until it ends; lines of its output and its errors go to `on_line` in this thread.

    look: called a few times a second; what it raises ends the program. tick: called every `every_s` seconds and once
    after the end. A program that must end gets SIGTERM, after `grace_s` seconds it and all it started are killed.
    Raises `ChildFailed` for a status other than 0.
    """
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    with write_only_below([folder]) or nullcontext(NO_RULESET) as ruleset:
        process = subprocess.Popen(  # noqa: S603 - commands are made by steps, not by clients
            [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), str(ruleset), *command],
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=() if ruleset == NO_RULESET else (ruleset,),
        )
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        _follow(process, last, on_line, look, tick, every_s)
    except BaseException as error:
        _end(process, grace_s)
        _last_tick(tick, error)
        raise
    finally:
        _end(process, 0)
    tick()
    if process.returncode != 0:
        raise ChildFailed(Path(command[0]).name, process.returncode, list(last))


def _follow(
    process: subprocess.Popen[bytes],
    last: deque[str],
    on_line: Callable[[str], None],
    look: Callable[[], None],
    tick: Callable[[], None],
    every_s: float,
) -> None:
    lines: queue.Queue[str | None] = queue.Queue(maxsize=10_000)  # a program that writes faster than we read must wait
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    next_tick = time.monotonic() + every_s
    next_look = 0.0
    while True:
        if time.monotonic() >= next_look:  # also while the program writes without pause
            look()
            next_look = time.monotonic() + LOOK_EVERY_S
        if time.monotonic() >= next_tick:
            tick()
            next_tick = time.monotonic() + every_s
        try:
            line = lines.get(timeout=LOOK_EVERY_S)
        except queue.Empty:
            if process.poll() is not None and lines.empty():
                return  # it ended, and something it left behind holds its output open
            continue
        if line is None:
            break
        last.append(line)
        on_line(line)
    while process.poll() is None:
        look()
        time.sleep(LOOK_EVERY_S / 4)


def _read(process: subprocess.Popen[bytes], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None  # noqa: S101 - asked for above
    with process.stdout as source:
        while line := source.readline(MAX_LINE_BYTES):
            lines.put(line.decode(errors="replace").rstrip("\r\n"))
    lines.put(None)


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask it to end, wait `grace_s` seconds, then have the guard kill it and all that came of it."""
    if process.poll() is not None:
        return
    if grace_s:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        else:
            return
    process.send_signal(signal.SIGUSR1)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:  # a guard that hangs goes too; what it guarded is told by the kernel
        process.kill()
        process.wait()


def _last_tick(tick: Callable[[], None], ending: BaseException) -> None:
    """The checkpoint a program wrote when it was asked to end. That it cannot be kept must not hide why it ended."""
    try:
        tick()
    except BaseException as error:
        _log.warning("the last checkpoint was not kept", reason=repr(error), ending=repr(ending))
