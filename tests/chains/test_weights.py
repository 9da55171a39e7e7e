"""Weights of others: recognised whatever wraps them, or refused with a reason that helps."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from chains.chain import InputSpec
from chains.errors import WeightsRefused
from chains.export import load_trained, origin, read_exported, save_network
from chains.importers import check as check_module
from chains.importers.check import Declared, answer, check
from chains.importers.containers import read_safetensors, read_torch, sniff
from chains.importers.recognise import recognise, without_wrapping
from chains.model import ReIDModel
from chains.width import Width

INPUT = InputSpec(64, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
DECLARED = Declared(input=INPUT)
PEOPLE = 7


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def model(request: pytest.FixtureRequest) -> ReIDModel:
    return a_model(request.param)


def a_model(name: str = "resnet18") -> ReIDModel:
    torch.manual_seed(0)
    model = ReIDModel(name, Width(4))
    with torch.no_grad():
        model.neck.running_mean.normal_()  # type: ignore[union-attr]
        model.neck.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def state_of(model: ReIDModel, neck: str | None = "neck.", classifier: str | None = "classifier.") -> dict[str, Tensor]:
    """The model's tensors as a toolkit would save them."""
    state = {name.removeprefix("backbone."): tensor.clone() for name, tensor in model.state_dict().items()}
    own = {name: state.pop(name) for name in list(state) if name.startswith("neck.")}
    if neck is not None:
        state |= {name.replace("neck.", neck): tensor for name, tensor in own.items()}
    if classifier is not None:
        state[f"{classifier}weight"] = torch.randn(PEOPLE, model.backbone.channels)
    return state


@pytest.fixture
def state() -> dict[str, Tensor]:
    return state_of(a_model())


def saved(state: Any, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


def reason(path: Path, declared: Declared = DECLARED) -> str:
    report = answer(path, declared)
    assert report["state"] == "refused", report
    return str(report["reason"])


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, INPUT.height, INPUT.width, generator=torch.Generator().manual_seed(1))


# What is accepted.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "arch": "resnet50"},
        lambda state: {"model": OrderedDict(state), "optimizer": {"lr": 0.1, "steps": [1, 2]}},
        lambda state: {"model": {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        lambda state: {name: torch.nn.Parameter(t) if t.is_floating_point() else t for name, t in state.items()},
    ],
    ids=["bare", "state_dict", "model", "module inside", "compiled", "parameters"],
)
def test_a_torch_file_is_read_whatever_wraps_it(
    model: ReIDModel, tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]
) -> None:
    path = saved(wrap(state_of(model)), tmp_path)
    report = check(path, DECLARED, tmp_path / "teacher.safetensors")
    assert (report["state"], report["format"], report["architecture"]) == ("ready", "torch", model.table.name)
    assert (report["width"], report["identities"], report["neck"]) == ("4x2-4-8", PEOPLE, "own")
    teacher = load_trained(tmp_path / "teacher.safetensors")
    assert torch.equal(teacher.model.embed(images()), model.embed(images()))
    assert teacher.classifier.shape == (PEOPLE, model.backbone.channels)


@pytest.mark.parametrize("prefix", ["", "backbone.", "base.", "model."])
@pytest.mark.parametrize("neck", ["neck.", "bottleneck."])
def test_the_neck_is_found_under_either_name(tmp_path: Path, prefix: str, neck: str) -> None:
    model = a_model("resnet18_bot" if (prefix, neck) == ("base.", "bottleneck.") else "resnet18")  # BoT's own names
    state = {
        name if name.startswith((neck, "classifier.")) else f"{prefix}{name}": tensor
        for name, tensor in state_of(model, neck).items()
    }
    found = recognise(state)
    assert found.neck
    assert torch.equal(found.model.embed(images()), model.embed(images()))
    assert not found.ignored


def test_a_neck_without_a_bias_has_none(state: dict[str, Tensor]) -> None:
    del state["neck.bias"]
    assert not recognise(state).model.neck.bias.any()


