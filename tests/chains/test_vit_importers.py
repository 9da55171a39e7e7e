"""Vision transformers of other projects answer here as their own definitions do, or are refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chains.architectures.vit import SIZES
from chains.chain import InputSpec
from chains.errors import ChainFileError, WeightsRefused
from chains.export import load_trained, read_exported
from chains.importers.check import Declared, answer, check
from chains.importers.pretraining import read_start
from chains.importers.recognise import recognise
from chains.importers.schemes import identity_neck
from chains.model import numpy_tensors
from tests.originals import oskt, vits
from tests.originals.state import Shapes, State, data_parallel
from tests.originals.vits import Kind, Vit

TINY = SIZES["vit_tiny"]
PEOPLE = 7


def tiny(kind: Kind, **changes: Any) -> Vit:
    """A network of the sizes of our vit_tiny."""
    sizes = {"embed_dim": TINY.width, "depth": TINY.depth, "heads": TINY.heads, "patch": TINY.patch}
    return vits.toy(kind, **{**sizes, "stride": TINY.patch, "input": TINY.image, "identities": PEOPLE, **changes})


def images(count: int = 3, size: tuple[int, int] = TINY.image) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def saved(state: Any, folder: Path) -> Path:
    path = folder / "transformer_120.pth"
    torch.save(state, path)
    return path


def empty(shapes: Shapes) -> State:
    """Tensors of these shapes that need no memory: for refusals that look at no value."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


# What is accepted.


@dataclass(frozen=True)
class Case:
    """toolkit, architecture: what it is found to be. branches: which of its answers is our embedding."""

    vit: Vit
    toolkit: str
    architecture: str
    branches: Any = "all"
    wrap: Callable[[State], State] = dict
    neck: bool = True


CASES = {
    "TransReID": Case(tiny("transreid", neck_feat="after"), "TransReID", "vit_tiny", wrap=data_parallel),
    "TransReID JPM": Case(tiny("transreid", jpm=True, neck_feat="after"), "TransReID (JPM)", "vit_tiny", "global"),
    "TransReID-SSL": Case(tiny("transreid-ssl", neck_feat="after"), "TransReID", "vit_tiny"),
    "TransReID-SSL JPM": Case(
        tiny("transreid-ssl", jpm=True, neck_feat="after"), "TransReID (JPM)", "vit_tiny", "global"
    ),
    "PASS, one neck": Case(tiny("pass", multi_neck=False, neck_feat="after"), "PASS", "vit_tiny_pass"),
    "PASS": Case(tiny("pass"), "PASS", "vit_tiny_pass", neck=False),
    "OSKT": Case(tiny("oskt"), "OSKT", "vit_tiny_pass", neck=False),
    "OSKT, one neck": Case(tiny("oskt", multi_neck=False, neck_feat="after"), "OSKT", "vit_tiny_pass"),
    "fast-reid": Case(tiny("fast-reid"), "fast-reid", "vit_tiny"),
    "another image": Case(
        tiny("transreid", input=(256, 128), neck_feat="after"), "TransReID", "vit_tiny@256x128", wrap=data_parallel
    ),
}


