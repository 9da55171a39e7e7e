"""A student exported to safetensors is the student, for this library and for a plain state dict."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chains.artifact import StoredChain, load, save
from chains.chain import InputSpec
from chains.errors import ChainFileError, NotCalibrated
from chains.export import (
    METADATA_KEY,
    export_safetensors,
    load_exported,
    load_trained,
    origin,
    read_exported,
    save_trained,
)
from chains.model import ReIDModel, load_student
from chains.testing import pico_chain
from chains.train import Trained
from chains.width import Width


@pytest.fixture(params=["resnet18", "resnet50"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> StoredChain:
    return save(pico_chain(architecture_name=request.param, rungs=3), tmp_path / "pico.safetensors")


def test_an_exported_student_embeds_as_the_student_it_was(stored: StoredChain, tmp_path: Path) -> None:
    images = torch.randn(3, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    for width in stored.chain.ladder:
        export_safetensors(stored, width, tmp_path / "student.safetensors")
        exported, expected = load_exported(tmp_path / "student.safetensors"), load_student(stored.chain, width)
        assert torch.equal(exported.embed(images), expected.embed(images))


def test_its_tensors_carry_torchvision_s_names_and_the_neck(stored: StoredChain, tmp_path: Path) -> None:
    export_safetensors(stored, stored.chain.ladder[0], tmp_path / "student.safetensors")
    names = load_file(tmp_path / "student.safetensors").keys()
    assert {"conv1.weight", "bn1.running_var", "layer4.1.conv2.weight", "layer2.0.downsample.1.running_mean"} <= names
    assert {"neck.weight", "neck.bias", "neck.running_mean", "neck.running_var"} <= names


def test_the_file_says_where_it_comes_from_and_what_it_wants_to_see(stored: StoredChain, tmp_path: Path) -> None:
    chain, width = stored.chain, stored.chain.ladder[1]
    export_safetensors(stored, width, tmp_path / "student.safetensors")
    origin = read_exported(tmp_path / "student.safetensors").origin
    assert (origin.chain, origin.chain_digest, origin.width) == (chain.name, stored.digest, str(width))
    assert (origin.architecture, origin.license) == (chain.architecture, "Apache-2.0")
    assert (origin.embedding_space, origin.lift) == (chain.embedding_space, tuple(chain.lift(width).tolist()))
    assert (origin.height, origin.image_width, origin.mean) == (64, 32, chain.input.mean)


def test_the_same_student_is_the_same_bytes(stored: StoredChain, tmp_path: Path) -> None:
    for name in ("first", "again"):
        export_safetensors(stored, stored.chain.ladder[0], tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_width_without_statistics_is_not_exported(tmp_path: Path) -> None:
    bare = save(replace(pico_chain(), statistics={}, frontier=None), tmp_path / "bare.safetensors")
    with pytest.raises(NotCalibrated):
        export_safetensors(bare, bare.chain.ladder[0], tmp_path / "student.safetensors")
    assert not (tmp_path / "student.safetensors").exists()


def test_other_files_are_no_student(stored: StoredChain, tmp_path: Path) -> None:
    with pytest.raises(ChainFileError, match="no exported network"):
        load_exported(tmp_path / "pico.safetensors")
    (tmp_path / "text").write_text("no tensors here, only a line of text")
    with pytest.raises(ChainFileError, match="cannot be read as safetensors"):
        load_exported(tmp_path / "text")
    with pytest.raises(ChainFileError, match="cannot be read as safetensors"):
        load_exported(tmp_path / "missing")


def test_a_student_that_lacks_a_tensor_is_refused(stored: StoredChain, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    export_safetensors(stored, stored.chain.ladder[0], path)
    text = read_exported(path).origin.model_dump_json()
    tensors = {name: values for name, values in load_file(path).items() if name != "conv1.weight"}
    save_file(tensors, path, {METADATA_KEY: text})
    with pytest.raises(ChainFileError, match=r"lacking .*conv1\.weight"):
        load_exported(path)


def test_a_trained_network_keeps_its_classifier_and_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, classifier = ReIDModel("resnet18", Width(4)), torch.randn(7, 32)
    model.train()(torch.randn(4, 3, 64, 32))  # moves the running statistics
    spec = InputSpec(64, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    save_trained(Trained(model.eval(), classifier), origin("teacher", model, spec, "MIT"), tmp_path / "teacher")
    trained, images = load_trained(tmp_path / "teacher"), torch.randn(2, 3, 64, 32)
    assert torch.equal(trained.classifier, classifier)
    assert torch.equal(trained.model.embed(images), model.embed(images))
    assert read_exported(tmp_path / "teacher").origin.input == spec


def test_a_student_of_a_chain_has_no_classifier_to_refine_with(stored: StoredChain, tmp_path: Path) -> None:
    export_safetensors(stored, stored.chain.ladder[0], tmp_path / "student.safetensors")
    with pytest.raises(ChainFileError, match="student without a classifier"):
        load_trained(tmp_path / "student.safetensors")


def test_the_student_trains_on_in_a_plain_torch_loop(stored: StoredChain, tmp_path: Path) -> None:
    """What the how-to shows: an optimiser, a classifier of one's own, a few steps."""
    assert load(tmp_path / "pico.safetensors").digest == stored.digest
    export_safetensors(stored, stored.chain.ladder[0], tmp_path / "student.safetensors")
    torch.manual_seed(0)
    model = load_exported(tmp_path / "student.safetensors").train()
    images, labels = torch.randn(8, 3, 64, 32), torch.arange(4).repeat(2)
    head = torch.nn.Linear(model.neck.num_features, 4, bias=False)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(head(model.embed(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0] / 2
