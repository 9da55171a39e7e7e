"""`widthwise inspect`: every kind of file is told apart by its content, and what is printed is what it holds."""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from app.cli import main
from chains.artifact import save
from chains.chain import Chain
from chains.commands import inspect
from chains.describe import describe, text_of
from chains.errors import ChainFileError, ChainsError, WeightsRefused
from chains.export import METADATA_KEY, export_safetensors, origin, save_network
from chains.model import ReIDModel, load_student
from chains.onnxfile import plan, write
from chains.testing import contract_chain, pico_chain
from chains.width import Width
from tests.originals import bot, imagenet, oskt, torchreid

NAMES = ("resnet18", "resnet50_ibn_a", "osnet", "vit_tiny")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Chain], Path]:
    def keep(chain: Chain) -> Path:
        save(chain, tmp_path / "chain.safetensors")
        return tmp_path / "chain.safetensors"

    return keep


# --- what this project writes


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_tells_what_every_width_costs(saved: Callable[[Chain], Path], name: str) -> None:
    path = saved(contract_chain(name))
    stored, found = save(contract_chain(name), path), describe(path)
    chain = stored.chain
    assert chain.frontier is not None
    assert (found["what"], found["architecture"], found["sha256"]) == ("weight chain", name, stored.digest)
    assert found["ladder"] == [row["width"] for row in found["widths"]] == [str(width) for width in chain.ladder]
    for row, width, measured in zip(found["widths"], chain.ladder, chain.frontier.widths, strict=True):
        costs = plan(stored, width).costs
        said = {name: row[name] for name in ("macs", "params", "artifact_bytes", "memory_bytes_bound")}
        assert said == {name: getattr(costs, name) for name in said}
        assert (row["map"], row["is_calibrated"]) == (measured.map, True)
        assert any(line.split()[:2] == [str(width), f"{costs.macs:,}"] for line in text_of(found).splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_the_groups_of_a_chain_hold_every_axis_of_every_tensor(saved: Callable[[Chain], Path], name: str) -> None:
    chain = contract_chain(name)
    found = {group["group"]: group for group in describe(saved(chain))["groups"]}
    assert {group: of["channels"] for group, of in found.items()} == chain.table.group_sizes(chain.teacher)
    assert {group: of["narrowest"] for group, of in found.items()} == chain.table.group_sizes(chain.ladder[0])
    for tensor, axes in chain.table.axes.items():
        assert {group for group, of in found.items() if tensor in of["rows_of"]} == set(axes.rows)
        assert {group for group, of in found.items() if tensor in of["columns_of"]} == set(axes.columns or ())
    assert all(set(of["written_by"]) <= set(of["rows_of"]) for of in found.values())


def test_blocks_of_one_layer_share_a_line(saved: Callable[[Chain], Path]) -> None:
    lines = text_of(describe(saved(contract_chain("vit_tiny")))).splitlines()
    (heads,) = (line for line in lines if line.startswith("blocks.0.attn"))
    assert heads.split(maxsplit=4)[:4] == ["blocks.0.attn.0", "×3", "16", "4"]
    assert "blocks.0.attn.q, blocks.0.attn.k, blocks.0.attn.v" in heads


def test_a_width_without_statistics_has_no_file(saved: Callable[[Chain], Path]) -> None:
    chain = pico_chain()
    kept = {width: chain.statistics[width] for width in chain.ladder[1:]}
    found = describe(saved(replace(chain, statistics=kept, frontier=None)))
    assert [row["is_calibrated"] for row in found["widths"]] == [False, True, True, True]
    assert found["widths"][0]["artifact_bytes"] is None
    line = next(line for line in text_of(found).splitlines() if line.startswith("2x2-4-8 "))
    assert line.split()[3] == "-"
    assert "mAP" not in text_of(found)


def test_provenance_is_told_whole(saved: Callable[[Chain], Path]) -> None:
    provenance = {"made_by": "hand", "teacher": {"train": {"steps": 1234}}}
    found = describe(saved(replace(pico_chain(), provenance=provenance)))
    assert found["provenance"] == provenance
    assert "provenance.teacher.train.steps  1,234" in text_of(found)


def test_networks_of_this_project_say_where_they_come_from(saved: Callable[[Chain], Path], tmp_path: Path) -> None:
    chain = pico_chain()
    path = saved(chain)
    stored = save(chain, path)
    export_safetensors(stored, chain.ladder[1], tmp_path / "student.safetensors")
    student = describe(tmp_path / "student.safetensors")
    assert (student["what"], student["width"], student["chain"]) == ("student network", "4x2-4-8", "pico")
    assert student["chain_digest"] == describe(path)["sha256"]
    assert student["identities"] is None
    model = load_student(chain, chain.teacher)
    save_network(model, torch.ones(7, 64), origin("teacher", model, chain.input, "MIT"), tmp_path / "t.safetensors")
    teacher = describe(tmp_path / "t.safetensors")
    assert (teacher["what"], teacher["width"], teacher["identities"]) == ("teacher network", "8x2-4-8", 7)
    assert teacher["widths"][0]["macs"] == describe(path)["widths"][-1]["macs"]


def test_an_onnx_file_of_a_chain_shows_its_recipe_and_metadata(saved: Callable[[Chain], Path], tmp_path: Path) -> None:
    path = saved(pico_chain())
    stored = save(pico_chain(), path)
    width = stored.chain.ladder[1]
    (tmp_path / "model.bin").write_bytes(write(stored, width))
    found, costs = describe(tmp_path / "model.bin"), plan(stored, width).costs
    assert found["what"] == "model of a chain"
    assert found["recipe"] == plan(stored, width).recipe
    assert found["metadata"]["widthwise.width"] == "4x2-4-8"
    assert found["metadata"]["reid.thresholds"]["1e-2"]["4x2-4-8"] == 0.47
    assert (found["params"], found["metadata"]["cost.macs"]) == (costs.params, costs.macs)
    assert found["inputs"] == ["images: float [batch, 3, 64, 32]"]
    assert found["outputs"] == ["embedding: float [batch, 64]"]


# --- what others write


def graph(outputs: tuple[str, ...]) -> onnx.ModelProto:
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["e"])]
    if "f" in outputs:
        nodes.append(helper.make_node("Relu", ["e"], ["f"]))
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 64, 32])]
    shapes: dict[str, list[str | int | None]] = {"e": ["n", 3], "f": ["n", 3], "p": ["n", 3, 1, 1]}
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs]
    model = helper.make_model(
        helper.make_graph(nodes, "toy", values, made), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    helper.set_model_props(model, {"author": "somebody"})
    return model


def test_any_onnx_file_says_whether_it_can_be_a_teacher(tmp_path: Path) -> None:
    onnx.save(graph(("e",)), tmp_path / "teacher.onnx")
    found = describe(tmp_path / "teacher.onnx")
    assert (found["what"], found["is_teacher"], found["opset"]) == ("ONNX graph", True, 17)
    assert found["operators"] == {"Flatten": 1, "GlobalAveragePool": 1}
    assert found["metadata"] == {"author": "somebody"}
    onnx.save(graph(("e", "p")), tmp_path / "with_map.onnx")
    assert describe(tmp_path / "with_map.onnx")["is_teacher"] is True
    onnx.save(graph(("e", "f")), tmp_path / "two.onnx")
    refused = describe(tmp_path / "two.onnx")
    assert refused["is_teacher"] is False
    assert refused["reason"].startswith("the graph has 2 outputs (e, f); a teacher has one, the embedding, and perhaps")


def marked(path: Path, **properties: str) -> Path:
    model = graph(("e",))
    helper.set_model_props(model, properties)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 900 + "1" + "}" * 900, "[1e999]", '{"a": NaN}', "{"])
