"""The job `check-teacher`: reads uploaded weights where they can do no harm, and says what they are.

A refusal is an answer and not a failure: the job succeeds, the teacher is `refused` and says why. The file is read by
`python -m chains.importers.check` in a child without network, credentials or sight of other files (`sandbox`).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.db.tables import TeacherRow
from app.db.teachers import TeacherRows
from app.errors import ChildFailed, JobPermanentlyFailed, ObjectNotFound
from app.redaction import redact
from app.services.stored import require_stored
from app.services.teachers import CHECKING, READY, REFUSED
from app.storage.port import fetch_to
from app.worker.context import StepContext
from app.worker.sandbox import CompletedSandbox, run_sandboxed

TEACHER_FILE = "teacher.safetensors"  # among the job's files: the network in this project's own format
REPORT = "report.json"
MAX_REPORT_BYTES = 1024**2
_FACTS = ("format", "architecture", "width", "input")  # columns of their own


def check(context: StepContext) -> dict[str, Any]:
    """Fetch the weights, check them in the sandbox, keep the teacher in our own format. Returns the report.

    Raises `SandboxUnavailable`, `StorageError`, and `ChildFailed` when the check was ended from outside."""
    teacher = _teacher(context)
    if teacher is None:
        return {"state": "gone"}
    folder = context.folder / "check"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (REPORT, TEACHER_FILE):
        (folder / stale).unlink(missing_ok=True)
    weights = folder / "weights"
    fetch_to(context.store, teacher.sha256, weights)
    context.report(stage="checking", bytes=teacher.size_bytes)
    completed = run_sandboxed(
        _command(teacher),
        folder=folder,
        memory_bytes=context.settings.teacher_check_memory_bytes,
        seconds=context.settings.teacher_check_timeout_s,
        on_line=context.log,
        tick=context.check_cancelled,
    )
    weights.unlink(missing_ok=True)
    report = _report(completed, folder / REPORT, context.settings.teacher_check_timeout_s)
    if (folder / TEACHER_FILE).exists() and report["state"] == READY:
        report["teacher_sha256"] = context.keep_file(folder / TEACHER_FILE, TEACHER_FILE)
    return report


def record(context: StepContext) -> dict[str, Any]:
    """Put the report into the teacher's row; a teacher that was deleted meanwhile stays deleted.

    Raises `JobPermanentlyFailed` when what the check kept is gone: the job was sent round again long after it."""
    report: dict[str, Any] = context.outputs["check"]
    if report["state"] == "gone" or (teacher := _teacher(context)) is None:
        return {"teacher": context.request["teacher"], "state": "gone"}
    declared = (teacher.report or {}).get("declared", {})
    kept = {name: value for name, value in report.items() if name not in ("state", "reason", *_FACTS)}
    try:
        _move(
            context,
            [CHECKING, REFUSED],  # refused: the check failed before, and the job was sent round again
            report["state"],
            kept.get("teacher_sha256"),
            reason=report.get("reason"),
            report={"declared": declared, **kept, "job": context.job_id},
            **{name: report.get(name) for name in _FACTS},
        )
    except ObjectNotFound as error:
        why = "the checked weights are not kept any more; delete the teacher and register it again"
        raise JobPermanentlyFailed(why) from error
    result = {"teacher": teacher.name, "state": report["state"]}
    return result | ({"reason": report["reason"]} if "reason" in report else {})


def failed(context: StepContext, reason: str) -> None:
    """The check itself could not be done, or was cancelled: the teacher cannot be used."""
    _move(context, [CHECKING], REFUSED, reason=f"the weights could not be checked: {reason}"[:2000])


STEPS = (("check", check), ("record", record))


def _teacher(context: StepContext) -> TeacherRow | None:
    """The teacher of the request, if it still is the one whose weights the request names."""
    with context.database.transaction() as session:
        found = TeacherRows(session).find(context.request["teacher"])
    return found if found is not None and found.sha256 == context.request["sha256"] else None


def _move(context: StepContext, sources: Sequence[str], state: str, names: str | None = None, **values: Any) -> None:
    """names: an object that the row names then. Raises `ObjectNotFound` when there is no such object."""
    with context.database.transaction() as session:
        name, sha256 = context.request["teacher"], context.request["sha256"]
        TeacherRows(session).move(name, sha256, sources, state, datetime.now(UTC), **values)
        if names is not None:
            require_stored(session, context.store, names)


def _command(teacher: TeacherRow) -> list[str]:
    declared = {**(teacher.report or {}).get("declared", {}), "license": teacher.license}
    paths = ["--file", "weights", "--out", REPORT, "--teacher", TEACHER_FILE]
    return [sys.executable, "-m", "chains.importers.check", *paths, "--declared", json.dumps(declared)]


def _report(completed: CompletedSandbox, path: Path, seconds: float) -> dict[str, Any]:
    """What the child answered. That it did not, is the file's doing: nothing else of it depends on the file.

    Raises `ChildFailed` when somebody else killed it, such as a kernel short of memory: another worker may succeed."""
    if completed.stopped == "time":
        return _refusal(f"the check took longer than {seconds:g} s (WIDTHWISE_TEACHER_CHECK_TIMEOUT_S)")
    if completed.stopped == "disk":
        return _refusal("the check wrote more to the disk than any network needs")
    if completed.returncode == -signal.SIGKILL:
        raise ChildFailed("the check", completed.returncode, completed.lines)
    if completed.returncode < 0:
        return _refusal(f"reading the file crashed the check ({signal.Signals(-completed.returncode).name})")
    if completed.returncode != 0 or not path.is_file() or path.stat().st_size > MAX_REPORT_BYTES:
        return _refusal(f"reading the file broke the check: {completed.lines[-1] if completed.lines else 'no words'}")
    report: dict[str, Any] = _printable(json.loads(path.read_bytes()))
    return report if report["state"] == READY else _refusal(str(report["reason"]))


def _refusal(reason: str) -> dict[str, Any]:
    return {"state": REFUSED, "reason": redact(_printable(reason))[:2000]}


def _printable(value: Any) -> Any:
    """The same JSON value without what a database or an answer cannot hold: names in a file may be anything."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\x00", "")
    if isinstance(value, dict):
        return {_printable(name): _printable(entry) for name, entry in value.items()}
    return [_printable(entry) for entry in value] if isinstance(value, list) else value
