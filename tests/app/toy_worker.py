"""A worker that knows toy jobs: run as a program, so that tests can kill it. What happened stands in the ledger, a file
that the request names; a line per event: WHAT STEP PID."""

from __future__ import annotations

import logging
import os
import signal
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

from app import logs
from app.errors import JobPermanentlyFailed, StorageUnavailable
from app.main import make_worker, wire
from app.settings import Settings
from app.worker.context import StepContext
from app.worker.kinds import KINDS, Kind

# A launcher whose only child has a session of its own, as torchrun's have; both say who they are.
LAUNCHER = textwrap.dedent("""
    import os, subprocess, sys, time
    print(f"launcher {os.getpid()}", flush=True)
    with open("secrets", "w") as seen:
        seen.write("\\n".join(os.environ))
    code = "import os, time; print(f'trainer {os.getpid()}', flush=True)\\nwhile True: time.sleep(0.1)"
    subprocess.run([sys.executable, "-c", code], start_new_session=True)
""")


def note(context: StepContext, what: str, step: str) -> None:
    with Path(context.request["ledger"]).open("a") as ledger:
        ledger.write(f"{what} {step} {os.getpid()}\n")


def work(context: StepContext, step: str) -> dict[str, Any]:
    """Takes `step_s` seconds, and passes on what the steps before it said."""
    note(context, "begin", step)
    (context.folder / step).touch()
    deadline = time.monotonic() + context.request.get("step_s", 0.6)
    while time.monotonic() < deadline:
        context.check_cancelled()
        context.report(left=deadline - time.monotonic())
        time.sleep(0.02)
    note(context, "end", step)
    return {"done": [*context.outputs, step]}


def hang(context: StepContext, step: str) -> dict[str, Any]:
    """Asks nobody anything for a while; then says something."""
    note(context, "begin", step)
    time.sleep(context.request["step_s"])
    context.log("still here")
    context.flush()
    note(context, "end", step)
    return {"by": os.getpid()}


def flaky(context: StepContext, step: str) -> dict[str, Any]:
    """Fails as often as `failures` says, for good while the file `broken` exists."""
    note(context, "begin", step)
    if Path(context.request.get("broken", "/nowhere")).exists():
        raise JobPermanentlyFailed("it is broken; mend it")
    begun = Path(context.request["ledger"]).read_text().count(f"begin {step} ")
    if begun <= context.request.get("failures", 0):
        raise StorageUnavailable("s3.internal does not answer")
    return {"begun": begun}


def train(context: StepContext, step: str) -> dict[str, Any]:
    def on_line(line: str) -> None:
        who, pid = line.split()
        with Path(context.request["ledger"]).open("a") as ledger:
            ledger.write(f"{who} {step} {pid}\n")
        context.log(line)

    def tick() -> None:
        (context.folder / "checkpoint").write_text(str(time.time()))
        context.keep_file(context.folder / "checkpoint", "checkpoint")

    context.run_child([sys.executable, "-c", LAUNCHER], on_line=on_line, tick=tick, every_s=0.2)
    return {}


def failed(context: StepContext, reason: str) -> None:
    note(context, "failed", reason.split(maxsplit=1)[0])


KINDS.update(
    {
        kind.name: kind
        for kind in (
            Kind("toy", tuple((name, partial(work, step=name)) for name in ("one", "two", "three")), failed),
            Kind("toy-hang", (("hang", partial(hang, step="hang")),)),
            Kind(
                "toy-flaky", (("first", partial(work, step="first")), ("flaky", partial(flaky, step="flaky"))), failed
            ),
            Kind("toy-train", (("train", partial(train, step="train")),), failed),
            Kind("toy-torch", (("train", partial(work, step="train")),), failed, needs_training=True),
        )
    }
)


def main() -> None:
    settings = Settings()
    logs.configure("info")
    logging.getLogger("dbos").setLevel(logging.WARNING)
    if "--without-torch" in sys.argv:
        sys.modules["torch"] = None  # type: ignore[assignment]
    worker = make_worker(settings, wire(settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()


if __name__ == "__main__":
    main()