def test_metadata_that_json_cannot_say_again_stays_text(tmp_path: Path, text: str) -> None:
    found = describe(marked(tmp_path / "model.onnx", **{"widthwise.recipe": text, "cost.macs": "12"}))
    assert (found["recipe"], found["metadata"]) == (text, {"cost.macs": 12})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert max(map(len, text_of(found).splitlines())) < 3000


def test_a_type_that_onnx_has_no_name_for_is_told_by_its_number(tmp_path: Path) -> None:
    model = graph(("e",))
    model.graph.input[0].type.tensor_type.elem_type = 999
    onnx.save(model, tmp_path / "strange.onnx")
    found = describe(tmp_path / "strange.onnx")
    assert (found["inputs"], found["is_teacher"]) == (["x: type 999 [n, 3, 64, 32]"], False)


def test_a_checkpoint_of_a_toolkit_is_recognised(tmp_path: Path) -> None:
    state = bot.checkpoint("resnet50", identities=5, stem=8)
    torch.save(state, tmp_path / "model_120.pth")
    found = describe(tmp_path / "model_120.pth")
    assert (found["what"], found["format"], found["width"]) == ("checkpoint", "torch", "8x2-4-8")
    assert (found["architecture"], found["identities"], found["is_teacher"]) == ("resnet50_bot", 5, True)
    assert found["tensors"] == len(state)
    assert 0 < found["matched"] <= len(state)
    save_file(torchreid.checkpoint("osnet_x0_25", identities=3), tmp_path / "o.safetensors")
    found = describe(tmp_path / "o.safetensors")
    assert (found["architecture"], found["width"], found["format"]) == ("osnet", "16x4-6-8", "safetensors")
    assert found["embedding_dim"] == 512
    assert "torchreid" in text_of(found)


