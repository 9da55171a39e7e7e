"""Where the other methods start: students of a width that are trained downstream after their provisioning.

Each start is a pure function of a teacher and a width that returns a `ReIDModel` of exactly that width, so that one
training loop and one evaluation serve every method. Nothing here trains. What each method is, and what it is not:

- `scratch`: random weights. `kd`: the same random weights; its training adds Hinton's loss on the teacher's logits at
  temperature 4 (Hinton et al., 2015). It is not the KD++ of the OSKT paper's table, whose feature loss needs a
  projection between the two embedding sizes on top.
- `weight selection`: evenly spaced channels of the teacher (Xu et al., "Initializing Models with Larger Ones", ICLR
  2024). The paper selects along every axis of every tensor on its own; the indices depend on nothing but the two sizes,
  so all tensors of a channel group keep the same channels.
- `l1 pruning`: the channels whose filters have the largest L1 norm (Li et al., "Pruning Filters for Efficient
  ConvNets", ICLR 2017), summed over the layers that write a residual stream.
- `depgraph`: torch-pruning's dependency graph with the group norm as importance (Fang et al., CVPR 2023), the same
  share of every group and in one step. The paper's optional phase of sparse learning before pruning is left out.

The classifier is never inherited: downstream training starts a new one, as the authors of weight selection do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chains.arch import Architecture
from chains.chain import STATISTICS, InputSpec
from chains.errors import ArchitectureError
from chains.model import ReIDModel, model_of, module_name
from chains.nodes import Channels
from chains.train import Trained
from chains.width import Width

Indices = NDArray[np.int64]
TRACED = InputSpec(64, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # of the image that draws the dependency graph; any size


def scratch(architecture_name: str, width: Width, seed: int) -> ReIDModel:
    """Random weights, a function of the seed: those `train_alone` starts from. Torch's own generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ReIDModel(architecture_name, width)


def weight_selection(teacher: ReIDModel, width: Width) -> ReIDModel:
    """Evenly spaced channels of `teacher`. Raises `WidthError` when `width` does not fit into the teacher's."""
    return select(teacher, width, {group: evenly_spaced(*sizes) for group, sizes in _sizes(teacher, width).items()})


def evenly_spaced(teacher_size: int, student_size: int) -> Indices:
    """Channels floor(i · N / m) for i < m: every (N / m)-th one where m divides N, the case the paper states. Its code
    rounds `linspace(0, N, m)` elsewhere, whose last index is outside the tensor.

    >>> evenly_spaced(16, 6)
    array([ 0,  2,  5,  8, 10, 13])
    """
    return np.arange(student_size, dtype=np.int64) * teacher_size // student_size


def l1_pruning(teacher: ReIDModel, width: Width) -> ReIDModel:
    """The channels of largest L1 norm. Raises `WidthError` when `width` does not fit into the teacher's."""
    tensors, table = teacher.tensors(), teacher.table
    kept = {
        group: largest(_norms([tensors[name] for name in table.writers(group)]), size)
        for group, (_, size) in _sizes(teacher, width).items()
    }
    return select(teacher, width, kept)


def largest(importance: Tensor, count: int) -> Indices:
    """The `count` channels of largest importance (N,), in the teacher's order; of equals the first: int64 (count,)."""
    order = torch.argsort(importance, descending=True, stable=True)[:count]
    return order.sort().values.cpu().numpy()


def _norms(weights: list[Tensor]) -> Tensor:
    """L1 norms of the rows of every weight `(N, …)`, summed: (N,)."""
    return torch.stack([weight.detach().abs().flatten(1).sum(dim=1) for weight in weights]).sum(dim=0)


def select(teacher: ReIDModel, width: Width, kept: Mapping[str, Indices]) -> ReIDModel:
    """The student that keeps the channels `kept` (group -> indices) of `teacher`: rows, columns, norms and running
    statistics, unscaled. In eval mode."""
    state, table = teacher.state_dict(), teacher.table
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, axes in table.axes.items():
        rows = state[module_name(name)].cpu().numpy()[kept[only(axes.rows)]]
        tensors[name] = rows if axes.columns is None else rows[:, kept[only(axes.columns)]]
    for norm, groups in table.batch_norms.items():
        for kind in STATISTICS:
            tensors[f"{norm}.{kind}"] = state[module_name(f"{norm}.{kind}")].cpu().numpy()[kept[only(groups)]]
    return model_of(table.name, width, tensors)


