"""Pruner-convolution-pruner units: identities at first, absorbed exactly, and zero groups that may go."""

import numpy as np
import pytest
import torch

from chains.architectures import architecture
from chains.architectures.resnet import RESNETS
from chains.chain import STATISTICS
from chains.compress.blocks import prunable, units_of
from chains.compress.units import Pruning, settled, with_channels
from chains.errors import ArchitectureError
from chains.export import numpy_state
from chains.model import ReIDModel, model_of, normalise
from chains.testing import random_statistics, random_tensors
from chains.width import Width
from tests.chains.toys import INPUT, flat_people

WIDTH = Width(4)
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet18_ibn_a", "resnet50_ibn_a", "resnet50_bot", "resnet50_emb512")
EXACT = 1e-5  # of embeddings of the order of one, in float32


def a_network(name: str, seed: int = 0) -> ReIDModel:
    table = architecture(name)
    return model_of(name, WIDTH, {**random_tensors(table, WIDTH, seed), **random_statistics(table, WIDTH, seed)})


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, INPUT.height, INPUT.width, generator=torch.Generator().manual_seed(1))


def trained_pruning(name: str) -> Pruning:
    """Pruners that are no identities any more."""
    pruning, generator = Pruning(a_network(name)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, weight, _ in pruning.pruners():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return pruning.eval()


def unit_embeddings(model: ReIDModel) -> torch.Tensor:
    with torch.no_grad():
        return torch.nn.functional.normalize(model.embed(images()), dim=1)


@pytest.mark.parametrize("name", RESNETS)
def test_every_block_of_every_resnet_has_its_unit(name: str) -> None:
    units = units_of(architecture(name))
    blocks = {node.output for node in architecture(name).nodes if node.output.endswith((".conv2",))}
    assert {f"{unit.block}.conv2" for unit in units} == blocks
    assert all(bool(unit.leaving) == ("50" in name or "101" in name) for unit in units)


@pytest.mark.parametrize("name", NETWORKS)
def test_identities_compute_the_plain_network(name: str) -> None:
    model = a_network(name)
    assert torch.allclose(unit_embeddings(Pruning(model).eval().network), unit_embeddings(model), atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_pruners_are_absorbed_exactly(name: str) -> None:
    pruning = trained_pruning(name)
    before = unit_embeddings(pruning.network)
    assert not torch.allclose(before, unit_embeddings(a_network(name)), atol=1e-3), "the pruners did nothing"
    plain = pruning.absorbed()
    assert torch.allclose(unit_embeddings(plain), before, atol=EXACT)
    assert plain.state_dict().keys() == a_network(name).state_dict().keys()
    assert torch.allclose(unit_embeddings(pruning.network), before, atol=0), "the pruners are still there"


@pytest.mark.parametrize("name", NETWORKS)
def test_removing_zero_groups_changes_nothing(name: str) -> None:
    pruning = trained_pruning(name)
    with torch.no_grad():
        for _, weight, axis in pruning.pruners():
            weight.transpose(0, axis)[::3] = 0
    norms = pruning.norms()
    assert norms.keys() == set(prunable(architecture(name)))
    kept = {group: np.flatnonzero(values) for group, values in norms.items()}
    narrow = with_channels(pruning.absorbed(), kept)
    sizes = narrow.table.group_sizes(WIDTH)
    assert sizes == architecture(name).group_sizes(WIDTH) | {group: len(channels) for group, channels in kept.items()}
    assert any(sizes[group] < len(norms[group]) for group in norms)
    assert torch.allclose(unit_embeddings(narrow), unit_embeddings(pruning.network), atol=EXACT)


def test_a_network_of_uneven_layers_is_pruned_again() -> None:
    model = a_network("resnet50")
    kept = {
        group: np.arange(size)[1:] for group, size in model.table.group_sizes(WIDTH).items() if group == "layer2.0.a"
    }
    narrow = with_channels(model, kept)
    again = Pruning(narrow)
    assert again.norms()["layer2.0.a"].shape == (7,)
    assert torch.allclose(unit_embeddings(again.eval().absorbed()), unit_embeddings(narrow), atol=EXACT)


def test_settling_measures_statistics_and_changes_nothing() -> None:
    plain = trained_pruning("resnet50").absorbed()
    people = flat_people()
    settled_model = settled(plain, people, INPUT)
    assert torch.allclose(unit_embeddings(settled_model), unit_embeddings(plain), atol=1e-4)
    before, after = numpy_state(plain), numpy_state(settled_model)
    for kind, made_up in zip(STATISTICS, (0, 1), strict=True):
        assert (before[f"layer3.1.bn2.{kind}"] == made_up).all()
        assert not np.allclose(after[f"layer3.1.bn2.{kind}"], made_up, atol=1e-2)
    assert np.array_equal(after["layer3.1.conv2.weight"], before["layer3.1.conv2.weight"])


def test_settled_statistics_are_those_that_training_would_see() -> None:
    """In training mode batch norm uses the batch's: a settled network computes about what it does in evaluation."""
    plain, people = trained_pruning("resnet50").absorbed(), flat_people(identities=16)
    settled_model = settled(plain, people, INPUT)
    seen: dict[str, list[torch.Tensor]] = {"input": []}
    norm = settled_model.backbone.get_submodule("layer1.0.bn2")
    norm.register_forward_pre_hook(lambda _, inputs: seen["input"].append(inputs[0]))
    with torch.no_grad():
        settled_model(normalise(people.pixels(np.arange(len(people))), INPUT))
    (maps,) = seen["input"]
    assert torch.allclose(maps.mean(dim=(0, 2, 3)), norm.get_buffer("running_mean"), atol=1e-4)
    assert torch.allclose(maps.var(dim=(0, 2, 3), unbiased=False), norm.get_buffer("running_var"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "width"), [("osnet", Width(8, (4, 6, 8))), ("mobilenetv2", Width(8, ()))])
def test_other_networks_are_refused_with_words(name: str, width: Width) -> None:
    with pytest.raises(ArchitectureError, match=f"{name} is no ResNet"):
        Pruning(ReIDModel(name, width))


def test_a_network_is_given_pruners_once() -> None:
    with pytest.raises(ArchitectureError, match="has pruners already"):
        Pruning(Pruning(a_network("resnet18")).network)
