"""BoT, the strong baseline of Luo et al. (CVPRW 2019): michuanhaohao/reid-strong-baseline.

Names: modeling/baseline.py, modeling/backbones/resnet.py and resnet_ibn_a.py.

    base.* (`residual`)   bottleneck.* (BatchNorm1d: its bias is frozen at zero, and saved)   classifier.weight (ids, C)

Two things that no name shows. The plain ResNets lack the ReLU after the stem's norm (the line is commented out); the
IBN-a one has it. And the IBN-a one keeps an ImageNet classifier that nothing reads: base.fc.weight, base.fc.bias.
A baseline without the neck (`neck='no'`) answers with the pooled feature and gives its classifier a bias.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tests.originals import layers
from tests.originals.residual import Build, feature_map, shapes
from tests.originals.state import State, batch_norm, linear, random_state, under

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet50_ibn_a")
IMAGENET_CLASSES = 1000


def checkpoint(
    name: str = "resnet50",
    *,
    neck: Literal["bnneck", "no"] = "bnneck",
    identities: int = 751,
    stem: int = 64,
    seed: int = 0,
) -> State:
    """One of `NAMES`; stem: 64 as published, less for a toy."""
    build = Build(name.removesuffix("_ibn_a"), stem, ibn=name.endswith("_ibn_a"))
    found = under("base.", shapes(build))
    if build.ibn:
        found |= linear("base.fc", IMAGENET_CLASSES, build.features)
    if neck == "bnneck":
        found |= batch_norm("bottleneck", build.features)
    state = random_state(found | linear("classifier", identities, build.features, bias=neck == "no"), seed)
    if neck == "bnneck":
        state["bottleneck.bias"] = torch.zeros(build.features)
    return state


def embed(state: State, images: Tensor) -> Tensor:
    """The feature after the neck (batch, C), as its tests take it (`TEST.NECK_FEAT: after`); without one, before it."""
    base = {name.removeprefix("base."): tensor for name, tensor in state.items() if name.startswith("base.")}
    has_stem_relu = "layer1.0.bn1.IN.weight" in base
    feature = layers.average(feature_map(base, images, last_stride=1, stem_relu=has_stem_relu))
    return layers.batch_norm(state, "bottleneck", feature) if "bottleneck.weight" in state else feature