def test_pretraining_is_told_from_a_teacher(tmp_path: Path) -> None:
    torch.save(imagenet.checkpoint("resnet18", stem=8), tmp_path / "r18.pth")
    found = describe(tmp_path / "r18.pth")
    assert found["is_teacher"] is False
    assert "ImageNet" in found["reason"]


@pytest.mark.parametrize(
    ("chain", "family", "layer", "sizes"),
    [
        (oskt.ResNetChain(), "ResNet", "base.layer1.0.conv3", (32, 8)),
        (oskt.VitChain(), "ViT", "dw_proj_fc2", (oskt.VitChain().vit.embed_dim, 8)),
    ],
)
def test_the_two_files_of_an_oskt_chain_are_known(
    tmp_path: Path, chain: Any, family: str, layer: str, sizes: tuple[int, int]
) -> None:
    state, matcher = oskt.chain_checkpoint(chain, seed=0)
    torch.save(state, tmp_path / "chain.pth")
    weights = describe(tmp_path / "chain.pth")
    assert (weights["what"], weights["family"]) == ("weights of an OSKT chain", family)
    assert 0 < weights["genes"] < weights["tensors"] == len(state)
    (tmp_path / "matcher.json").write_text(json.dumps(matcher))
    found = describe(tmp_path / "matcher.json")
    assert (found["what"], found["family"]) == ("gene matcher", family)
    rows = {row["layer"]: (row["channels"], row["clusters"]) for row in found["layers"]}
    assert rows[layer] == sizes
    assert any(line.split() == [layer, *map(str, sizes)] for line in text_of(found).splitlines())


# --- what is nothing


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(_Bomb()))
    torch.save({"conv1.weight": _Bomb()}, tmp_path / "zip.pth")
    for name in ("bare.pth", "zip.pth"):
        with pytest.raises(WeightsRefused):
            describe(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello", "neither safetensors nor a torch file"),
        (b'{"name": "x"}', "JSON with 'name' in it; the one JSON file known here"),
        (b"{}", "JSON with nothing in it"),
        (b'{"conv1": [0, true]}', "JSON with 'conv1' in it"),
        (b'{"conv1": [0, 1]', "the matcher is no JSON"),
        (b"\x08\x08garbage", "cannot be read as ONNX"),
        (b"\x40\0\0\0\0\0\0\0{}", "cannot be read as safetensors"),
    ],
)
def test_what_is_nothing_of_this_field_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "thing").write_bytes(content)
    with pytest.raises(ChainsError, match=message) as refused:
        describe(tmp_path / "thing")
    assert str(refused.value).count(str(tmp_path / "thing")) == 1


