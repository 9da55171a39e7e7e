"""The layers as their formulas say them, reading their weights from named tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tests.originals.state import State

EPSILON = 1e-5  # torch's default for both norms, which all projects here leave as it is


def conv(state: State, name: str, x: Tensor, stride: int = 1, *, depthwise: bool = False) -> Tensor:
    """Padded by half the kernel, as every convolution here is."""
    weight = state[f"{name}.weight"]
    groups = weight.shape[0] if depthwise else 1
    padding = weight.shape[-1] // 2
    return functional.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding, groups=groups)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """x (batch, columns) → x Wᵀ (+ b)."""
    product = x @ state[f"{name}.weight"].T
    return product + state[f"{name}.bias"] if f"{name}.bias" in state else product


def batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    """(x − running mean) / √(running variance + ε) · weight + bias, for x (batch, C, H, W) or (batch, C)."""
    mean, variance, weight, bias = (
        state[f"{name}.{kind}"].reshape(1, -1, *[1] * (x.ndim - 2))
        for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(variance + EPSILON) * weight + bias


def instance_norm(state: State, name: str, x: Tensor) -> Tensor:
    """As `batch_norm`, with mean and (biased) variance of each image's own map, in eval mode too."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(2, 3), keepdim=True)
    weight, bias = (state[f"{name}.{kind}"].reshape(1, -1, 1, 1) for kind in ("weight", "bias"))
    return (x - mean) / torch.sqrt(variance + EPSILON) * weight + bias


def half_instance_norm(state: State, name: str, x: Tensor) -> Tensor:
    """IBN-a: instance norm for the first half of the channels, batch norm for the others."""
    half = state[f"{name}.IN.weight"].shape[0]
    first = instance_norm(state, f"{name}.IN", x[:, :half])
    second = batch_norm(state, f"{name}.BN", x[:, half:])
    return torch.cat([first, second], dim=1)


def any_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Whichever norm the tensors of this name belong to."""
    if f"{name}.IN.weight" in state:
        return half_instance_norm(state, name, x)
    return (batch_norm if f"{name}.running_mean" in state else instance_norm)(state, name, x)


def average(x: Tensor) -> Tensor:
    """(batch, C, H, W) → (batch, C)."""
    return x.mean(dim=(2, 3))


def halved(x: Tensor) -> Tensor:
    """Average pooling 2 × 2 with stride 2."""
    return functional.avg_pool2d(x, 2, 2)


def max_pooled(x: Tensor) -> Tensor:
    """Max pooling 3 × 3 with stride 2, padded by one: the windows are rows 2i − 1, 2i, 2i + 1."""
    return functional.max_pool2d(x, 3, 2, padding=1)
