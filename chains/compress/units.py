"""Pruner-convolution-pruner units: 1×1 convolutions that start as identities, are pruned, and are absorbed.

    bottleneck    conv1, BN, ReLU → A → conv2 3×3, BN → B → ReLU → conv3, BN
    basic block   conv1, BN, ReLU → A → conv2 3×3, BN                            (our choice)

The paper's unit is the bottleneck's. A basic block has one inner width, that between its convolutions, so one pruner is
enough there: a B behind its first norm would prune the channels that A prunes, and with IBN-a could not be absorbed,
for instance normalisation differs from image to image.

A zero column of A makes an inner channel unread, a zero row of B makes one zero (ReLU(0) = 0, B has no bias); either
way it can go, with its filter, its norm and the columns that read it. What is left of A and B is a product:

    K̃ = (γ/σ) K        b̃ = β - μ γ/σ                       BN folded into the 3×3
    K'[o,i] = Σ_{u,v} B[o,u] K̃[u,v] A[v,i]      b' = B b̃

The one surprise: behind absorption a bottleneck's second norm is made up, (γ, μ, σ²) = (√(1+ε), 0, 1). It is right in
evaluation, and wrong as soon as statistics are measured anew, for training or calibration; `settled` makes it real.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chains.arch import NORM_EPSILON, Axes
from chains.chain import STATISTICS, InputSpec
from chains.compress.blocks import Unit, units_of
from chains.compress.losses import Axis, group_norms
from chains.cut import Indices
from chains.data.images import Images, chunks
from chains.errors import ArchitectureError
from chains.export import numpy_state
from chains.model import ReIDModel, model_of, normalise
from chains.nodes import Channels

Kept = Mapping[str, Indices]  # group -> the channels that stay, ascending
BATCH = 64


class Pruning(nn.Module):
    """A copy of a ResNet with pruners in every block; at first it computes what the network does.

    network: a `ReIDModel` whose blocks have a `conv2` of (pruner, conv) and, in bottlenecks, a `bn2` of (norm, pruner).
    """

    def __init__(self, model: ReIDModel) -> None:
        super().__init__()
        self.units = units_of(model.table)
        self.network = copy.deepcopy(model).requires_grad_(True)
        self.network.neck.bias.requires_grad_(False)
        for unit in self.units:
            block = self._block(unit)
            conv, norm = block.get_submodule("conv2"), block.get_submodule("bn2")
            if not isinstance(conv, nn.Conv2d):
                raise ArchitectureError(f"{unit.block}.conv2 has pruners already")
            entry: OrderedDict[str, nn.Module] = OrderedDict(pruner=_identity(conv.weight.shape[1]), conv=conv)
            block.add_module("conv2", nn.Sequential(entry))
            if unit.leaving:
                exit_ = OrderedDict(norm=norm, pruner=_identity(len(conv.weight)))
                block.add_module("bn2", nn.Sequential(exit_))

    def pruners(self) -> list[tuple[Channels, nn.Parameter, Axis]]:
        """(groups, weight (p, p, 1, 1), axis) of every pruner: which channels its columns (1) or rows (0) are."""
        found: list[tuple[Channels, nn.Parameter, Axis]] = []
        for unit in self.units:
            found.append((unit.entering, self._weight(unit, "conv2.pruner"), 1))
            if unit.leaving:
                found.append((unit.leaving, self._weight(unit, "bn2.pruner"), 0))
        return found

    def norms(self) -> dict[str, NDArray[np.float32]]:
        """Group -> the norm of the pruner's column or row of each channel."""
        sizes, norms = self.network.table.group_sizes(self.network.width), dict[str, NDArray[np.float32]]()
        for groups, weight, axis in self.pruners():
            values = group_norms(weight.detach().flatten(1), axis).cpu().numpy()
            stops = np.cumsum([sizes[group] for group in groups])[:-1]
            norms |= dict(zip(groups, np.split(values, stops), strict=True))
        return norms

    @torch.no_grad()
    def absorbed(self) -> ReIDModel:
        """The plain network of the same sizes that computes the same in evaluation, on the CPU."""
        plain = copy.deepcopy(self).cpu().eval()
        for unit in self.units:
            block = plain._block(unit)
            conv = block.get_submodule("conv2.conv")
            kernel = _product(_parameter(conv, "weight"), plain._weight(unit, "conv2.pruner"))
            if unit.leaving:
                norm = block.get_submodule("bn2.norm")
                kernel = _absorb_norm(kernel, norm, plain._weight(unit, "bn2.pruner"))
                block.add_module("bn2", norm)
            _parameter(conv, "weight").copy_(kernel)
            block.add_module("conv2", conv)
        return plain.network

    def _block(self, unit: Unit) -> nn.Module:
        return self.network.backbone.get_submodule(unit.block)

    def _weight(self, unit: Unit, name: str) -> nn.Parameter:
        return _parameter(self._block(unit).get_submodule(name), "weight")


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    return module.get_parameter(name)


