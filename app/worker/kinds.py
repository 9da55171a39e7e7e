"""What workers can do: the kinds of jobs and their steps, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.worker import compression, datasets, finetuning, fusion, measuring, refinement, teachers
from app.worker.context import StepContext
from app.worker.training import cancelled

Step = Callable[[StepContext], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A kind of job.

    steps: name and function, each a durable step. What it returns (JSON values) is kept, and no later failure makes it
    run again; but a worker that dies in a step makes that step run twice, so it must do no harm twice.
    failed: called after the job failed or was cancelled, with the reason; may be called twice too.
    needs_training: the steps start programs that need torch.
    """

    name: str
    steps: tuple[tuple[str, Step], ...]
    failed: Callable[[StepContext, str], None] | None = None
    needs_training: bool = False


def _by_name(*kinds: Kind) -> dict[str, Kind]:
    return {kind.name: kind for kind in kinds}


KINDS: dict[str, Kind] = _by_name(
    Kind("check-dataset", datasets.STEPS, datasets.failed),
    Kind("check-teacher", teachers.STEPS, teachers.failed, needs_training=True),
    Kind("refine", refinement.STEPS, cancelled, needs_training=True),
    Kind("calibrate", measuring.CALIBRATE, cancelled, needs_training=True),
    Kind("evaluate", measuring.EVALUATE, cancelled, needs_training=True),
    Kind("finetune", finetuning.STEPS, cancelled, needs_training=True),
    Kind("compress", compression.STEPS, cancelled, needs_training=True),
    Kind("fuse", fusion.STEPS, cancelled, needs_training=True),
)
