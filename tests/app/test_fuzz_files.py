"""Damaged files of teachers and chains end as a valid load or a clean refusal, in bounded memory and time.

`WIDTHWISE_FUZZ` (default 300): how many mutations. They are numbered: number n is always the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from app.worker.sandbox import run_sandboxed
from chains import artifact
from chains.model import ReIDModel
from chains.testing import pico_chain
from chains.width import Width

CHILD = Path(__file__).with_name("fuzz_child.py")
COUNT = int(os.environ.get("WIDTHWISE_FUZZ", "300"))
FORMATS = ("safetensors", "torch", "onnx", "chain")
MEMORY_BYTES = 6 * 2**30  # of address space, as the check of a teacher has
PEAK_BYTES = 1.5 * 2**30  # of memory that is really used; half a gigabyte of it is torch itself
SLOWEST_S = 20


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """One good file per format, small ones."""
    folder = tmp_path / "seeds"
    folder.mkdir()
    torch.manual_seed(0)
    model = ReIDModel("resnet18", Width(1)).eval()
    state = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
    save_file(state, folder / "safetensors", {"format": "pt"})
    torch.save({"state_dict": state, "epoch": 3}, folder / "torch")
    onnx.save(a_graph(), folder / "onnx")
    (folder / "chain").write_bytes(artifact.dump(pico_chain()))
    return folder


def a_graph() -> onnx.ModelProto:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).numpy()
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["map"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Relu", ["map"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 32, 16])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "t", [images], [embedding], [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.timeout(300 + COUNT)
def test_every_mutation_is_a_valid_load_or_a_clean_refusal(seeds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    counts: Counter[str] = Counter()
    first, crashes = 0, []
    while first < COUNT:
        (folder / "result.json").unlink(missing_ok=True)
        completed = run_sandboxed(
            [sys.executable, str(CHILD), str(seeds), str(first), str(COUNT)],
            folder=folder,
            readable=[CHILD, seeds],
            memory_bytes=MEMORY_BYTES,
            seconds=120 + COUNT,
        )
        if completed.returncode != 0:
            number = int((folder / "at").read_text())
            crashes.append((number, FORMATS[number % 4], completed.returncode, completed.lines[-2:]))
            assert completed.stopped is None, crashes
            assert len(crashes) <= 20, crashes
            first = number + 1
            continue
        result = json.loads((folder / "result.json").read_text())
        assert not result["bugs"], json.dumps(result["bugs"][:5], indent=1)
        assert result["peak_bytes"] < PEAK_BYTES, result["large"]
        assert result["slowest_s"] < SLOWEST_S
        counts += Counter(result["counts"])
        print(f"\n{COUNT} mutations: {dict(counts)}; slowest {result['slowest_s']:.2f} s,", end=" ")
        print(f"peak {result['peak_bytes'] / 2**20:.0f} MiB; crashes {crashes}")
        break
    assert not crashes
    for name in FORMATS:
        refused = sum(count for outcome, count in counts.items() if outcome.startswith(name) and "valid" not in outcome)
        assert refused > COUNT / 16, f"{name}: the mutations reach nothing"
