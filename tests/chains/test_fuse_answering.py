"""Graphs that answer from a process of their own, and programs in their place that answer anything."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chains.errors import WeightsRefused
from chains.fuse import answering
from chains.fuse.answering import Confinement, confined, here
from chains.fuse.partials import open_partial
from chains.fuse.views import whole
from tests.chains.fusions import a_graph
from tests.chains.toys import INPUT

FREE = Confinement((), os.environ)
IMAGES = np.random.default_rng(0).standard_normal((5, 3, 24, 20), dtype=np.float32)


@pytest.mark.parametrize(
    "graph",
    [
        {"has_map": True, "stated": ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])},
        {"height": 24, "width": 20, "batch": 3},
        {"is_half": True, "has_map": True},
    ],
)
def test_a_graph_answers_the_same_from_a_process_of_its_own(tmp_path: Path, graph: dict[str, object]) -> None:
    path = a_graph(tmp_path / "a.onnx", **graph)
    own = here(path, 1)
    with confined(path, 1, FREE) as other:
        assert (other.height, other.width, other.pixels) == (own.height, own.width, own.pixels)
        for count in (5, 1):
            expected, found = own.answer(IMAGES[:count]), other.answer(IMAGES[:count])
            for one, another in zip(expected, found, strict=True):
                assert (one is None) == (another is None)
                assert one is None or np.array_equal(one, another)


def test_the_process_ends_with_the_block(tmp_path: Path) -> None:
    path = a_graph(tmp_path / "a.onnx")
    with confined(path, 1, FREE):
        assert str(path) in running_programs()
    assert str(path) not in running_programs()


def running_programs() -> str:
    """The command lines of all processes."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(place.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


def test_a_file_that_is_refused_here_is_refused_there_in_the_same_words(tmp_path: Path) -> None:
    path = a_graph(tmp_path / "a.onnx", stated=([0.5], [0.0]))
    with pytest.raises(WeightsRefused) as refused_here:
        here(path, 1)
    with pytest.raises(WeightsRefused) as refused_there, confined(path, 1, FREE):
        pass
    assert str(refused_there.value) == str(refused_here.value)


def test_a_graph_that_fails_later_is_refused_with_the_name_of_its_file(tmp_path: Path) -> None:
    """One that takes images of one size, and was opened by somebody who gives it others."""
    path = a_graph(tmp_path / "legs.onnx", height=24, width=20)
    with confined(path, 1, FREE) as graph:
        partial = replace(open_partial(path, open_graph=lambda _: graph), view=whole(32, 16))
        with pytest.raises(WeightsRefused, match=r"input 'legs\.onnx': onnxruntime cannot run the graph"):
            partial.answer(torch.zeros(2, 3, 32, 16), INPUT)


SAY = "print('{}', flush=True)\ndef say(line): print(line, flush=True); sys.stdin.buffer.read()\n"
PROGRAMS = {
    "words": ("print('hello')", "no answer"),
    "another field": ('print(\'{"height": 24, "run": "rm"}\')', "no answer"),
    "a size that no image has": ("print('{\"height\": 1000000}')", "no answer"),
    "brackets without end": ("print('[' * 100_000)", "no answer"),
    "a line without end": ("print('\"' + 'x' * 10_000_000)", "no answer"),
    "nothing": ("sys.exit(3)", "ended with status 3"),
    "a reason of its own": ('print(\'{"refused": "I will not"}\')', "I will not"),
    "shapes of terabytes": (SAY + "say('{\"embedding\": [2000000000, 2000000000]}')", "bytes an answer"),
    "negative shapes": (SAY + "say('{\"embedding\": [-1, 5]}')", "no answer"),
    "too little": ('print("{}"); print(\'{"embedding": [5, 5]}\'); print("x")', "ended with status 0"),
    "no interest in images": ('print("{}", flush=True); os.close(0); time.sleep(1)', "ended"),
    "silence": ('print("{}", flush=True); time.sleep(3600)', "took longer than"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_answers_anything_else_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, words = PROGRAMS[name]
    if name == "silence":
        monkeypatch.setattr(answering, "PATIENCE_S", 2.0)
    script = tmp_path / "program.py"
    script.write_text(f"import os, sys, time\n{program}\n")
    with (
        pytest.raises(WeightsRefused, match=words),
        confined(tmp_path / "a.onnx", 1, Confinement((sys.executable, str(script)), os.environ)) as graph,
    ):
        graph.answer(np.zeros((64, 3, 256, 128), np.float32))


def test_the_program_loads_no_torch() -> None:
    code = "import sys, chains.fuse.answering; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_partial_teacher_may_be_asked_in_another_process(tmp_path: Path) -> None:
    path = a_graph(tmp_path / "a.onnx", has_map=True)
    with confined(path, 1, FREE) as graph:
        partial = open_partial(path, whole(24, 20), open_graph=lambda _: graph)
        assert (partial.name, partial.embedding_dim, partial.map_shape) == ("a.onnx", 7, (5, 6, 5))
