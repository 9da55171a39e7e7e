"""Checkpoints of other projects, in their own names and shapes, answer here as their own definitions do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from chains.artifact import dump, load
from chains.chain import InputSpec
from chains.cost import value_shapes
from chains.errors import ChainFileError, WeightsRefused
from chains.export import origin, read_exported, save_network
from chains.importers.check import Declared, answer, check
from chains.importers.containers import read_safetensors, read_torch, sniff
from chains.importers.pretraining import read_start
from chains.importers.recognise import recognise
from chains.importers.schemes import Recognised, identity_neck
from chains.model import ReIDModel, load_student
from chains.onnxfile import write
from chains.testing import pico_chain
from chains.width import Width
from tests.originals import bot, fastreid, imagenet, layers, msinet, torchreid
from tests.originals.state import State, batch_norm, data_parallel, linear, random_state

INPUT = InputSpec(64, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PEOPLE = 7
STEM = 8


@dataclass(frozen=True)
class Case:
    """A toolkit's checkpoint. make: its tensors; wrap: what its training saves around them; embed: its answer to
    images, 0 to 1 and normalised, or 0 to 255 (`takes_pixels`)."""

    toolkit: str
    architecture: str
    make: Callable[[], State]
    embed: Callable[[State, Tensor], Tensor]
    wrap: Callable[[State], Any] = dict
    neck: bool = True
    takes_pixels: bool = False
    has_classifier: bool = True


def of_torchreid(name: str, architecture: str, **options: Any) -> Case:
    return Case(
        "torchreid",
        architecture,
        lambda: torchreid.checkpoint(name, identities=PEOPLE, **options),
        torchreid.embed,
        lambda state: torchreid.training_file(data_parallel(state)),
        neck=False,
    )


def of_fastreid(depth: str, architecture: str, **options: Any) -> Case:
    def embed(state: State, images: Tensor) -> Tensor:
        return fastreid.embed(state, images, padded_pool=options.get("head") == "bnneck")

    return Case(
        "fast-reid",
        architecture,
        lambda: fastreid.checkpoint(depth, identities=PEOPLE, stem=STEM, **options),
        embed,
        fastreid.training_file,
        takes_pixels=True,
    )


def of_bot(name: str, architecture: str, **options: Any) -> Case:
    make = lambda: bot.checkpoint(name, identities=PEOPLE, stem=STEM, **options)  # noqa: E731
    return Case("BoT", architecture, make, bot.embed, neck="neck" not in options)


def fastreid_osnet() -> State:
    """torchreid's OSNet without its reduction, in fast-reid's head."""
    whole = torchreid.checkpoint("osnet_x1_0", identities=PEOPLE)
    kept = {name: tensor for name, tensor in whole.items() if not name.startswith(("fc.", "classifier."))}
    head = batch_norm("heads.bottleneck.0", 512) | linear("heads", PEOPLE, 512, bias=False)
    return {f"backbone.{name}": tensor for name, tensor in kept.items()} | random_state(head, 1)


def embed_fastreid_osnet(state: State, images: Tensor) -> Tensor:
    backbone = {n.removeprefix("backbone."): tensor for n, tensor in state.items() if n.startswith("backbone.")}
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (fastreid.PIXEL_MEAN, fastreid.PIXEL_STD))
    feature = layers.average(torchreid._osnet_map(backbone, (images - mean) / std))
    return layers.batch_norm(state, "heads.bottleneck.0", feature)


CASES = {
    "torchreid resnet18": of_torchreid("resnet18", "resnet18_stride2", stem=STEM),
    "torchreid resnet34": of_torchreid("resnet34", "resnet34_stride2", stem=STEM),
    "torchreid resnet50": of_torchreid("resnet50", "resnet50_stride2", stem=STEM),
    "torchreid resnet101": of_torchreid("resnet101", "resnet101_stride2", stem=STEM),
    "torchreid resnet50_ibn_a": of_torchreid("resnet50_ibn_a", "resnet50_ibn_a_stride2", stem=STEM),
    "torchreid resnet50_fc512": of_torchreid("resnet50_fc512", "resnet50_fc512", stem=STEM),
    "torchreid osnet": of_torchreid("osnet_x0_25", "osnet"),
    "torchreid osnet_ibn": of_torchreid("osnet_ibn_x1_0", "osnet_ibn"),
    "torchreid osnet_ain": of_torchreid("osnet_ain_x0_25", "osnet_ain"),
    "torchreid mobilenetv2": of_torchreid("mobilenetv2_x1_0", "mobilenetv2"),
    "fast-reid 18x": of_fastreid("18x", "resnet18_fastreid"),
    "fast-reid 34x ibn": of_fastreid("34x", "resnet34_ibn_a_fastreid", ibn=True),
    "fast-reid 50x": of_fastreid("50x", "resnet50_fastreid", head="classifier", pixels=True),
    "fast-reid 101x ibn": of_fastreid("101x", "resnet101_ibn_a_fastreid", ibn=True),
    "fast-reid 50x before August 2020": of_fastreid("50x", "resnet50", head="bnneck", pixels=True),
    "fast-reid 18x reduced": of_fastreid("18x", "resnet18_fastreid_emb48", reduced_to=48),
    "fast-reid osnet": Case(
        "fast-reid", "osnet", fastreid_osnet, embed_fastreid_osnet, fastreid.training_file, takes_pixels=True
    ),
    "BoT resnet18": of_bot("resnet18", "resnet18_bot"),
    "BoT resnet34": of_bot("resnet34", "resnet34_bot"),
    "BoT resnet50": of_bot("resnet50", "resnet50_bot"),
    "BoT resnet101": of_bot("resnet101", "resnet101_bot"),
    "BoT resnet50_ibn_a": of_bot("resnet50_ibn_a", "resnet50_ibn_a"),
    "BoT without a neck": of_bot("resnet50", "resnet50_bot", neck="no"),
    "MSINet": Case(
        "MSINet",
        "msinet",
        lambda: msinet.checkpoint(identities=PEOPLE),
        msinet.embed,
        neck=False,
        has_classifier=False,  # it reads another embedding
    ),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


def some_pixels() -> Tensor:
    return 255 * torch.rand(2, 3, INPUT.height, INPUT.width, generator=torch.Generator().manual_seed(1))


def normalised(pixels: Tensor, mean: Any = INPUT.mean, std: Any = INPUT.std) -> Tensor:
    return (pixels / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def read(path: Path, stated: str | None = None) -> Recognised:
    return recognise(read_torch(path) if sniff(path) == "torch" else read_safetensors(path)[0], stated)


def refusal(state: State) -> str:
    with pytest.raises(WeightsRefused) as caught:
        recognise(state)
    return str(caught.value)


@torch.no_grad()
def embedded(found: Recognised, images: Tensor) -> Tensor:
    """The network's answer, with an identity neck where its maker has none."""
    if not found.neck:
        identity_neck(found.model, found.model(images)[0])
    return found.model.embed(images)