HOSTILE = "\x1b[2J\u202egnp\x07\n\x9b1mend"


def test_nothing_in_a_file_reaches_the_terminal_as_a_command_to_it(saved: Callable[[Chain], Path]) -> None:
    path = saved(replace(pico_chain(), license=HOSTILE, provenance={HOSTILE: HOSTILE}))
    text = text_of(describe(path))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert text.count(r"\x1b[2J\u202egnp\x07\n\x9b1mend") == 3
    assert json.loads(inspect(path, as_json=True))["license"] == HOSTILE


def test_half_a_character_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "matcher.json").write_bytes(b'{"\\ud800": [0, 1]}')
    for as_json in (False, True):
        assert r"\ud800" in inspect(tmp_path / "matcher.json", as_json=as_json).encode().decode()


def test_a_file_of_some_bytes_gets_no_network_of_terabytes(tmp_path: Path) -> None:
    """It says what it is, and holds next to nothing of that."""
    mark = origin("teacher", ReIDModel("resnet18", Width(2)), pico_chain().input, "MIT")
    claimed = mark.model_copy(update={"architecture": "resnet101", "width": "4096x64-64-64"}).model_dump_json()
    path = tmp_path / "claims.safetensors"
    for tensors, message in (
        ({"x": torch.ones(3)}, "do not fit resnet101 4096x64-64-64: lacking conv1.weight"),
        ({"conv1.weight": torch.ones(3)}, r"conv1.weight is \(3,\); resnet101 4096x64-64-64 needs \(4096, 3, 7, 7\)"),
    ):
        save_file(tensors, path, {METADATA_KEY: claimed})
        with pytest.raises(ChainFileError, match=message):
            describe(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ChainFileError, match="is no file"):
        describe(tmp_path)


def test_a_damaged_chain_is_refused_as_one(saved: Callable[[Chain], Path]) -> None:
    path = saved(pico_chain())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ChainFileError, match=r"chain\.safetensors"):
        describe(path)


# --- the command


def test_the_command_prints_text_or_json(
    saved: Callable[[Chain], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def widthwise(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["widthwise", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    path = saved(pico_chain())
    assert widthwise("inspect", path) == (0, text_of(describe(path)) + "\n", "")
    status, out, _ = widthwise("inspect", path, "--json")
    assert (status, json.loads(out)) == (0, json.loads(json.dumps(describe(path))))
    (tmp_path / "notes.txt").write_text("mine")
    status, out, err = widthwise("inspect", tmp_path / "notes.txt")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "notes.txt: this is neither safetensors nor" in err


@pytest.mark.parametrize(
    ("tensor", "metadata", "message"),
    [
        (HOSTILE, None, r"the tensors (\x1b[2J\u202egnp\x07\n\x9b1mend)"),
        ("x", {METADATA_KEY: "{"}, f"is no usable network: {METADATA_KEY}: Invalid JSON"),
        ("x", {METADATA_KEY: '{"kind": "cook"}'}, "is no usable network: kind: Input should be"),
    ],
)
def test_a_refusal_is_one_line_whatever_the_file_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tensor: str,
    metadata: dict[str, str] | None,
    message: str,
) -> None:
    save_file({tensor: torch.ones(3)}, tmp_path / "strange", metadata)
    monkeypatch.setattr(sys, "argv", ["widthwise", "inspect", str(tmp_path / "strange")])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n"), message in err) == (2, "", 1, True)
    assert err.strip().isprintable()
