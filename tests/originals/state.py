"""Tensors by name: shapes as a layer declares them, weights from a seed, and what projects wrap around them.

A layer is a dict of shapes in the order in which torch would save it, so that a network is the union of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod, sqrt

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]
BATCHES = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var", BATCHES)


def conv(name: str, rows: int, columns: int, kernel: int = 1, *, bias: bool = False) -> Shapes:
    """A convolution (rows, columns, kernel, kernel); a depthwise one has one column."""
    weight: Shapes = {f"{name}.weight": (rows, columns, kernel, kernel)}
    return weight | ({f"{name}.bias": (rows,)} if bias else {})


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | ({f"{name}.bias": (rows,)} if bias else {})


def batch_norm(name: str, channels: int) -> Shapes:
    vectors: Shapes = {f"{name}.{kind}": (channels,) for kind in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{name}.{BATCHES}": ()}


def instance_norm(name: str, channels: int) -> Shapes:
    """Affine, without running statistics: torch's default for `InstanceNorm2d(affine=True)`."""
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def random_state(shapes: Shapes, seed: int) -> State:
    """Weights that keep activations sane in the deepest network here: rows of norm near one, norms near the identity,
    positive variances."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith(BATCHES):
        return torch.tensor(1000)
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / sqrt(prod(shape[1:]))
    if name.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=generator)
    return 0.1 * values + (1.0 if name.endswith(".weight") else 0.0)


def data_parallel(state: State) -> State:
    """The names that `torch.nn.DataParallel` and its distributed kin give."""
    return {f"module.{name}": tensor for name, tensor in state.items()}


def parameters(state: State, without: Iterable[str] = ()) -> int:
    """How many numbers are trained: no running statistics, and nothing under the prefixes `without`."""
    left_out = tuple(without)
    kept = (name for name in state if not name.endswith(STATISTICS) and not name.startswith(left_out))
    return sum(state[name].numel() for name in kept)