def test_who_states_the_size_alone_gets_the_toolkit_s_mean_and_std(tmp_path: Path) -> None:
    vit = tiny("transreid", neck_feat="after")
    path = saved(vits.saved(vit, vits.checkpoint(vit, seed=0)), tmp_path)
    size = {"height": vit.input[0], "width": vit.input[1]}
    found = check(path, Declared.parse({"input": size}))
    assert found["input"] == {**size, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert found["notes"][-1] == "nobody stated mean and std, so the file's were taken"
    stated = {**size, "mean": [0.1] * 3, "std": [0.2] * 3}
    assert check(path, Declared.parse({"input": stated}))["input"] == stated


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_in_its_own_wrapping_answers_as_its_project_defines(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    state = vits.checkpoint(case.vit, seed=0)
    path = saved(vits.saved(case.vit, case.wrap(state)), tmp_path)
    report = check(path, Declared(), tmp_path / "teacher.safetensors")
    assert (report["toolkit"], report["architecture"], report["width"]) == (
        case.toolkit,
        case.architecture,
        f"w{TINY.width}",
    )
    assert report["neck"] == ("own" if case.neck else "identity")
    assert (report["input"]["height"], report["input"]["width"]) == case.vit.input
    assert report["input"]["mean"] == report["input"]["std"] == [0.5] * 3
    shown = images(size=case.vit.input)
    embedding = read_exported(tmp_path / "teacher.safetensors").model.embed(shown)
    wanted = vits.embed(case.vit, state, shown, branches=case.branches)
    torch.testing.assert_close(embedding, wanted, rtol=0, atol=1e-4)


def test_a_vit_s_of_overlapping_patches_answers_as_transreid_defines() -> None:
    """At its published width and depth, in images of 3 × 2 patches."""
    vit = Vit("transreid", stride=12, input=(40, 28), neck_feat="after", identities=PEOPLE)
    state = vits.checkpoint(vit, seed=0)
    found = recognise(state, "vit_small_s12@40x28")
    assert (found.model.table.name, str(found.model.width)) == ("vit_small_s12@40x28", "w384")
    shown = images(2, vit.input)
    torch.testing.assert_close(found.model.embed(shown), vits.embed(vit, state, shown), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "vit_small"),
        ({"stride": 12}, "vit_small_s12"),
        ({"input": (384, 128)}, "vit_small@384x128"),
        ({"input": (384, 128), "stride": 12}, "vit_small_s12@384x128"),
        ({"input": (224, 224)}, "vit_small@224x224"),
    ],
)
def test_stride_and_size_of_published_networks_follow_from_their_positions(
    changes: dict[str, Any], architecture: str
) -> None:
    state = {name: torch.zeros(shape) for name, shape in vits.shapes(replace(Vit("transreid"), **changes)).items()}
    assert recognise(state).model.table.name == architecture


@pytest.mark.parametrize("heads", [3, 4])
def test_of_another_width_the_number_of_heads_is_that_of_the_stated_architecture(heads: int) -> None:
    """A file does not say how many heads it has: of 4 it would be read as of 3."""
    vit = tiny("transreid", embed_dim=48, heads=heads, neck_feat="after")
    state = vits.checkpoint(vit, seed=0)
    with pytest.raises(WeightsRefused, match="this ViT has 48 channels, 4 blocks and patches of 8"):
        recognise(state)
    found = recognise(state, "vit_tiny")
    assert str(found.model.width) == "w48"
    close = torch.allclose(found.model.embed(images()), vits.embed(vit, state, images()), atol=1e-4)
    assert close == (heads == TINY.heads)


@pytest.mark.parametrize("identities", [1, 751, 1000])
def test_a_classifier_of_any_size_is_kept(identities: int, tmp_path: Path) -> None:
    vit = tiny("transreid", identities=identities)
    state = vits.checkpoint(vit, seed=0)
    assert check(saved(state, tmp_path), Declared(), tmp_path / "t.safetensors")["identities"] == identities
    assert torch.equal(load_trained(tmp_path / "t.safetensors").classifier, state["classifier.weight"])


def test_a_classifier_of_another_embedding_is_left_out_and_said() -> None:
    state = vits.checkpoint(tiny("transreid"), seed=0)
    state["classifier.weight"] = torch.zeros(PEOPLE, 5)
    found = recognise(state)
    assert found.classifier is None
    assert any("reads no embedding of" in note for note in found.notes)


@pytest.mark.parametrize("camera", [0, 1, 2])
def test_side_information_of_one_camera_is_folded_exactly(camera: int) -> None:
    vit = tiny("transreid", cameras=3, neck_feat="after")
    state = vits.checkpoint(vit, seed=0)
    own = {**state, "base.sie_embed": state["base.sie_embed"][camera : camera + 1]}
    wanted = vits.embed(vit, state, images(), camera=camera)
    torch.testing.assert_close(recognise(own).model.embed(images()), wanted, rtol=0, atol=1e-4)


