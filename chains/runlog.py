"""The log of a run: one JSON object per line in `metrics.jsonl`, and the same numbers as TensorBoard scalars.

An event has a `stage` ("teacher", "refinement", …), mostly a `step` (of how many `steps`), and numbers, alone (`lr`,
`eta_s`, `epoch`) or in a group (`losses`, `validation`). The JSON lines are the truth and TensorBoard's file is made
from them. A run that goes on from a checkpoint first takes back what was logged after it, so no step stands twice; a
line that a kill cut in half is dropped. The log names no path, host or user.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from chains.atomic import write_whole
from chains.errors import DataError

METRICS = "metrics.jsonl"
SCALARS = "tensorboard/events.out.tfevents.0.widthwise"  # TensorBoard looks for the part in the middle
TIME = "time_s"  # Unix time of an event


class RunLog(AbstractContextManager["RunLog"]):
    """The log in the run directory `folder`, which must exist; one writer at a time."""

    def __init__(self, folder: Path) -> None:
        self._metrics, self._scalars = folder / METRICS, folder / SCALARS
        self._scalars.parent.mkdir(exist_ok=True)
        self._writer = self._keep(read_events(folder) if self._metrics.exists() else [])

    def write(self, stage: str, **values: Any) -> None:
        """Add an event. Raises `DataError` for a number that is not finite: it is no JSON."""
        event = {"stage": stage, TIME: round(time.time(), 3), **values}
        for name, value in scalars(event):
            if not math.isfinite(value):
                raise DataError(f"{name} is {value}, which no log can hold")
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(_line(event))
        _draw(self._writer, event)

    def rewind(self, stage: str, step: int) -> None:
        """Take back the events of `stage` that lie after `step`, the number of steps its checkpoint holds; those
        without a step too."""
        kept = [event for event in self.events() if event["stage"] != stage or event.get("step", math.inf) <= step]
        self._writer.close()
        self._writer = self._keep(kept)

    def events(self) -> list[dict[str, Any]]:
        return read_events(self._metrics.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def _keep(self, events: list[dict[str, Any]]) -> RecordWriter:
        """Start both files anew with these events."""
        write_whole(self._metrics, "".join(_line(event) for event in events).encode())
        writer = RecordWriter(str(self._scalars))
        writer.write(Event(wall_time=0, file_version="brain.Event:2").SerializeToString())
        for event in events:
            _draw(writer, event)
        return writer


def _draw(writer: RecordWriter, event: Mapping[str, Any]) -> None:
    """Add the numbers of an event to TensorBoard's file."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(event)]
    if values:
        scalar = Event(wall_time=event[TIME], step=event.get("step", 0), summary=Summary(value=values))
        writer.write(scalar.SerializeToString())
    writer.flush()


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events in a run directory's log, oldest first. Raises `DataError` when there is none, or one is broken before
    the last line."""
    path = folder / METRICS
    if not path.exists():
        raise DataError(f"'{folder}' has no {METRICS}; it is no run directory")
    *whole, _half = path.read_bytes().split(b"\n")  # a whole line ends with a line break
    try:
        events = [json.loads(line) for line in whole]
    except ValueError as error:
        raise DataError(f"'{path}' is broken: {error}") from error
    if not all(isinstance(event, dict) and "stage" in event and TIME in event for event in events):
        raise DataError(f"'{path}' is broken: every line must be an object with 'stage' and '{TIME}'")
    return events


def scalars(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of an event under TensorBoard's names.

    >>> list(scalars({"stage": "teacher", "step": 10, "time_s": 1.5, "lr": 0.1, "losses": {"loss": 2.0}}))
    [('teacher/lr', 0.1), ('teacher/losses/loss', 2.0)]
    """
    for name, value in event.items():
        if name in {"stage", "step", "steps", TIME}:
            continue
        group = value if isinstance(value, dict) else {"": value}
        for inner, number in group.items():
            if isinstance(number, int | float):
                yield "/".join(part for part in (event["stage"], name, inner) if part), float(number)


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, allow_nan=False, ensure_ascii=False) + "\n"
