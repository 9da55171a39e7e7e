"""Programs that steps start: what comes back, and that nothing of them stays."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import ChildFailed, JobCancelled
from app.worker.child import run_child

# Prints its process id, ignores being asked to end, and leaves a process of its own session behind.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(os.getpid(), left.pid, flush=True)
time.sleep(60)
"""


def nothing() -> None:
    pass


def run(
    folder: Path,
    *command: str,
    on_line: Callable[[str], None] = lambda _: None,
    look: Callable[[], None] = nothing,
    tick: Callable[[], None] = nothing,
    grace_s: float = 0.3,
) -> None:
    run_child(command, folder=folder, on_line=on_line, look=look, tick=tick, every_s=0.1, grace_s=grace_s)


def python(folder: Path, code: str, **how: Callable[..., None]) -> None:
    run(folder, sys.executable, "-c", code, **how)  # type: ignore[arg-type]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_line_comes_in_order_also_of_a_program_that_writes_a_lot(tmp_path: Path) -> None:
    lines: list[str] = []
    python(tmp_path, "for number in range(30_000): print(number)", on_line=lines.append)
    assert lines == [str(number) for number in range(30_000)]


def test_a_line_without_end_is_taken_in_pieces(tmp_path: Path) -> None:
    lines: list[str] = []
    python(tmp_path, "import sys; sys.stdout.write('x' * 1_000_000)", on_line=lines.append)
    assert "".join(lines) == "x" * 1_000_000
    assert len(lines) > 10


def test_a_failure_says_how_it_ended_and_what_it_wrote_last(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="ended with status 3") as failed:
        python(tmp_path, "import sys\nfor n in range(50): print('line', n)\nsys.exit(3)")
    assert failed.value.lines[-1] == "line 49"
    assert len(failed.value.lines) == 20
    assert not failed.value.is_transient


def test_a_program_that_something_killed_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="signal 9") as failed:
        python(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert failed.value.is_transient


def test_a_full_disk_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed) as failed:
        python(tmp_path, "raise OSError(28, 'No space left on device')")
    assert failed.value.is_transient


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="no-such-program cannot be started: No such file"):
        run(tmp_path, "no-such-program")


def test_ticks_come_while_it_runs_and_once_after_its_end(tmp_path: Path) -> None:
    ticks: list[bool] = []
    code = "import time, pathlib; time.sleep(0.8); pathlib.Path('done').touch()"
    python(tmp_path, code, tick=lambda: ticks.append((tmp_path / "done").exists()))
    assert len(ticks) > 2
    assert (ticks[0], ticks[-1]) == (False, True)


def test_what_will_not_end_is_killed_with_all_it_started(tmp_path: Path) -> None:
    seen: list[str] = []

    def look() -> None:
        if seen:
            raise JobCancelled("j")

    began = time.monotonic()
    with pytest.raises(JobCancelled):
        python(tmp_path, STUBBORN, on_line=seen.append, look=look)
    assert time.monotonic() - began < 15
    assert not [pid for pid in map(int, seen[0].split()) if is_running(pid)]


def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    seen: list[str] = []
    code = STUBBORN.replace("time.sleep(60)\n", "").replace("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n", "")
    python(tmp_path, code, on_line=seen.append)
    assert not [pid for pid in map(int, seen[0].split()) if is_running(pid)]


def test_a_program_asked_to_end_can_still_write_a_checkpoint_that_is_kept(tmp_path: Path) -> None:
    code = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path("checkpoint").write_text("last")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
    seen: list[str] = []
    kept: list[str] = []

    def look() -> None:
        if seen:
            raise JobCancelled("j")

    def tick() -> None:
        if (tmp_path / "checkpoint").exists():
            kept.append((tmp_path / "checkpoint").read_text())

    with pytest.raises(JobCancelled):
        run(tmp_path, sys.executable, "-c", code, on_line=seen.append, look=look, tick=tick, grace_s=10)
    assert kept == ["last"]