def test_side_information_of_several_cameras_is_their_mean_and_said() -> None:
    vit = tiny("transreid", cameras=3, views=2, neck_feat="after")
    state = vits.checkpoint(vit, seed=0)
    found = recognise(state)
    mean = {**state, "base.sie_embed": state["base.sie_embed"].mean(dim=0, keepdim=True)}
    wanted = vits.embed(vit, mean, images())
    torch.testing.assert_close(found.model.embed(images()), wanted, rtol=0, atol=1e-4)
    assert any("mean over 6 cameras or views, times 3.0" in note for note in found.notes)


def test_the_last_block_of_a_jigsaw_file_is_that_of_its_global_branch() -> None:
    """`base.blocks` has one more, of the same shapes, that nothing reads."""
    state = vits.checkpoint(tiny("transreid", jpm=True), seed=0)
    found = recognise(state)
    ours, block = numpy_tensors(found.model), f"blocks.{TINY.depth - 1}.mlp.fc1.weight"
    assert np.array_equal(ours[block], state["b1.0.mlp.fc1.weight"].numpy())
    assert np.array_equal(ours["norm.weight"], state["b1.1.weight"].numpy())
    why = dict(entry.split(": ", 1) for entry in found.ignored)
    assert why[f"base.{block}"] == "the global branch has a last block and a norm of its own (b1)"
    assert "local branch" in why["b2.0.mlp.fc1.weight"]
    assert found.matched + len(found.ignored) == len([name for name in state if not name.endswith("tracked")])


def test_four_necks_are_left_out_with_the_classifier_that_reads_them() -> None:
    found = recognise(vits.checkpoint(tiny("pass"), seed=0))
    assert not found.neck
    assert found.classifier is None
    assert any(entry.startswith("classifier.weight: left out") for entry in found.ignored)
    assert any("four batch norms make no single one" in note for note in found.notes)


def test_the_projection_of_a_teacher_of_the_authors_is_folded_also_when_it_is_far_from_the_identity() -> None:
    vit = tiny("oskt")
    state = vits.checkpoint(vit, seed=0)
    state["base.dw.weight"] = torch.randn(TINY.width, TINY.width, generator=torch.Generator().manual_seed(2)) / 5
    feature, _ = recognise(state).model(images())
    torch.testing.assert_close(feature, vits.embed(vit, state, images()), rtol=0, atol=1e-4)


def test_the_teacher_beside_a_weight_chain_is_read_alone() -> None:
    vit = tiny("oskt")
    state, _ = oskt.chain_checkpoint(oskt.VitChain(vit, 12), seed=0)
    found = recognise(state)
    feature, _ = found.model(images())
    torch.testing.assert_close(feature, vits.embed(vit, state, images()), rtol=0, atol=1e-4)
    why = dict(entry.split(": ", 1) for entry in found.ignored)
    assert "widthwise import-chain" in why["base.dw_weight_gene"]
    assert "outside the network: nothing of the embedding reads it" not in why.values()


def test_a_neck_without_a_bias_has_none() -> None:
    state = vits.checkpoint(tiny("transreid"), seed=0)
    del state["bottleneck.bias"]
    found = recognise(state)
    assert found.missing == ("bottleneck.bias: absent; taken as zeros",)
    assert not found.model.neck.bias.any()


def test_a_network_without_a_neck_answers_its_feature() -> None:
    vit = tiny("transreid")
    state = {name: t for name, t in vits.checkpoint(vit, seed=0).items() if not name.startswith("bottleneck")}
    found = recognise(state)
    assert not found.neck
    feature, _ = found.model(images())
    identity_neck(found.model, feature)
    torch.testing.assert_close(found.model.embed(images()), vits.embed(vit, state, images()), rtol=0, atol=1e-4)


def test_the_report_says_on_which_side_of_the_neck_the_embedding_is() -> None:
    notes = recognise(vits.checkpoint(tiny("transreid"), seed=0)).notes
    assert any("behind the neck; these projects' published figures are of the feature before it" in n for n in notes)


