"""The starts of the other methods are what their papers say, at exactly the width asked for."""

import doctest
import os
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import baselines
from benchmarks.baselines import STARTS, depgraph, evenly_spaced, l1_pruning, scratch, select, weight_selection
from chains.chain import STATISTICS
from chains.errors import WidthError
from chains.model import ReIDModel, module_name
from chains.train import Trained
from chains.width import Width

torch.set_num_threads(1)
FULL = Width(16)
WIDTHS = [Width(4), Width(6), Width(10), Width(16), Width(8, (2, 3, 4)), Width(8, (2, 4, 4))]


def a_teacher(seed: int = 0, architecture: str = "resnet18", width: Width = FULL) -> Trained:
    """Random, its norms and statistics too, so that nothing is equal by accident."""
    generator = torch.Generator().manual_seed(seed)
    model = scratch(architecture, width, seed).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("weight", "bias", "running_mean", "running_var")) and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return Trained(model, torch.randn(20, model.backbone.channels, generator=generator))


def needs_torch_pruning() -> None:
    """A bare machine is told; continuous integration has it."""
    if os.environ.get("CI"):
        import torch_pruning  # noqa: F401
    pytest.importorskip("torch_pruning", reason="not installed: torch-pruning; pip install -e '.[bench]'")


def start_of(method: str) -> Callable[[Trained, Width, int], ReIDModel]:
    if method == "depgraph":
        needs_torch_pruning()
    return STARTS[method]


def same(one: ReIDModel, other: ReIDModel) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(values, copy) for (name, values), (twin, copy) in pairs)


@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("method", STARTS)
def test_every_start_has_exactly_the_width_asked_for_and_runs(method: str, width: Width) -> None:
    student = start_of(method)(a_teacher(), width, 0).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in student.tensors().items()}
    assert shapes == student.table.tensor_shapes(width)
    with torch.no_grad():
        embedding = student.embed(torch.randn(2, 3, 64, 32))
    assert embedding.shape == (2, 8 * width.stem if width.multipliers == (2, 4, 8) else 4 * width.stem)
    assert bool(torch.isfinite(embedding).all())


@pytest.mark.parametrize("method", STARTS)
def test_a_start_is_a_function_of_teacher_width_and_seed(method: str) -> None:
    start = start_of(method)
    torch.manual_seed(1)
    first = start(a_teacher(), Width(6), 0)
    torch.manual_seed(2)
    assert same(first, start(a_teacher(), Width(6), 0))
    assert not same(first, start(a_teacher(seed=1), Width(6), 1))


@pytest.mark.parametrize("method", STARTS)
def test_the_teacher_is_left_as_it_was(method: str) -> None:
    teacher = a_teacher()
    start_of(method)(teacher, Width(6), 0)
    assert same(teacher.model, a_teacher().model)
    assert torch.equal(teacher.classifier, a_teacher().classifier)


@pytest.mark.parametrize("method", ["weight selection", "l1 pruning", "depgraph"])
def test_at_the_teachers_own_width_the_student_is_the_teacher(method: str) -> None:
    assert same(start_of(method)(a_teacher(), FULL, 0), a_teacher().model)


@pytest.mark.parametrize("method", ["weight selection", "l1 pruning", "depgraph"])
def test_a_width_that_does_not_fit_is_refused(method: str) -> None:
    with pytest.raises(WidthError, match="needs 17 channels in group 'stem'; the teacher 16x2-4-8 has 16"):
        start_of(method)(a_teacher(), Width(17), 0)


def test_scratch_is_where_training_alone_starts_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    alone, then = ReIDModel("resnet18", Width(4)), torch.rand(3)
    torch.manual_seed(5)
    _ = ReIDModel("resnet18", Width(4)), scratch("resnet18", Width(6), 9)
    assert torch.equal(torch.rand(3), then)
    assert same(scratch("resnet18", Width(4), 5), alone)


def test_evenly_spaced_is_every_nth_channel_where_it_divides_and_never_leaves_the_tensor() -> None:
    assert evenly_spaced(16, 4).tolist() == [0, 4, 8, 12]
    for size in range(1, 33):
        for count in range(1, size + 1):
            channels = evenly_spaced(size, count)
            assert len(set(channels.tolist())) == count
            assert 0 <= channels[0] <= channels[-1] < size


def test_the_examples_of_the_module_are_right() -> None:
    assert doctest.testmod(baselines).failed == 0


def test_weight_selection_keeps_weights_norms_and_statistics_of_the_channels_it_names() -> None:
    teacher = a_teacher().model.state_dict()
    student = weight_selection(a_teacher().model, Width(4)).state_dict()
    assert torch.equal(student["backbone.conv1.weight"], teacher["backbone.conv1.weight"][::4])
    assert torch.equal(student["backbone.layer2.0.conv1.weight"], teacher["backbone.layer2.0.conv1.weight"][::4, ::4])
    for name in ("backbone.bn1", "backbone.layer3.0.downsample.1", "neck"):
        for kind in ("weight", "bias", *STATISTICS):
            assert torch.equal(student[f"{name}.{kind}"], teacher[f"{name}.{kind}"][::4]), (name, kind)


def test_l1_pruning_keeps_the_filters_of_largest_norm() -> None:
    teacher = a_teacher()
    strong = [3, 5, 8, 13]
    with torch.no_grad():
        teacher.model.backbone.layer1[0].conv1.weight[strong] *= 100
    student = l1_pruning(teacher.model, Width(4)).state_dict()
    norms = teacher.model.state_dict()["backbone.layer1.0.bn1.running_mean"]
    assert torch.equal(student["backbone.layer1.0.bn1.running_mean"], norms[strong])


def strongest(teacher: Trained, width: Width) -> dict[str, NDArray[np.int64]]:
    """The channels of largest group norm, written out from the axis table alone: the mean over every conv that writes
    or reads the group, every norm of it and the classifier of the sum of squares."""
    table, state = teacher.model.table, teacher.model.state_dict()
    shares: dict[str, list[NDArray[np.float64]]] = {group: [] for group in table.groups}
    for name, axes in table.axes.items():
        squares = state[module_name(name)].double().numpy() ** 2
        if not name.endswith(".bias"):
            shares[axes.rows[0]].append(squares.reshape(len(squares), -1).sum(axis=1))
        if axes.columns is not None:
            shares[axes.columns[0]].append(squares.sum(axis=(0, 2, 3)))
    shares[table.embedding_channels[0]].append((teacher.classifier.double().numpy() ** 2).sum(axis=0))
    sizes = table.group_sizes(width)
    return {group: np.sort(np.argsort(np.mean(parts, axis=0))[-sizes[group] :]) for group, parts in shares.items()}


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
@pytest.mark.parametrize("width", [Width(3), Width(5), Width(4, (2, 3, 4))], ids=str)
def test_depgraph_is_the_selection_of_the_channels_of_largest_group_norm(architecture: str, width: Width) -> None:
    needs_torch_pruning()
    teacher = a_teacher(architecture=architecture, width=Width(8))
    pruned, by_hand = depgraph(teacher, width), select(teacher.model, width, strongest(teacher, width))
    assert same(pruned, by_hand)
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(pruned.embed(images), by_hand.embed(images))


def test_without_torch_pruning_depgraph_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[bench\]'"):
        depgraph(a_teacher(), Width(4))