def only(channels: Channels) -> str:
    """The group of an axis. Raises `ArchitectureError` where there are several: these baselines take plain ResNets."""
    if len(channels) != 1:
        raise ArchitectureError(
            f"an axis of {len(channels)} groups cannot be selected from; the baselines take ResNets"
        )
    return channels[0]


def depgraph(teacher: Trained, width: Width) -> ReIDModel:
    """`teacher` pruned to `width` by torch-pruning, in eval mode. Each group keeps the channels of largest importance:
    the mean over the layers of the group, those that read it and the classifier included, of the squared L2 norm of a
    channel's weights. Raises `WidthError` when `width` does not fit, `ModuleNotFoundError` without torch-pruning."""
    pruning = _torch_pruning()
    _sizes(teacher.model, width)
    network = _WithClassifier(teacher)
    pruner = pruning.pruner.BasePruner(
        network,
        torch.zeros(1, 3, TRACED.height, TRACED.width),
        importance=pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio_dict=_shares(network.model, width),
        ignored_layers=[network.classifier],
    )
    pruner.step()
    return _of_width(network.model, width)


class _WithClassifier(nn.Module):
    """A copy of a teacher with its classifier, so that the dependency graph sees what reads the embedding."""

    def __init__(self, teacher: Trained) -> None:
        super().__init__()
        self.model = copy.deepcopy(teacher.model).cpu().eval()
        self.classifier = nn.Linear(teacher.classifier.shape[1], len(teacher.classifier), bias=False)
        self.classifier.weight.data.copy_(teacher.classifier)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.model.embed(images))
        return logits


def _shares(model: ReIDModel, width: Width) -> dict[nn.Module, float]:
    """For every convolution the share of its output channels to prune. Half a channel less than asked for, because the
    library rounds what is kept down and 16 · (1 - 10/16) need not be 6 in binary."""
    modules = dict(model.named_modules())
    sizes = _sizes(model, width)
    shares: dict[nn.Module, float] = {}
    for name, axes in model.table.axes.items():
        full, narrow = sizes[only(axes.rows)]
        module = modules[module_name(name).removesuffix(".weight").removesuffix(".bias")]
        if isinstance(module, nn.Conv2d):
            shares[module] = max(0.0, 1 - (narrow + 0.5) / full)
    return shares


def _of_width(pruned: ReIDModel, width: Width) -> ReIDModel:
    """The pruned tensors in a `ReIDModel` of `width`; torch names every tensor whose shape is another."""
    model = ReIDModel(pruned.table.name, width)
    model.load_state_dict(pruned.state_dict())
    return model.eval()


def _sizes(teacher: ReIDModel, width: Width) -> dict[str, tuple[int, int]]:
    """Group -> channels of the teacher and of the student. Raises `WidthError` when one does not fit."""
    table: Architecture = teacher.table
    table.require_within(width, teacher.width)
    full, narrow = table.group_sizes(teacher.width), table.group_sizes(width)
    return {group: (size, narrow[group]) for group, size in full.items()}


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the DepGraph baseline needs torch-pruning: pip install -e '.[bench]'") from error
    return torch_pruning


Start = Callable[[Trained, Width, int], ReIDModel]
STARTS: Mapping[str, Start] = {
    "scratch": lambda teacher, width, seed: scratch(teacher.model.table.name, width, seed),
    "kd": lambda teacher, width, seed: scratch(teacher.model.table.name, width, seed),
    "weight selection": lambda teacher, width, _: weight_selection(teacher.model, width),
    "l1 pruning": lambda teacher, width, _: l1_pruning(teacher.model, width),
    "depgraph": lambda teacher, width, _: depgraph(teacher, width),
}
"""Method -> its start, from teacher, width and seed."""
DISTILLED = frozenset({"kd"})
"""The methods whose downstream training has `chains.train.Distillation`, of temperature 4, from the teacher."""