# ImageNet: to begin with.


@pytest.mark.parametrize("kind", ["timm", "deit-distilled"])
def test_weights_of_imagenet_are_no_teacher(kind: Kind, tmp_path: Path) -> None:
    vit = tiny(kind)
    report = answer(saved(vits.saved(vit, vits.checkpoint(vit, 0)), tmp_path), Declared())
    assert report["state"] == "refused"
    assert "never trained to tell people apart" in report["reason"]


def test_weights_of_imagenet_are_something_to_begin_with(tmp_path: Path) -> None:
    vit = tiny("timm")
    state = vits.checkpoint(vit, seed=0)
    feature, _ = read_start(saved(state, tmp_path), "vit_tiny")(images())
    torch.testing.assert_close(feature, vits.embed(vit, state, images()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["timm", "deit-distilled"])
def test_positions_of_a_square_are_resized_to_the_stated_image(kind: Kind, tmp_path: Path) -> None:
    square = tiny(kind, input=(48, 48))  # 6 × 6 patches
    state = vits.checkpoint(square, seed=0)
    started = read_start(saved(vits.saved(square, state), tmp_path), "vit_tiny")
    positions = (
        state["pos_embed"] if kind == "timm" else torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], 1)
    )
    wanted = vits.resized_positions(positions, (6, 6), tiny(kind).grid)[0]
    wanted[0] += state["cls_token"][0, 0]
    np.testing.assert_allclose(numpy_tensors(started)["positions"], wanted.T.numpy(), rtol=0, atol=1e-6)


def test_positions_that_are_no_square_are_not_resized(tmp_path: Path) -> None:
    vit = tiny("timm", input=(40, 16))  # 5 × 2 patches
    with pytest.raises(ChainFileError, match="10 patches, which is no square to be resized to 8×4"):
        read_start(saved(vits.checkpoint(vit, 0), tmp_path), "vit_tiny")


# What is refused.

Spoil = Callable[[State], object]