def require_alike(made: Tensor, expected: Tensor) -> None:
    assert made.shape == expected.shape
    torch.testing.assert_close(functional.normalize(made), functional.normalize(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(made, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


# --- what is read


def test_a_training_file_answers_as_its_project_does(case: Case, tmp_path: Path) -> None:
    state, pixels = case.make(), some_pixels()
    found = read(saved(case.wrap(state), tmp_path))
    assert (found.toolkit, found.model.table.name, found.neck) == (case.toolkit, case.architecture, case.neck)
    assert found.pretraining is None
    shape = None if found.classifier is None else tuple(found.classifier.shape)
    assert shape == ((PEOPLE, found.model.backbone.channels) if case.has_classifier else None)
    mean, std = found.pixels or (INPUT.mean, INPUT.std)
    expected = case.embed(state, pixels if case.takes_pixels else normalised(pixels))
    require_alike(embedded(found, normalised(pixels, mean, std)), expected)


def test_every_tensor_of_a_file_is_accounted_for(case: Case) -> None:
    state = case.make()
    found = recognise(state)
    trained = [name for name in state if not name.endswith("num_batches_tracked")]
    assert found.matched + len(found.ignored) == len(trained)
    assert all(": outside the network" not in line for line in found.ignored)


@pytest.mark.parametrize("name", ["torchreid osnet", "fast-reid 18x", "BoT resnet18"])
def test_safetensors_hold_the_same_network(name: str, tmp_path: Path) -> None:
    state, images = CASES[name].make(), normalised(some_pixels())
    save_file({n: tensor.clone() for n, tensor in state.items()}, tmp_path / "weights.safetensors")
    found = read(tmp_path / "weights.safetensors")
    assert torch.equal(embedded(found, images), embedded(recognise(state), images))


@pytest.mark.parametrize("name", ["torchreid resnet18", "fast-reid 50x", "BoT resnet50_ibn_a"])
def test_the_report_says_what_was_read(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    report = check(saved(case.wrap(case.make()), tmp_path), Declared(), tmp_path / "teacher.safetensors")
    assert (report["toolkit"], report["architecture"], report["width"]) == (
        case.toolkit,
        case.architecture,
        "8x2-4-8",
    )
    assert (report["identities"], report["neck"]) == (PEOPLE, "own" if case.neck else "identity")
    assert report["matched"] > 100
    assert (report["input"]["height"], report["input"]["width"]) == (256, 128)
    assert report["input"]["mean"] == pytest.approx(INPUT.mean, abs=1e-4)
    kept = read_exported(tmp_path / "teacher.safetensors")
    assert kept.model.table.name == case.architecture


def test_what_is_ignored_or_absent_is_listed_with_the_reason() -> None:
    with_imagenet = recognise(CASES["BoT resnet50_ibn_a"].make())
    assert "base.fc.weight: an ImageNet classifier that nothing reads" in with_imagenet.ignored
    state = CASES["torchreid resnet18"].make() | {"center.centers": torch.zeros(3, 3)}
    found = recognise(state)
    assert "center.centers: outside the network: nothing of the embedding reads it" in found.ignored
    assert found.missing == ("neck: absent; taken as one that changes nothing",)
    bare = CASES["BoT resnet18"].make()
    del bare["bottleneck.bias"]
    assert recognise(bare).missing == ("bottleneck.bias: absent; taken as zeros",)


def test_a_file_s_own_pixels_are_its_input(tmp_path: Path) -> None:
    state = CASES["fast-reid 50x"].make() | {"pixel_mean": torch.full((1, 3, 1, 1), 102.0)}
    report = check(saved(state, tmp_path), Declared())
    assert report["input"]["mean"] == pytest.approx([0.4, 0.4, 0.4])
    assert "with the file's mean and std" in report["notes"][-1]
    stated = check(saved(state, tmp_path), Declared(input=INPUT))
    assert tuple(stated["input"]["mean"]) == INPUT.mean
    assert "those stated were taken" in stated["notes"][-1]


def test_senseless_pixels_are_refused() -> None:
    state = CASES["fast-reid 50x"].make() | {"pixel_std": torch.zeros(1, 3, 1, 1)}
    assert "std positive" in refusal(state)


@pytest.mark.parametrize("variant", ["_bot", "_stride2", "_fastreid"])
def test_of_neutral_names_the_owner_says_which_variant_they_are(variant: str) -> None:
    plain = {n.replace("base.", "backbone."): tensor for n, tensor in CASES["BoT resnet18"].make().items()}
    found = recognise(plain, f"resnet18{variant}")
    assert found.model.table.name == f"resnet18{variant}"
    assert f"taken as resnet18{variant}, as stated" in found.notes[0]
    assert recognise(plain).model.table.name == "resnet18"


@pytest.mark.parametrize("stated", ["resnet18", "resnet18_stride2", "resnet50_bot", "osnet"])
def test_what_a_toolkit_is_known_for_the_owner_cannot_state_away_unawares(stated: str, tmp_path: Path) -> None:
    report = answer(saved(CASES["BoT resnet18"].make(), tmp_path), Declared(stated, INPUT))
    assert f"registered as {stated}, and the file holds resnet18_bot (BoT's ResNets have no ReLU" in report["reason"]


def test_our_own_file_of_a_variant_stays_that_variant(tmp_path: Path) -> None:
    """No tensor tells it from its siblings: its metadata do."""
    torch.manual_seed(0)
    model, path = ReIDModel("resnet18_bot", Width(4)).eval(), tmp_path / "own.safetensors"
    save_network(model, None, origin("teacher", model, INPUT, "MIT"), path)
    report = check(path, Declared())
    assert (report["toolkit"], report["architecture"]) == ("widthwise", "resnet18_bot")


# --- what changes nothing is dropped, what changes something is refused


def with_non_local(weight: float) -> State:
    state = fastreid.checkpoint("50x", non_local=True, stem=STEM, identities=PEOPLE)
    for name in state:
        if name.endswith((".W.1.weight", ".W.1.bias")):
            state[name] = torch.full_like(state[name], weight)
    return state


def test_silent_non_local_blocks_and_power_one_are_dropped() -> None:
    state = with_non_local(0) | {"heads.pool_layer.p": torch.ones(1)}
    found, pixels = recognise(state), some_pixels()
    require_alike(embedded(found, normalised(pixels)), fastreid.embed(state, pixels))
    assert any("adds nothing" in line for line in found.ignored)
    assert any("average pooling" in line for line in found.ignored)


def test_half_a_non_local_block_is_not_taken_for_a_silent_one() -> None:
    state = with_non_local(0)
    del state["backbone.NL_2.0.W.1.weight"]
    assert "a non-local block" in refusal(state)


def renamed(state: State, old: str, new: str) -> State:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


SWIN = {"base.layers.0.blocks.0.attn.relative_position_bias_table": (169, 3), "base.norm.weight": (768,)}
REFUSED: dict[str, tuple[Callable[[], State], str]] = {
    "non-local": (lambda: with_non_local(1e-3), "a non-local block"),
    "GeM": (lambda: fastreid.checkpoint("18x", gem=True, stem=STEM), "generalised-mean pooling"),
    "SE": (lambda: fastreid.checkpoint("18x", se=True, stem=16), "squeeze and excitation"),
    "MGN": (lambda: renamed(CASES["fast-reid 18x"].make(), "heads.", "b1_head."), "a branch of MGN"),
    "BoT's SE": (lambda: renamed(CASES["BoT resnet18"].make(), "base.conv1", "base.layer0.conv1"), "a SENet's stem"),
    "ResNet-D": (lambda: renamed(CASES["BoT resnet18"].make(), "base.conv1.w", "base.conv1.0.w"), "the deep stem"),
    "Swin": (lambda: random_state(SWIN, 0), "a Swin transformer's windows"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=list(REFUSED))
def test_layers_that_no_network_here_has_are_named_with_what_to_do(make: Callable[[], State], words: str) -> None:
    reason = refusal(make())
    assert words in reason
    assert "to ONNX" in reason


def test_mobilenet_x1_4_is_refused_by_the_first_shape_that_no_width_has() -> None:
    reason = refusal(torchreid.checkpoint("mobilenetv2_x1_4", identities=PEOPLE))
    assert reason == (
        "conv5.0.conv3.0.weight has shape (89, 264, 1, 1); in mobilenetv2 of width w44 it has (88, 264, 1, 1)"
    )


def test_a_missing_tensor_is_named_as_the_file_would_name_it() -> None:
    state = CASES["torchreid osnet"].make()
    del state["conv3.1.conv2c.1.conv2.weight"]
    reason = refusal(state)
    assert reason.startswith("nearest is osnet (torchreid): conv3.1.conv2c.1.conv2.weight is missing")
    assert "shape (24, 1, 3, 3) at width 16x4-6-8" in reason


def test_a_tensor_among_the_layers_that_the_network_has_not_is_refused() -> None:
    state = CASES["fast-reid 18x"].make() | {"backbone.layer2.1.attention.weight": torch.zeros(16, 4)}
    assert "backbone.layer2.1.attention.weight of shape (16, 4) is unknown to it" in refusal(state)


def test_a_tensor_of_another_shape_is_named_with_both() -> None:
    state = CASES["torchreid osnet"].make() | {"conv4.0.gate.fc1.weight": torch.zeros(4, 32, 1, 1)}
    reason = refusal(state)
    assert reason == "conv4.0.gate.fc1.weight has shape (4, 32, 1, 1); in osnet of width 16x4-6-8 it has (2, 32, 1, 1)"


def test_fastreid_s_osnet_is_read_only_where_its_embedding_has_512_numbers() -> None:
    kept = {
        name: tensor
        for name, tensor in torchreid.checkpoint("osnet_x0_25").items()
        if not name.startswith(("fc.", "classifier."))
    }
    head = random_state(batch_norm("heads.bottleneck.0", 128), 0)
    assert "this network ends in 128 channels" in refusal({f"backbone.{n}": t for n, t in kept.items()} | head)


def test_a_reduction_of_senseless_shape_is_refused() -> None:
    state = CASES["fast-reid 18x reduced"].make()
    state["heads.bottleneck.0.weight"] = torch.zeros(0, 64, 1, 1)
    assert "has shape (0, 64, 1, 1)" in refusal(state)


def test_windows_that_are_cut_off_at_the_edge_are_served_as_torch_has_them() -> None:
    """fast-reid's stem pools without padding and rounds up: at odd sizes nothing is cut off, at even ones a row is."""
    for height, width in ((64, 32), (66, 34), (68, 30)):
        kept = load(dump(pico_chain(architecture_name="resnet18_fastreid", height=height, width=width)))
        chain, images = kept.chain, torch.randn(2, 3, height, width)
        module = load_student(chain, chain.teacher)
        with torch.no_grad():
            expected = module.embed(images)[:, torch.from_numpy(chain.lift(chain.teacher))]
            stem = module.backbone.maxpool(module.backbone.conv1(images))  # type: ignore[operator]
        session = onnxruntime.InferenceSession(write(kept, chain.teacher), providers=["CPUExecutionProvider"])
        made = torch.from_numpy(session.run(["embedding"], {"images": images.numpy()})[0])
        torch.testing.assert_close(made, functional.normalize(expected), atol=1e-4, rtol=0)
        pooled = value_shapes(chain.table, chain.teacher, chain.input)["pooled"]
        assert (pooled.height, pooled.width) == tuple(stem.shape[2:])


# --- ImageNet: to begin with


@pytest.mark.parametrize("name", ["resnet18", "resnet50_ibn_a"])
def test_an_imagenet_network_is_no_teacher_and_says_what_it_is_good_for(name: str, tmp_path: Path) -> None:
    report = answer(saved(imagenet.checkpoint(name, stem=STEM), tmp_path), Declared())
    assert report["state"] == "refused"
    assert "ImageNet" in report["reason"]
    assert "start" in report["reason"]


@pytest.mark.parametrize("name", imagenet.NAMES)
def test_an_imagenet_network_begins_a_training_with_last_stride_one(name: str, tmp_path: Path) -> None:
    state, images = imagenet.checkpoint(name, stem=STEM), normalised(some_pixels())
    start = read_start(saved(state, tmp_path), name)
    assert (start.table.name, start.width) == (name, Width(STEM))
    with torch.no_grad():
        require_alike(start(images)[0], imagenet.embed(state, images, last_stride=1))
        as_trained = recognise(state)
        require_alike(as_trained.model(images)[0], imagenet.embed(state, images))


def test_a_checkpoint_of_people_begins_a_training_too(tmp_path: Path) -> None:
    case = CASES["BoT resnet18"]
    start = read_start(saved(case.make(), tmp_path), "resnet18")
    assert start.table.name == "resnet18"
    own = tmp_path / "own.safetensors"
    save_network(start, None, origin("teacher", start, INPUT, "MIT"), own)
    assert torch.equal(read_start(own, "resnet18").embed(some_pixels()), start.embed(some_pixels()))


@pytest.mark.parametrize("content", [b"", b"\x08\x07", b"<html>"])
def test_a_start_that_is_no_weights_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(ChainFileError, match=r"start '.*weights'"):
        read_start(tmp_path / "weights", "resnet18")


def test_a_start_that_is_not_there_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ChainFileError, match="nowhere"):
        read_start(tmp_path / "nowhere", "resnet18")
