"""The log of a run: what is written is read, in both forms, and a resumed run says nothing twice."""

import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from chains.errors import DataError
from chains.runlog import METRICS, SCALARS, RunLog, read_events


def tensorboard(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar in the events file: records of length, two checksums and a protobuf."""
    data, found = (folder / SCALARS).read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, round(value.simple_value, 4)) for value in event.summary.value]
        data = data[16 + length :]
    return found


def a_log(folder: Path, steps: range = range(10, 60, 10)) -> None:
    with RunLog(folder) as log:
        for step in steps:
            log.write("teacher", step=step, losses={"loss": 100 / step}, lr=0.5)


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    a_log(tmp_path)
    events = read_events(tmp_path)
    assert [event["step"] for event in events] == [10, 20, 30, 40, 50]
    assert events[0]["losses"] == {"loss": 10.0}
    assert all(event["stage"] == "teacher" and event["time_s"] > 0 for event in events)


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    a_log(tmp_path, range(10, 30, 10))
    assert tensorboard(tmp_path) == [
        (10, "teacher/losses/loss", 10.0),
        (10, "teacher/lr", 0.5),
        (20, "teacher/losses/loss", 5.0),
        (20, "teacher/lr", 0.5),
    ]


def test_a_run_that_goes_on_from_a_checkpoint_logs_no_step_twice(tmp_path: Path) -> None:
    a_log(tmp_path)
    with RunLog(tmp_path) as log:
        log.rewind("teacher", 30)
        for step in (40, 50, 60):
            log.write("teacher", step=step, losses={"loss": 1.0}, lr=0.5)
    assert [event["step"] for event in read_events(tmp_path)] == [10, 20, 30, 40, 50, 60]
    assert [step for step, tag, _ in tensorboard(tmp_path) if tag == "teacher/lr"] == [10, 20, 30, 40, 50, 60]


def test_going_back_in_one_stage_leaves_the_others(tmp_path: Path) -> None:
    a_log(tmp_path)
    with RunLog(tmp_path) as log:
        log.write("refinement", step=10, losses={"full": 1.0})
        log.write("frontier", map={"4": 50.0})
        log.rewind("refinement", 0)
        log.rewind("frontier", 0)
    assert [event["stage"] for event in read_events(tmp_path)] == ["teacher"] * 5


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    a_log(tmp_path)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"stage": "teacher", "st')
    a_log(tmp_path, range(60, 70, 10))
    assert [event["step"] for event in read_events(tmp_path)] == [10, 20, 30, 40, 50, 60]


def test_a_line_that_was_cut_inside_a_character_is_dropped_too(tmp_path: Path) -> None:
    a_log(tmp_path)
    with (tmp_path / METRICS).open("ab") as file:
        file.write('{"stage": "prüfung'.encode()[:-5])  # ends in the first half of ü
    assert len(read_events(tmp_path)) == 5


def test_every_line_is_json_for_any_reader(tmp_path: Path) -> None:
    a_log(tmp_path)
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40, 50]


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log, pytest.raises(DataError, match="teacher/losses/loss is nan"):
        log.write("teacher", step=1, losses={"loss": float("nan")})
    assert read_events(tmp_path) == []


def test_a_folder_without_a_log_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        read_events(tmp_path)


@pytest.mark.parametrize("line", ["{no json}", "[1, 2]", '{"step": 3}'])
def test_a_broken_log_is_said_to_be_broken(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS).write_text(line + "\n")
    with pytest.raises(DataError, match="broken"):
        read_events(tmp_path)