def test_our_own_export_comes_back_as_it_was(tmp_path: Path) -> None:
    model, classifier = a_model(), torch.randn(PEOPLE, 32)
    save_network(model, classifier, origin("teacher", model, INPUT, "MIT"), tmp_path / "own.safetensors")
    report = check(tmp_path / "own.safetensors", Declared(license="MIT"), tmp_path / "teacher.safetensors")
    assert report["input"] == {"height": 64, "width": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    assert (tmp_path / "teacher.safetensors").read_bytes() == (tmp_path / "own.safetensors").read_bytes()


def test_a_network_without_a_neck_gets_one_that_changes_nothing(tmp_path: Path) -> None:
    model = a_model()
    path = saved(state_of(model, neck=None), tmp_path)
    report = check(path, DECLARED, tmp_path / "teacher.safetensors")
    assert report["neck"] == "identity"
    assert "identity neck" in report["notes"][0]
    feature, embedding = load_trained(tmp_path / "teacher.safetensors").model(images())
    torch.testing.assert_close(embedding, feature, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(feature, model(images())[0])


def test_a_network_without_a_classifier_has_none(tmp_path: Path) -> None:
    report = check(saved(state_of(a_model(), classifier=None), tmp_path), DECLARED, tmp_path / "t.safetensors")
    assert report["identities"] is None
    assert read_exported(tmp_path / "t.safetensors").classifier is None


def test_a_classifier_of_another_embedding_is_left_out_and_said(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["classifier.weight"] = torch.randn(PEOPLE, 33)
    report = check(saved(state, tmp_path), DECLARED)
    assert report["identities"] is None
    assert "left out" in report["notes"][0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("save", ["torch", "safetensors"])
def test_other_floats_are_converted_and_said(
    state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype, save: str
) -> None:
    other = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if save == "torch":
        path = saved(other, tmp_path)
    else:
        save_file(other, path := tmp_path / "weights.safetensors")
    report = check(path, DECLARED)
    assert report["format"] == save
    assert report["notes"] == [f"weights of {str(dtype).removeprefix('torch.')} were converted to float32"]


def test_the_score_of_a_network_stands_beside_chance(state: dict[str, Tensor], tmp_path: Path) -> None:
    sanity = check(saved(state, tmp_path), DECLARED)["sanity"]
    assert (sanity["identities"], sanity["images"]) == (8, 32)
    assert 0 < sanity["chance_map"] < 50


def test_the_command_writes_what_it_found(state: dict[str, Tensor], tmp_path: Path) -> None:
    path, out = saved(state, tmp_path), tmp_path / "report.json"
    stated = {"architecture": "resnet18", "input": {"height": 64, "width": 32, "mean": [0.5] * 3, "std": [0.2] * 3}}
    check_module.main(["--file", str(path), "--out", str(out), "--declared", json.dumps(stated)])
    assert json.loads(out.read_text())["input"]["std"] == [0.2] * 3
    path.write_bytes(b"")
    check_module.main(["--file", str(path), "--out", str(out)])
    assert json.loads(out.read_text()) == {"state": "refused", "reason": "the file is empty"}


def test_wrapping_is_only_taken_off_what_is_wrapped_whole() -> None:
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert without_wrapping(mixed).keys() == mixed.keys()


# What is refused, and why.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "git lfs pull"),
        (b"<!doctype html><html>Sign in", "web page"),
        (b"\x1f\x8b\x08\x00aaaaaaaaaaa", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (pickle.dumps({"a": 1}, protocol=2), "bare pickle"),
        (b"hello, weights", "neither safetensors nor a torch file"),
        (struct.pack("<Q", 2**39) + b"{}", "cannot be read as safetensors"),
        (b"PK\x03\x04 and no more of it", "cut short or damaged"),
        (b"\x08\x07\xff\xff\xff", "cannot be read as ONNX"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(content)
    assert words in reason(tmp_path / "file")


@pytest.mark.parametrize("first", [0x80, 0x08, 0x50])
def test_a_safetensors_file_may_begin_as_any_other_kind_does(tmp_path: Path, first: int) -> None:
    path = tmp_path / "weights"
    for padding in range(0, 600, 8):  # the first byte is that of the header's length, a multiple of eight
        save_file({"a": torch.zeros(2)}, path, {"note": "x" * padding})
        if path.read_bytes()[0] == first:
            break
    assert path.read_bytes()[0] == first
    assert sniff(path) == "safetensors"


def test_a_legacy_torch_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "before version 1.6" in reason(tmp_path / "old.pth")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("the-file-ran-code",)


def test_a_pickle_with_code_is_refused_and_not_run(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved({"state_dict": state, "evil": Evil()}, tmp_path)
    assert "mkdir" in reason(path)
    assert not (tmp_path / "the-file-ran-code").exists()


def test_a_whole_pickled_module_is_code_too(tmp_path: Path) -> None:
    assert "torch.save(model.state_dict(), path)" in reason(saved(a_model(), tmp_path))


def test_a_tensor_made_large_by_strides(tmp_path: Path) -> None:
    path = saved({"conv1.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path)
    assert path.stat().st_size < 1600
    assert "1,000,000×1,000,000" in reason(path)


def test_many_tensors_on_one_storage(tmp_path: Path) -> None:
    storage = torch.zeros(1000)
    path = saved({f"t{i}": storage[:] for i in range(1000)}, tmp_path)
    assert "share one storage" in reason(path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with every member changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))
    return path


def test_a_storage_that_claims_more_than_its_record_has(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = rewritten(saved(state, tmp_path), lambda name, content: content[:-4] if "/data/" in name else content)
    assert "claims" in reason(path)


def test_a_pickle_that_makes_its_reader_reserve_memory(state: dict[str, Tensor], tmp_path: Path) -> None:
    def numbered(name: str, content: bytes) -> bytes:  # LONG_BINPUT, right after the protocol and the empty dictionary
        return content[:3] + b"r\xff\xff\xff\x0f" + content[3:] if name.endswith("data.pkl") else content

    path = rewritten(saved(state, tmp_path), numbered)
    assert "numbers an object 268,435,455" in reason(path)


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = saved({"conv1.weight": torch.zeros(10**6)}, tmp_path)
    rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert "bomb" in reason(path)


def test_members_that_overlap(tmp_path: Path) -> None:
    path = rewritten(saved({"conv1.weight": torch.zeros(100_000)}, tmp_path), lambda name, content: content)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        large = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        start, names = archive.start_dir, len(archive.infolist())
    directory = content[start : content.rindex(b"PK\x05\x06")]
    entry_at = directory.index(large.filename.encode()) - 46
    name, extra, comment = struct.unpack_from("<HHH", directory, entry_at + 28)
    entry = directory[entry_at : entry_at + 46 + name + extra + comment]
    copies = [entry.replace(large.filename.encode(), large.filename[:-1].encode() + bytes([65 + i])) for i in range(9)]
    whole = directory + b"".join(copies)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, names + 9, names + 9, len(whole), start, 0)
    path.write_bytes(content[:start] + whole + end)
    assert "overlap" in reason(path)


def test_another_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.jpg", b"x")
    assert "no torch file" in reason(tmp_path / "photos.zip")


def test_a_torchscript_program(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"x")
        archive.writestr("script/code/__torch__.py", b"x")
    assert "TorchScript" in reason(tmp_path / "script.pt")


@pytest.mark.parametrize("save", ["torch", "safetensors", "onnx"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_files(state: dict[str, Tensor], tmp_path: Path, save: str, share: float) -> None:
    path = tmp_path / "file"
    if save == "torch":
        torch.save(state, path)
    elif save == "safetensors":
        save_file(state, path)
    else:
        onnx.save(graph(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "damaged" in reason(path)


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "is nan"), (float("inf"), "is inf"), (float("-inf"), "is -inf")]
)
def test_broken_numbers_are_named(state: dict[str, Tensor], tmp_path: Path, value: float, words: str) -> None:
    state["layer2.0.conv1.weight"][3, 1, 2, 0] = value
    assert f"layer2.0.conv1.weight[3, 1, 2, 0] {words}" in reason(saved(state, tmp_path))


def test_a_negative_variance(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["layer1.0.bn1.running_var"][0] = -1
    assert "layer1.0.bn1.running_var is negative" in reason(saved(state, tmp_path))


def test_a_float64_that_overflows(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["conv1.weight"] = state["conv1.weight"].double() * 1e60
    assert "conv1.weight" in reason(saved(state, tmp_path))


def test_integers_are_no_weights(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["conv1.weight"] = state["conv1.weight"].to(torch.int8)
    assert "conv1.weight is int8" in reason(saved(state, tmp_path))


def test_a_missing_tensor_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    del state["layer3.1.bn2.running_mean"]
    words = "layer3.1.bn2.running_mean is missing, which has shape (16,) at width 4x2-4-8"
    assert words in reason(saved(state, tmp_path))


def test_half_a_neck_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    del state["neck.running_var"]
    assert "neck.running_var is missing" in reason(saved(state, tmp_path))


def test_another_depth_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["layer3.2.conv1.weight"] = torch.zeros(16, 16, 3, 3)
    assert "layer3.2.conv1.weight of shape (16, 16, 3, 3) is unknown to it" in reason(saved(state, tmp_path))


def test_another_shape_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["layer3.0.conv2.weight"] = torch.zeros(16, 8, 3, 3)  # grouped, as ResNeXt has it
    assert "layer3.0.conv2.weight has shape (16, 8, 3, 3)" in reason(saved(state, tmp_path))


def test_stages_that_are_no_multiples_of_the_stem(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["layer2.0.conv1.weight"] = torch.zeros(9, 4, 3, 3)
    assert "multiples of the stem" in reason(saved(state, tmp_path))


@pytest.mark.parametrize("names", [["encoder.layers.0.weight"], ["conv1.weight"], ["stages.0.weight", "head.bias"]])
def test_another_family(tmp_path: Path, names: list[str]) -> None:
    path = saved({name: torch.zeros(2) for name in names}, tmp_path)
    words = reason(path)
    assert all(known in words for known in (names[0], "resnet18, resnet34", "osnet_ain", "torchreid, fast-reid, BoT"))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(1)], torch.zeros(3), 7, "text"])
def test_a_file_without_named_tensors(tmp_path: Path, content: Any) -> None:
    assert "no tensors by name" in reason(saved(content, tmp_path))


def test_imagenet_s_classifier_is_no_teacher_of_people(tmp_path: Path) -> None:
    state = state_of(a_model(), neck=None, classifier=None) | {"fc.weight": torch.randn(1000, 32)}
    assert "ImageNet" in reason(saved(state, tmp_path))
    trained_further = state_of(a_model(), classifier=None) | {"fc.weight": torch.randn(1000, 32)}
    assert check(saved(trained_further, tmp_path), DECLARED)["identities"] == 1000


def test_another_architecture_than_was_declared(state: dict[str, Tensor], tmp_path: Path) -> None:
    declared = Declared("resnet50", INPUT)
    assert "registered as resnet50, and the file holds resnet18" in reason(saved(state, tmp_path), declared)


@pytest.mark.parametrize("neck", ["neck.", None])
def test_a_network_that_answers_everybody_alike(tmp_path: Path, neck: str | None) -> None:
    state = state_of(a_model(), neck)
    for name in state:
        if name.endswith("bn2.weight") or (name.endswith("1.weight") and "downsample" in name) or name == "bn1.weight":
            state[name].zero_()
    assert "does not look at the image" in reason(saved(state, tmp_path))


def test_a_network_that_overflows(state: dict[str, Tensor], tmp_path: Path) -> None:
    for name in state:
        if name.endswith(("bn1.weight", "bn2.weight")):
            state[name] *= 1e18
    assert "NaN or infinity" in reason(saved(state, tmp_path))


def test_a_made_up_description_of_our_own(state: dict[str, Tensor], tmp_path: Path) -> None:
    for text in ("{", json.dumps({"kind": "teacher"})):
        save_file(state, tmp_path / "own.safetensors", {"widthwise.network": text})
        assert "own description" in reason(tmp_path / "own.safetensors")


# ONNX: frozen.


def graph(**changes: Any) -> onnx.ModelProto:
    """A pooled convolution as a teacher: images (n, 3, H, W) -> embedding (n, 4)."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["map"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["map"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    made = helper.make_graph(
        changes.get("nodes", nodes),
        "teacher",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, changes.get("input", ["n", 3, 64, 32]))],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, changes.get("output", ["n", 4]))],
        [numpy_helper.from_array(changes.get("weight", weight), "weight")],
    )
    opset = helper.make_opsetid(changes.get("domain", ""), changes.get("opset", 17))
    return helper.make_model(made, opset_imports=[opset], ir_version=8)


def test_a_graph_is_a_frozen_teacher(tmp_path: Path) -> None:
    onnx.save(graph(), tmp_path / "t.onnx")
    report = check(tmp_path / "t.onnx", Declared(), tmp_path / "teacher.safetensors")
    assert (report["format"], report["architecture"], report["width"]) == ("onnx", "onnx", None)
    assert (report["embedding_dim"], report["parameters"], report["opset"]) == (4, 108, 17)
    assert (report["input"]["height"], report["input"]["width"]) == (64, 32)
    assert not (tmp_path / "teacher.safetensors").exists()


@pytest.mark.parametrize("batch", [1, 5])
def test_a_graph_of_a_fixed_batch_is_fed_so_many(tmp_path: Path, batch: int) -> None:
    onnx.save(graph(input=[batch, 3, 64, 32], output=[batch, 4]), tmp_path / "t.onnx")
    assert f"fixed at {batch}" in check(tmp_path / "t.onnx", Declared())["notes"][1]


def test_external_data_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    model = graph()
    onnx.save(model, tmp_path / "t.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert "weights.bin" in reason(tmp_path / "t.onnx")
    (tmp_path / "weights.bin").unlink()
    assert "another file" in reason(tmp_path / "t.onnx")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": ["n", 1, 64, 32]}, "takes normalised images"),
        ({"input": ["n", 3]}, "onnx.checker refuses"),
        ({"input": ["n", 3, 64, 9000]}, "16 to 1024 pixels"),
        ({"input": [1000, 3, 64, 32], "output": [1000, 4]}, "1000 images at once"),
        ({"domain": "com.evil"}, "operators of com.evil"),
        ({"opset": 3}, "opset 3"),
        ({"output": ["n", 9]}, "onnx.checker refuses"),
        ({"weight": np.zeros((4, 3, 3, 3), np.float32)}, "does not look at the image"),
        ({"weight": np.full((4, 3, 3, 3), np.nan, np.float32)}, "NaN or infinity"),
        ({"nodes": [helper.make_node("Nothing", ["images", "weight"], ["embedding"])]}, "onnx.checker refuses"),
        (
            {"nodes": [helper.make_node("Identity", ["images"], ["embedding"])], "output": ["n", 3, 64, 32]},
            "a teacher answers (images, D)",
        ),
    ],
)
def test_graphs_that_are_no_teachers(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    onnx.save(graph(**changes), tmp_path / "t.onnx")
    assert words in reason(tmp_path / "t.onnx", Declared())


def test_a_graph_that_was_registered_as_a_network(tmp_path: Path) -> None:
    onnx.save(graph(), tmp_path / "t.onnx")
    assert "registered as resnet18" in reason(tmp_path / "t.onnx", Declared("resnet18"))


def test_read_torch_and_sniff_raise_the_library_s_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04")
    assert sniff(tmp_path / "x") == "torch"
    with pytest.raises(WeightsRefused):
        read_torch(tmp_path / "x")


@pytest.mark.parametrize("low", [b"\x80\x04", b"\x1f\x8b", b"\x08\x04"], ids=["pickle", "gzip", "onnx"])
def test_a_safetensors_file_whose_length_begins_like_another_format_is_still_one(low: bytes, tmp_path: Path) -> None:
    length = int.from_bytes(low, "little")
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    path = tmp_path / "weights"
    path.write_bytes(length.to_bytes(8, "little") + header + b"\0\0\0\0")
    assert sniff(path) == "safetensors"
    assert list(read_safetensors(path)[0]) == ["x"]