def _identity(channels: int) -> nn.Conv2d:
    pruner = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(pruner.weight)
    return pruner


def _product(kernel: Tensor, entering: Tensor) -> Tensor:
    """K A in float64, (u, v, h, w) and (v, i, 1, 1) → (u, i, h, w)."""
    return torch.einsum("uvhw,vi->uihw", kernel.double(), entering.flatten(1).double())


def _absorb_norm(kernel: Tensor, norm: nn.Module, leaving: Tensor) -> Tensor:
    """B K̃, and B b̃ left in `norm` as the bias of a norm that does nothing else."""
    state = {name: values.double() for name, values in norm.state_dict().items()}
    scale = state["weight"] / (state["running_var"] + NORM_EPSILON).sqrt()
    rows = leaving.flatten(1).double()
    _parameter(norm, "bias").copy_(rows @ (state["bias"] - state["running_mean"] * scale))
    _parameter(norm, "weight").fill_((1 + NORM_EPSILON) ** 0.5)
    norm.get_buffer("running_mean").zero_()
    norm.get_buffer("running_var").fill_(1)
    return torch.einsum("ou,uihw->oihw", rows, scale[:, None, None, None] * kernel)


def with_channels(model: ReIDModel, kept: Kept) -> ReIDModel:
    """The network that keeps the channels `kept` of `model`, and all of the groups that are not named; in eval mode."""
    table, width = model.table, model.width
    full = table.group_sizes(width)
    whole = {group: np.arange(size, dtype=np.int64) for group, size in full.items()} | dict(kept)
    state = numpy_state(model)
    axes = dict(table.axes) | {f"{n}.{kind}": Axes(g) for n, g in table.batch_norms.items() for kind in STATISTICS}
    tensors = {name: _chosen(state[name], axes[name], whole, full) for name in state}
    return model_of(table.fixed({group: len(channels) for group, channels in whole.items()}), width, tensors)


def _chosen(tensor: NDArray[np.float32], axes: Axes, kept: Kept, full: Mapping[str, int]) -> NDArray[np.float32]:
    rows = tensor[_positions(axes.rows, kept, full)]
    return rows if axes.columns is None else rows[:, _positions(axes.columns, kept, full)]


def _positions(channels: Channels, kept: Kept, full: Mapping[str, int]) -> Indices:
    """Where the kept channels of several groups stand on one axis."""
    starts = np.cumsum([0, *(full[group] for group in channels)])
    return np.concatenate([kept[group] + start for group, start in zip(channels, starts, strict=False)])


@torch.no_grad()
def settled(model: ReIDModel, images: Images, input: InputSpec) -> ReIDModel:
    """A copy of `model` whose bottlenecks have real second norms: their statistics are those of `images`, and weight
    and bias are such that it computes what it did. In eval mode, on the device of `model`.

    With g = γ/√(σ²+ε): γ' = g √(σ'²+ε), β' = β + g (μ' - μ)."""
    new = copy.deepcopy(model).eval()
    norms = [new.backbone.get_submodule(f"{unit.block}.bn2") for unit in units_of(new.table) if unit.leaving]
    sums = [_Moments(norm) for norm in norms]
    device = next(new.parameters()).device
    for pixels in chunks(images, BATCH):
        new(normalise(pixels, input, device))
    for norm, moments in zip(norms, sums, strict=True):
        moments.hook.remove()
        mean, variance = moments.result()
        old_mean, old_variance = (norm.get_buffer(kind) for kind in STATISTICS)
        weight, bias = _parameter(norm, "weight"), _parameter(norm, "bias")
        scale = weight / (old_variance + NORM_EPSILON).sqrt()
        weight.copy_(scale * (variance + NORM_EPSILON).sqrt())
        bias.copy_(bias + scale * (mean - old_mean))
        old_mean.copy_(mean)
        old_variance.copy_(variance)
    return new


class _Moments:
    """Mean and variance of what a norm sees, over all images and places, added up in float64."""

    def __init__(self, norm: nn.Module) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())
        self.hook = norm.register_forward_pre_hook(self._add)

    def _add(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        maps = inputs[0].double()  # (batch, C, H, W)
        self.count += maps.numel() // maps.shape[1]
        self.total = self.total.to(maps.device) + maps.sum(dim=(0, 2, 3))
        self.squares = self.squares.to(maps.device) + maps.square().sum(dim=(0, 2, 3))

    def result(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        return mean.float(), (self.squares / self.count - mean.square()).clamp(min=0).float()