def put(name: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda state: state.update({name: change(state[name])})


def with_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


DIM, QKV = TINY.width, "base.blocks.1.attn.qkv"
SPOILT: dict[str, tuple[Spoil, str]] = {
    "missing": (
        lambda state: state.pop("base.blocks.1.norm2.bias"),
        rf"base.blocks.1.norm2.bias is missing; in vit_tiny of width w{DIM} it has shape \({DIM},\)",
    ),
    "no bias of qkv": (lambda state: state.pop(f"{QKV}.bias"), rf"{QKV}.bias is missing.*\({3 * DIM},\)"),
    "another shape": (
        put(f"{QKV}.weight", lambda t: t[:-1]),
        rf"{QKV}.weight has shape \({3 * DIM - 1}, {DIM}\); in vit_tiny of width w{DIM} it has \({3 * DIM}, {DIM}\)",
    ),
    "a narrower MLP": (
        put("base.blocks.0.mlp.fc1.weight", lambda t: t[: 3 * DIM]),
        rf"\({3 * DIM}, {DIM}\).*\({4 * DIM}, {DIM}\)",
    ),
    "another neck": (put("bottleneck.weight", lambda t: t[:5]), rf"bottleneck.weight has shape \(5,\).*\({DIM},\)"),
    "unknown layer": (
        lambda state: state.update({"base.blocks.0.extra.weight": torch.zeros(3)}),
        r"base.blocks.0.extra.weight of shape \(3,\) is unknown to vit_tiny",
    ),
    "layer scale": (
        lambda s: s.update({"base.blocks.0.ls1.gamma": torch.zeros(DIM)}),
        r"is a scale of a layer \(LayerScale\)",
    ),
    "norm of queries": (
        lambda s: s.update({"base.blocks.0.attn.q_norm.weight": torch.zeros(32)}),
        "a norm of queries or keys",
    ),
    "fcneck": (lambda s: s.update({"fcneck.weight": torch.zeros(512, DIM)}), "a layer that shortens the embedding"),
    "positions": (put("base.pos_embed", lambda t: t[:, :-1]), "makes 32 tokens, and of those tried vit_tiny 33"),
    "nan": (put(f"{QKV}.bias", with_nan), rf"{QKV}.bias\[3\] is nan: the weights hold NaN"),
    "negative variance": (put("bottleneck.running_var", lambda t: -t), "no variance can be"),
    "whole numbers": (put(f"{QKV}.bias", lambda t: t.to(torch.int64)), "weights are floating-point numbers"),
    "an axis too many": (put("base.cls_token", lambda t: t[None]), r"\(1, 1, 1, \d+\).*\(1, 1, any\)"),
    "another patch": (
        put("base.patch_embed.proj.weight", lambda t: t[..., :7]),
        "patches of 7, and those of this version",
    ),
    "a block less": (lambda s: [s.pop(n) for n in list(s) if ".blocks.3." in n], "3 blocks and patches of 8"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_does_not_fit_is_refused_with_the_first_mismatch(case: str) -> None:
    spoil, reason = SPOILT[case]
    state = vits.checkpoint(tiny("transreid"), seed=0)
    spoil(state)
    with pytest.raises(WeightsRefused, match=reason):
        recognise(state)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (empty(vits.shapes(tiny("transreid-ssl", stem=True, patch=8))), "convolutional patch embedding .the ICS stem"),
        (empty(vits.shapes(vits.old_small("transreid"))), "768 channels, 8 blocks.*once called small.*768.-0.5"),
        (empty(vits.shapes(vits.old_small("fast-reid"))), "768 channels, 8 blocks.*once called small"),
        (empty(vits.swin_shapes()), "Swin transformer's windows"),
        (vits.checkpoint(tiny("pass", multi_neck=False, fusion="mean"), 0), "PASS with mean fusion"),
    ],
    ids=["ICS", "old small", "old small of fast-reid", "Swin", "mean fusion"],
)
def test_another_network_is_refused_by_name(state: State, reason: str) -> None:
    with pytest.raises(WeightsRefused, match=reason):
        recognise(state)


def test_a_reduced_embedding_of_fastreid_is_refused_by_name() -> None:
    state = vits.checkpoint(tiny("fast-reid"), seed=0)
    state["heads.bottleneck.1.running_mean"] = torch.zeros(64)
    with pytest.raises(WeightsRefused, match="a layer that shortens the embedding"):
        recognise(state)


def test_another_architecture_than_was_stated_is_refused(tmp_path: Path) -> None:
    path = saved(vits.checkpoint(tiny("transreid"), 0), tmp_path)
    for stated in ("vit_tiny@32x16", "vit_tiny_pass", "resnet50"):
        assert f"registered as {stated}, and the file holds vit_tiny" in answer(path, Declared(stated))["reason"]
    spec = InputSpec(128, 64, (0.5,) * 3, (0.5,) * 3)
    assert "is for images of 64×32" in answer(path, Declared(input=spec))["reason"]


@pytest.mark.parametrize("kind", ["transreid", "oskt"])
def test_no_tensor_of_a_senseless_shape_ends_in_anything_but_a_refusal(kind: Kind) -> None:
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda tensor: tensor.reshape(-1)[0],
        lambda tensor: tensor[:0],
        lambda tensor: tensor.reshape(-1),
        lambda tensor: tensor[None],
    )
    state = vits.checkpoint(tiny(kind, cameras=3 if kind == "transreid" else 0), seed=0)
    deeper = tuple(f".blocks.{index}." for index in range(1, TINY.depth))
    names = [n for n in state if not any(block in n for block in deeper) and not n.endswith("tracked")]
    for name in names:
        for change in changes:
            reason = refused({**state, name: change(state[name])})
            assert reason is None or name.rsplit(".", 1)[0] in reason or "this ViT has" in reason


def refused(state: State) -> str | None:
    try:
        recognise(state)
    except WeightsRefused as refusal:
        return str(refusal)
    return None
