"""ResNets under torchvision's names (torchvision/models/resnet.py), and what toolkits changed about them.

    conv1.weight (w, 3, 7, 7)   bn1.*   layer{1..4}.{i}.conv{1,2,3}.weight   .bn{1,2,3}.*   .downsample.{0.weight, 1.*}

IBN-a (XingangPan/IBN-Net, ibnnet/resnet_ibn.py) splits bn1 of each block of the first three stages: bn1.IN.weight,
bn1.IN.bias (no statistics), bn1.BN.*. Squeeze and excitation adds se.fc.0.weight and se.fc.2.weight after the last
norm; fast-reid's non-local blocks stand after the last blocks of a stage, as NL_{stage}.{j}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tests.originals import layers
from tests.originals.state import Shapes, State, batch_norm, conv, instance_norm, linear

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
EXPANSIONS = {"resnet18": 1, "resnet34": 1, "resnet50": 4, "resnet101": 4}
REDUCTION = 16  # of squeeze and excitation


@dataclass(frozen=True)
class Build:
    """A ResNet. stem: its channels, 64 in all published ones; non_local: blocks per stage; inner: channels inside a
    non-local block, half of its channels where nothing is said."""

    name: str = "resnet50"
    stem: int = 64
    ibn: bool = False
    se: bool = False
    non_local: tuple[int, int, int, int] = (0, 0, 0, 0)
    inner: int | None = None

    @property
    def features(self) -> int:
        return self.stem * 8 * EXPANSIONS[self.name]


def shapes(build: Build) -> Shapes:
    """The backbone, without a classifier."""
    found = conv("conv1", build.stem, 3, 7) | batch_norm("bn1", build.stem)
    inputs = build.stem
    for stage in (1, 2, 3, 4):
        inner = build.stem * 2 ** (stage - 1)
        for index in range(DEPTHS[build.name][stage - 1]):
            found |= _block(build, stage, index, inputs, inner)
            inputs = inner * EXPANSIONS[build.name]
    for stage, blocks in enumerate(build.non_local, start=1):
        channels = build.stem * 2 ** (stage - 1) * EXPANSIONS[build.name]
        for index in range(blocks):
            found |= _non_local(f"NL_{stage}.{index}", channels, build.inner or channels // 2)
    return found


def _block(build: Build, stage: int, index: int, inputs: int, inner: int) -> Shapes:
    name, outputs = f"layer{stage}.{index}", inner * EXPANSIONS[build.name]
    basic = EXPANSIONS[build.name] == 1
    found = conv(f"{name}.conv1", inner, inputs, 3 if basic else 1)
    split = build.ibn and stage < 4
    found |= _split_norm(f"{name}.bn1", inner) if split else batch_norm(f"{name}.bn1", inner)
    found |= conv(f"{name}.conv2", inner, inner, 3) | batch_norm(f"{name}.bn2", inner)
    if not basic:
        found |= conv(f"{name}.conv3", outputs, inner) | batch_norm(f"{name}.bn3", outputs)
    if build.se:
        found |= linear(f"{name}.se.fc.0", outputs // REDUCTION, outputs, bias=False)
        found |= linear(f"{name}.se.fc.2", outputs, outputs // REDUCTION, bias=False)
    if index == 0 and (stage > 1 or not basic):
        found |= conv(f"{name}.downsample.0", outputs, inputs) | batch_norm(f"{name}.downsample.1", outputs)
    return found


def _split_norm(name: str, channels: int) -> Shapes:
    half = channels // 2
    return instance_norm(f"{name}.IN", half) | batch_norm(f"{name}.BN", channels - half)


def _non_local(name: str, channels: int, inner: int) -> Shapes:
    outer = conv(f"{name}.W.0", channels, inner, bias=True) | batch_norm(f"{name}.W.1", channels)
    theta, phi = (conv(f"{name}.{role}", inner, channels, bias=True) for role in ("theta", "phi"))
    return conv(f"{name}.g", inner, channels, bias=True) | outer | theta | phi


def feature_map(
    state: State,
    images: Tensor,
    *,
    last_stride: int,
    stem_relu: bool = True,
    pool: Callable[[Tensor], Tensor] = layers.max_pooled,
) -> Tensor:
    """Images (batch, 3, H, W) → (batch, C, h, w): the output of the fourth stage."""
    x = layers.batch_norm(state, "bn1", layers.conv(state, "conv1", images, 2))
    x = pool(functional.relu(x) if stem_relu else x)
    for stage, stride in ((1, 1), (2, 2), (3, 2), (4, last_stride)):
        x = _stage(state, stage, x, stride)
    return x


def _stage(state: State, stage: int, x: Tensor, stride: int) -> Tensor:
    blocks = _count(state, f"layer{stage}.{{}}.conv1.weight")
    non_local = _count(state, f"NL_{stage}.{{}}.g.weight")
    for index in range(blocks):
        x = _residual(state, f"layer{stage}.{index}", x, stride if index == 0 else 1)
        place = index - (blocks - non_local)
        if place >= 0:
            x = _attend(state, f"NL_{stage}.{place}", x)
    return x


def _count(state: State, pattern: str) -> int:
    index = 0
    while pattern.format(index) in state:
        index += 1
    return index


def _residual(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """Two 3×3 convolutions, the first with the stride; or 1×1, 3×3 with the stride, 1×1."""
    basic = f"{name}.conv3.weight" not in state
    out = layers.conv(state, f"{name}.conv1", x, stride if basic else 1)
    out = functional.relu(layers.any_norm(state, f"{name}.bn1", out))
    out = layers.batch_norm(state, f"{name}.bn2", layers.conv(state, f"{name}.conv2", out, 1 if basic else stride))
    if not basic:
        out = layers.batch_norm(state, f"{name}.bn3", layers.conv(state, f"{name}.conv3", functional.relu(out)))
    if f"{name}.se.fc.0.weight" in state:
        out = _excite(state, f"{name}.se", out)
    if f"{name}.downsample.0.weight" in state:
        x = layers.batch_norm(state, f"{name}.downsample.1", layers.conv(state, f"{name}.downsample.0", x, stride))
    return functional.relu(out + x)


def _excite(state: State, name: str, x: Tensor) -> Tensor:
    hidden = functional.relu(layers.linear(state, f"{name}.fc.0", layers.average(x)))
    return x * torch.sigmoid(layers.linear(state, f"{name}.fc.2", hidden))[:, :, None, None]


def _attend(state: State, name: str, x: Tensor) -> Tensor:
    """x + norm(W y) with y = g (θᵀφ / N)ᵀ over the N places of a map: no softmax."""
    places = x.shape[2] * x.shape[3]
    theta, phi, g = (layers.conv(state, f"{name}.{role}", x).flatten(2) for role in ("theta", "phi", "g"))
    affinity = theta.transpose(1, 2) @ phi / places  # (batch, N, N)
    y = (affinity @ g.transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
    return x + layers.batch_norm(state, f"{name}.W.1", layers.conv(state, f"{name}.W.0", y))
