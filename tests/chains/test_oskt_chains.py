"""Weight chains of the OSKT authors: read, stored, and expanded to the students that their formulas make.

Channels of a student stand in another order here. The authors give every label its first channel, in label order, and
append the others as they are given out; a chain here keeps those of a label together. `Order` is that map: student
channels sorted by label, those of one label as the authors made them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.main import get_command

from app.cli import cli, main
from chains.architectures.vit import SIZES
from chains.artifact import load, save
from chains.chain import Chain, InputSpec
from chains.errors import ChainsError, CutError, NotCalibrated, WeightsRefused, WidthError
from chains.expand import student, student_weights
from chains.importers.oskt_chains import MAX_MATCHER_BYTES, Imported, Wanted, import_chain, import_files, read_matcher
from chains.importers.recognise import recognise
from chains.model import model_of
from chains.onnxfile import EmitOptions
from chains.onnxfile import write as write_onnx
from chains.width import Width
from tests.originals import oskt, vits
from tests.originals.oskt import Matcher, Shares, shared_out, shared_out_by_head
from tests.originals.state import State

RESNET = oskt.ResNetChain()  # 8 channels in the stem, 2 labels
TINY = SIZES["vit_tiny"]
HEADS, DIM, LABELS = TINY.heads, TINY.width, 4 * TINY.heads
TOY = vits.toy(
    "oskt",
    embed_dim=DIM,
    depth=TINY.depth,
    heads=HEADS,
    patch=TINY.patch,
    stride=TINY.patch,
    input=TINY.image,
)
VIT = oskt.VitChain(TOY, chain=LABELS)
VIT_WIDTHS = (LABELS, LABELS + HEADS, 2 * LABELS, DIM - HEADS, DIM)
RESNET_WANTED = Wanted("theirs", ("2", "4x2-3-4", "4", "6x2-4-6", "8"), 32, 16)
VIT_WANTED = Wanted("theirs", tuple(f"w{width}" for width in VIT_WIDTHS), *TINY.image)
RESNET_FILES = oskt.chain_checkpoint(RESNET, seed=0)
VIT_FILES = oskt.chain_checkpoint(VIT, seed=0)
Order = list[int]
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process; its status."""

    def status(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["widthwise", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return status


def copied(files: tuple[State, Matcher]) -> tuple[State, Matcher]:
    """The same, to be spoilt."""
    state, matcher = files
    return {name: tensor.clone() for name, tensor in state.items()}, json.loads(json.dumps(matcher))


def written(folder: Path, files: tuple[State, Matcher]) -> tuple[Path, Path]:
    """The two files as the authors have them."""
    state, matcher = folder / "resnet50_100.pth", folder / "gene_matcher.json"
    torch.save(files[0], state)
    matcher.write_text(json.dumps(files[1]))
    return state, matcher


def read(files: tuple[State, Matcher]) -> Imported:
    return import_chain(*files, RESNET_WANTED if files[0].keys() == RESNET_FILES[0].keys() else VIT_WANTED)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return stored(tmp_path_factory.mktemp("resnet"), RESNET_FILES, RESNET_WANTED)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return stored(tmp_path_factory.mktemp("vit"), VIT_FILES, VIT_WANTED)


def stored(folder: Path, files: tuple[State, Matcher], wanted: Wanted) -> Chain:
    """Read from files, saved, and loaded again."""
    made = import_files(*written(folder, files), wanted).chain
    written_down = save(made, folder / "chain.safetensors")
    loaded = load(folder / "chain.safetensors")
    assert loaded.digest == written_down.digest
    return loaded.chain


def order(shares: Shares) -> Order:
    """Our student channel -> theirs."""
    found: Order = np.argsort(shares.row_of, kind="stable").tolist()
    return found


def moved(tensor: Tensor, rows: Order, columns: Order | None = None) -> Tensor:
    return tensor[rows] if columns is None else tensor[rows][:, columns]


# ResNets.


def resnet_orders(width: Width) -> tuple[dict[str, Order], dict[str, Order | None]]:
    """Layer -> order of its rows, and of its columns, at a width."""
    matcher = RESNET_FILES[1]
    rows = {"conv1": order(shared_out(matcher["base.conv1"], width.stem))}
    columns: dict[str, Order | None] = {"conv1": None}
    inputs = rows["conv1"]
    for stage, blocks in enumerate(oskt.BLOCKS):
        inner = width.stage(stage)
        for index in range(blocks):
            block = f"layer{stage + 1}.{index}"
            sizes = {"conv1": inner, "conv2": inner, "conv3": inner * oskt.EXPANSION}
            found = {n: order(shared_out(matcher[f"base.{block}.{n}"], size)) for n, size in sizes.items()}
            rows |= {f"{block}.{name}": of for name, of in found.items()} | {f"{block}.downsample.0": found["conv3"]}
            columns |= {f"{block}.conv1": inputs, f"{block}.downsample.0": inputs}
            columns |= {f"{block}.conv2": found["conv1"], f"{block}.conv3": found["conv2"]}
            inputs = found["conv3"]
    return rows, columns


@pytest.mark.parametrize("text", RESNET_WANTED.ladder)
def test_a_resnet_s_students_are_the_authors_up_to_the_order_of_channels(resnet: Chain, text: str) -> None:
    width = Width.parse(text)
    theirs = oskt.student(RESNET, *RESNET_FILES, (width.stem, width.multipliers))  # type: ignore[arg-type] # three numbers
    rows, columns = resnet_orders(width)
    compared = 0
    for name, ours in student_weights(resnet, width).items():
        if name.startswith("neck."):
            continue
        layer = name.rsplit(".", 1)[0].replace("bn", "conv").replace("downsample.1", "downsample.0")
        wanted = moved(theirs[f"base.{name}"], rows[layer], columns[layer] if ours.ndim > 1 else None)
        np.testing.assert_allclose(ours, wanted.numpy(), rtol=0, atol=1e-6, err_msg=name)
        compared += 1
    assert compared == len(theirs) == 3 * 53  # weights, and weight and bias of each norm


def test_a_resnet_s_narrowest_neck_is_the_one_that_was_trained_with_it(resnet: Chain) -> None:
    neck = RESNET_FILES[0]["GeneNet_bottleneck.weight"]
    np.testing.assert_allclose(student_weights(resnet, Width(2))["neck.weight"], neck.numpy(), rtol=1e-6)


def test_norms_are_the_teacher_s_and_not_the_copies_in_the_chain() -> None:
    state, matcher = copied(RESNET_FILES)
    for name in state:
        if ".GeneChain." in name and ".bn" in name and name.endswith(("weight", "bias")):
            state[name] += 100
            twin = oskt._inside_its_block(name) if ".layer" in name else name
            state[twin] = state[name]
    changed, before = read((state, matcher)).chain, read(RESNET_FILES).chain
    assert all(np.array_equal(changed.tensors[name], tensor) for name, tensor in before.tensors.items())


# ViTs.


def vit_student_by_our_names(width: int, *, as_coded: bool) -> dict[str, Tensor]:
    """The authors' student with q, k and v apart, tokens and positions in one, and channels in our order."""
    state, matcher = VIT_FILES
    theirs, labels = oskt.student(VIT, state, matcher, width, as_coded=as_coded), matcher["o2g"]
    stream = order(shared_out(labels["dw_proj_fc2"], width))
    ours = {name: theirs[f"base.{name}"] for name in ("patch_embed.proj.weight", "patch_embed.proj.bias")}
    ours["dw.weight"] = moved(theirs["base.dw.weight"], stream)
    ours |= {f"norm.{kind}": moved(theirs[f"base.norm.{kind}"], stream) for kind in ("weight", "bias")}
    tokens = [theirs[f"base.{n}"][0, 0] for n in ("cls_token", "part_token1", "part_token2", "part_token3")]
    places = [theirs[f"base.{n}"][0, 0] for n in ("cls_pos", "part1_pos", "part2_pos", "part3_pos")]
    extra = [token + place for token, place in zip(tokens, places, strict=True)]
    ours["positions"] = torch.cat([torch.stack(extra), theirs["base.pos_embed"][0]]).T
    for index in range(VIT.vit.depth):
        block = f"blocks.{index}"
        inner = order(shared_out_by_head(labels[f"{block}.attn.q"], width, HEADS))
        hidden = order(shared_out(labels[f"{block}.mlp.fc1"], width * VIT.vit.mlp_ratio))
        axes = {"attn.q": (inner, stream), "attn.k": (inner, stream), "attn.v": (inner, stream)}
        axes |= {"attn.proj": (stream, inner), "mlp.fc1": (hidden, stream), "mlp.fc2": (stream, hidden)}
        thirds = {
            f"attn.{letter}.{kind}": theirs[f"base.{block}.attn.qkv.{kind}"].chunk(3)["qkv".index(letter)]
            for letter in "qkv"
            for kind in ("weight", "bias")
        }
        for layer, (rows, columns) in axes.items():
            for kind, own in (("weight", columns), ("bias", None)):
                name = f"{layer}.{kind}"
                tensor = thirds.get(name, theirs.get(f"base.{block}.{name}"))
                assert tensor is not None
                ours[f"{block}.{name}"] = moved(tensor, rows, own)
        for norm in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            ours[f"{block}.{norm}"] = moved(theirs[f"base.{block}.{norm}"], stream)
    return ours


@pytest.mark.parametrize("text", VIT_WANTED.ladder)
@pytest.mark.parametrize("projection_bias", ["chain", "teacher"])
def test_a_vit_s_students_are_the_authors_up_to_the_order_of_channels(text: str, projection_bias: Any) -> None:
    chain = import_chain(*VIT_FILES, replace(VIT_WANTED, projection_bias=projection_bias)).chain
    width = Width.parse(text)
    wanted = vit_student_by_our_names(width.stem, as_coded=projection_bias == "teacher")
    ours = {n: tensor for n, tensor in student_weights(chain, width).items() if not n.startswith("neck.")}
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, wanted[name].numpy(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("width", VIT_WIDTHS)
def test_a_vit_s_students_answer_what_the_authors_do(vit: Chain, width: int) -> None:
    images = torch.randn(3, 3, *TINY.image, generator=torch.Generator().manual_seed(1))
    theirs = oskt.student(VIT, *VIT_FILES, width)
    wanted = vits.embed(replace(VIT.vit, embed_dim=width), theirs, images)
    stream = order(shared_out(VIT_FILES[1]["o2g"]["dw_proj_fc2"], width))
    with torch.no_grad():
        feature, _ = model_of(vit.architecture, Width(width, ()), student_weights(vit, Width(width, ())))(images)
    both = [*stream, *(width + channel for channel in stream)]
    torch.testing.assert_close(feature, wanted[:, both], rtol=0, atol=1e-4)


def test_a_vit_s_narrowest_neck_is_that_of_the_class_token_and_the_mean_of_the_parts(vit: Chain) -> None:
    state, neck = VIT_FILES[0], student_weights(vit, Width(LABELS, ()))["neck.weight"]
    parts = torch.stack([state[f"bottleneck_{index}s.s1.weight"] for index in (1, 2, 3)]).mean(dim=0)
    wanted = torch.cat([state["bottlenecks.s1.weight"], parts])
    np.testing.assert_allclose(neck, wanted.numpy(), rtol=1e-6)


def test_the_image_size_and_the_stride_of_a_vit_follow_from_its_positions(vit: Chain) -> None:
    assert (vit.architecture, vit.teacher, vit.input) == (
        "vit_tiny_pass_dw",
        Width(DIM, ()),
        InputSpec(*TINY.image, (0.5,) * 3, (0.5,) * 3),
    )
    wide = oskt.VitChain(replace(VIT.vit, input=(32, 64)), chain=LABELS)
    found = import_chain(*oskt.chain_checkpoint(wide, 0), replace(VIT_WANTED, height=32, width=64))
    assert found.chain.architecture == "vit_tiny_pass_dw@32x64"


# What is said, and what is left out.


def test_the_report_counts_what_was_read_and_says_why_the_rest_was_not() -> None:
    found = read(RESNET_FILES)
    assert found.clusters == len(RESNET_FILES[1]) == 53
    assert found.matched == 3 * 53 + 2  # and the neck's two vectors
    assert found.matched + sum(found.ignored.values()) == len(RESNET_FILES[0])
    assert found.ignored["the chain's blocks a second time; compared, and the same"] > 0
    assert "not known to be in such a file" not in found.ignored
    vit = read(VIT_FILES)
    assert vit.matched + sum(vit.ignored.values()) == len(VIT_FILES[0])
    assert "not known to be in such a file" not in vit.ignored
    assert "mean of three" in vit.notes[-1]


def test_a_chain_that_was_read_serves_nothing_before_it_is_calibrated(resnet: Chain) -> None:
    assert not resnet.statistics
    with pytest.raises(NotCalibrated, match="no normalisation statistics"):
        student(resnet, Width(2))


@pytest.mark.parametrize(
    ("files", "ladder", "size"),
    [(RESNET_FILES, "2,4x2-3-4", "32x16"), (VIT_FILES, ",".join(VIT_WANTED.ladder[:2]), "{}x{}".format(*TINY.image))],
    ids=["resnet", "vit"],
)
def test_the_command_writes_a_chain_that_can_be_calibrated_and_emitted(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: tuple[State, Matcher], ladder: str, size: str
) -> None:
    out, ready = tmp_path / "theirs.safetensors", tmp_path / "ready.safetensors"
    arguments = [*map(str, written(tmp_path, files)), "--ladder", ladder, "--input", size, "--out", str(out)]
    assert run("import-chain", *arguments) == 0
    said = capsys.readouterr().out
    assert "not calibrated: no width is served" in said
    assert load(out).digest in said
    data = tmp_path / "data.toml"
    data.write_text('[data]\nkind = "synthetic"\npeople = { train_identities = 64, test_identities = 4 }\n')
    assert run("calibrate", str(out), "--data", str(data), "--out", str(ready), "--images", "256") == 0
    chain = load(ready)
    assert set(chain.chain.statistics) == set(chain.chain.ladder)
    assert write_onnx(chain, chain.chain.ladder[1], EmitOptions())


def test_the_command_overwrites_nothing_and_names_bad_options(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [*map(str, written(tmp_path, RESNET_FILES)), "--ladder", "2,8"]
    out = tmp_path / "theirs.safetensors"
    for wrong, reason in (
        (("--input", "32"), "as in 256x128"),
        (("--projection-bias", "ours"), "chain and teacher"),
        (("--name", "No Name"), "name"),
    ):
        assert run("import-chain", *files, "--out", str(out), *wrong) == 2
        assert reason in capsys.readouterr().err
        assert not out.exists()
    out.write_bytes(b"old")
    assert run("import-chain", *files, "--out", str(out)) == 2
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("ladder", "error", "reason"),
    [
        (("1", "8"), CutError, "no cut below 2"),
        (("2x1-4-8", "8"), CutError, "no cut below"),
        (("2", "16"), WidthError, "the teacher 8x2-4-8 has 8"),
        (("8", "2"), ChainsError, "narrow to wide"),
        (("2", "wide"), WidthError, "is no width"),
        (("w8",), WidthError, "no width of resnet50"),
    ],
)
def test_a_ladder_that_the_chain_cannot_give_is_refused(
    ladder: tuple[str, ...], error: type[ChainsError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        import_chain(*RESNET_FILES, replace(RESNET_WANTED, ladder=ladder))


# What is refused.

Spoil = Callable[[State, Matcher], object]


def relabelled(key: str, change: Callable[[list[Any]], Any]) -> Spoil:
    def spoil(state: State, matcher: Matcher) -> None:
        labels = matcher.get("o2g", matcher)
        labels[key] = change(labels[key])

    return spoil


def without(name: str) -> Spoil:
    return lambda state, _: state.__delitem__(name)


def without_both(name: str) -> Spoil:
    """Without a tensor that the file has twice."""
    return lambda state, _: [state.pop(each) for each in (name, oskt._inside_its_block(name))]


def put(name: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda state, _: state.update({name: change(state[name])})


def with_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


def swapped(labels: Sequence[int]) -> list[int]:
    """The first and the last channel that have different labels, exchanged."""
    other = next(index for index, label in enumerate(labels) if label != labels[0])
    return [labels[other], *labels[1:other], labels[0], *labels[other + 1 :]]


CONV3, GENE = "base.layer2.1.conv3", "base.GeneChain.layer2.1.conv2.weight"
RESNET_SPOILT: Mapping[str, tuple[Spoil, str]] = {
    "tied layers": (
        relabelled(CONV3, swapped),
        "'base.layer2.1.conv3' and 'base.layer2.0.conv3' write the same channels",
    ),
    "too few labels": (relabelled(CONV3, lambda found: found[1:]), "has 63 labels; the layer has 64 rows"),
    "negative": (relabelled(CONV3, lambda found: [-1, *found[1:]]), r"'base.layer2.1.conv3'\[0\] is -1; labels are"),
    "huge": (relabelled(CONV3, lambda found: [10**30, *found[1:]]), "whole numbers below 64"),
    "a word": (relabelled(CONV3, lambda found: ["a", *found[1:]]), r"\[0\] is a; labels are whole numbers"),
    "true": (relabelled(CONV3, lambda found: [True, *found[1:]]), r"\[0\] is True"),
    "a label too many": (relabelled("base.layer2.1.conv2", lambda f: [5, *f[1:]]), "labels up to 5, but no row has"),
    "nested": (relabelled(CONV3, lambda found: [found]), "has 1 labels"),
    "an object": (relabelled(CONV3, lambda found: {"0": found}), "holds a dict"),
    "other clusters": (
        relabelled("base.layer2.1.conv2", lambda f: [0] * len(f)),
        r"has shape \(4, 16, 3, 3\).*\(1, 16, 3, 3\)",
    ),
    "a key too many": (lambda _, m: m.update({"base.layer5.0.conv1": [0]}), "'base.layer5.0.conv1', which no layer"),
    "no stem": (lambda _, m: m.pop("base.conv1"), "no ResNet's; their lengths are 'base.conv1' 0"),
    "no multiples": (relabelled("base.layer3.0.conv1", lambda f: f[1:]), "'base.layer3.0.conv1' 31"),
    "no rows": (
        without_both(GENE),
        f"{GENE} is missing; in a chain of resnet50 8x2-4-8 with these labels it has shape",
    ),
    "transposed": (
        put("base.GeneChain.conv1.weight", lambda t: t.transpose(0, 1)),
        r"has shape \(3, 2, 7, 7\).*\(2, 3, 7, 7\)",
    ),
    "no norm": (without("base.layer1.0.bn1.weight"), "base.layer1.0.bn1.weight is missing"),
    "nan": (put("base.bn1.bias", with_nan), r"base.bn1.bias\[3\] is nan"),
    "nan in the chain": (put("base.GeneChain.conv1.weight", with_nan), "the weights hold NaN or infinity"),
    "whole numbers": (put("base.bn1.bias", lambda t: t.to(torch.int64)), "weights are floating-point numbers"),
    "two versions": (
        put("base.layer2.1.Gene_Bottleneck.conv2.weight", lambda t: t + 1),
        "one tensor in the authors' chains, and differ",
    ),
    "half a twin": (without("base.GeneChain.layer2.1.trans_conv2.weight"), "and differ in this file"),
    "no neck": (without("GeneNet_bottleneck.weight"), r"GeneNet_bottleneck.weight is missing.*\(64,\)"),
    "a longer neck": (put("GeneNet_bottleneck.weight", lambda t: t.repeat(2)), r"has shape \(128,\).*\(64,\)"),
    "a teacher alone": (without("base.GeneChain.conv1.weight"), "so it is no weight chain of the OSKT authors'"),
}
QUERY, JOINED, FC1 = "blocks.1.attn.q", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"


def heads_exchanged(_: State, matcher: Matcher) -> None:
    """The first head has the labels of the last, and the last those of the first; q, k, v and qkv agree."""
    labels = matcher["o2g"]
    size = DIM // HEADS
    found = labels[QUERY]
    for letter in "qkv":
        labels[f"blocks.1.attn.{letter}"] = [*found[-size:], *found[size:-size], *found[:size]]
    labels[JOINED] = [label + LABELS * third for third in range(3) for label in labels[QUERY]]


def capped(labels: Sequence[int]) -> list[int]:
    """The two highest labels are one."""
    return [min(label, max(labels) - 1) for label in labels]


VIT_SPOILT: Mapping[str, tuple[Spoil, str]] = {
    "no o2g": (lambda _, m: m.pop("o2g"), "no object 'o2g'"),
    "o2g is a list": (lambda _, m: m.update({"o2g": [1]}), "no object 'o2g'"),
    "keys differ": (relabelled("blocks.1.attn.k", swapped), f"'blocks.1.attn.k' and '{QUERY}' write the same channels"),
    "fc2 differs": (relabelled("blocks.2.mlp.fc2", swapped), "'blocks.2.mlp.fc2' and 'dw_proj_fc2' write the same"),
    "joined differs": (relabelled(JOINED, swapped), f"is not '{QUERY}' three times, each {LABELS} labels"),
    "labels of another head": (
        heads_exchanged,
        f"{LABELS} labels for {HEADS} heads, and those of head 0 are not 0 to 3",
    ),
    "fewer labels": (relabelled(FC1, capped), rf"has shape \({4 * LABELS}, {DIM}\).*\({4 * LABELS - 1}, {DIM}\)"),
    "an unknown layer": (lambda _, m: m["o2g"].update({"blocks.4.mlp.fc1": [0]}), "'blocks.4.mlp.fc1', which no layer"),
    "no bias": (without("base.blocks.1.attn.qkv_bias_gene"), rf"qkv_bias_gene is missing.*\({3 * DIM},\)"),
    "no token": (without("base.part_token2"), "base.part_token2 is missing"),
    "other positions": (put("base.pos_embed", lambda t: t[:, 1:]), "makes 35 tokens, and of those tried .* 36"),
    "another width": (put("base.cls_token", lambda t: t[..., 1:]), f"this ViT has {DIM - 1} channels, 4 blocks"),
    "a number as token": (put("base.cls_token", lambda t: t.sum()), r"base.cls_token has shape \(\).*\(1, 1, any\)"),
    "nan": (put("base.dw_weight_gene", with_nan), r"base.dw_weight_gene\[0, 3\] is nan"),
    "no neck": (without("bottleneck_2s.s1.bias"), rf"bottleneck_2s.s1.bias is missing.*\({LABELS},\)"),
}


@pytest.mark.parametrize("case", RESNET_SPOILT)
def test_a_resnet_s_chain_that_does_not_fit_is_refused_with_the_first_mismatch(case: str) -> None:
    refuse(RESNET_FILES, *RESNET_SPOILT[case], RESNET_WANTED)


@pytest.mark.parametrize("case", VIT_SPOILT)
def test_a_vit_s_chain_that_does_not_fit_is_refused_with_the_first_mismatch(case: str) -> None:
    refuse(VIT_FILES, *VIT_SPOILT[case], VIT_WANTED)


def refuse(files: tuple[State, Matcher], spoil: Spoil, reason: str, wanted: Wanted) -> None:
    state, matcher = copied(files)
    spoil(state, matcher)
    with pytest.raises(WeightsRefused, match=reason):
        import_chain(state, matcher, wanted)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe{}", "is no JSON"),
        (b"[" * 1_000_000, "is no JSON"),
        (b'{"a":' * 1_000_000, "is no JSON"),
        (b'{"base.conv1": [1' + b"0" * 5000 + b"]}", "is no JSON"),
        (b'{"base.conv1": [0], "base.conv1": [1]}', "'base.conv1' is in it twice"),
        (b"[0, 1]", "holds a list"),
        (b"3", "holds a int"),
        (b" " * (MAX_MATCHER_BYTES + 1), "bytes; those of the largest"),
    ],
    ids=["empty", "cut", "no text", "deep lists", "deep objects", "long number", "twice", "list", "number", "large"],
)
def test_a_matcher_that_is_none_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "gene_matcher.json"
    path.write_bytes(content)
    with pytest.raises(WeightsRefused, match=reason):
        read_matcher(path)


def test_the_state_is_never_unpickled(tmp_path: Path) -> None:
    state, matcher = written(tmp_path, RESNET_FILES)
    torch.save({"base.conv1.weight": RESNET_WANTED}, state)
    with pytest.raises(WeightsRefused, match="can run code when loaded"):
        import_files(state, matcher, RESNET_WANTED)


def test_the_page_names_commands_and_options_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "import-a-chain.md").read_text()
    commands = get_command(cli).commands  # type: ignore[attr-defined] # a group
    lines = re.findall(r"^widthwise (\S+) (.*)$", page, re.MULTILINE)
    assert [name for name, _ in lines] == ["import-chain", "import-chain", "calibrate", "evaluate", "finetune"]
    for name, rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known


def test_the_file_of_a_chain_also_gives_its_teacher() -> None:
    """With the stem's ReLU, which BoT lacks under the same names; the chain beside it is left out, and said."""
    state, _ = oskt.chain_checkpoint(RESNET, 0)
    found = recognise(state)
    assert (found.model.table.name, found.toolkit) == ("resnet50", "OSKT")
    assert any("import-chain" in why for why in found.ignored)


def test_two_files_in_the_wrong_order_are_told_by_name(tmp_path: Path) -> None:
    state, matcher = written(tmp_path, RESNET_FILES)
    with pytest.raises(WeightsRefused, match=f"^{matcher}: this is neither safetensors nor a torch file"):
        import_files(matcher, state, RESNET_WANTED)
