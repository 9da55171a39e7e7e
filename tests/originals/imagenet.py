"""ImageNet ResNets, which ReID networks start from: torchvision's and timm's, and IBN-Net's.

Names: pytorch/vision torchvision/models/resnet.py; XingangPan/IBN-Net ibnnet/resnet_ibn.py (He et al., CVPR 2016; Pan
et al., ECCV 2018). `residual` plus fc.weight (1000, C) and fc.bias. Trained with last stride 2 on 224 × 224.
"""

from __future__ import annotations

from torch import Tensor

from tests.originals import layers
from tests.originals.residual import Build, feature_map, shapes
from tests.originals.state import State, linear, random_state

NAMES = (
    *("resnet18", "resnet34", "resnet50", "resnet101"),
    *("resnet18_ibn_a", "resnet34_ibn_a", "resnet50_ibn_a", "resnet101_ibn_a"),
)


def checkpoint(name: str = "resnet50", *, classes: int = 1000, stem: int = 64, seed: int = 0) -> State:
    """One of `NAMES`; stem: 64 as published, less for a toy."""
    build = Build(name.removesuffix("_ibn_a"), stem, ibn=name.endswith("_ibn_a"))
    return random_state(shapes(build) | linear("fc", classes, build.features), seed)


def embed(state: State, images: Tensor, *, last_stride: int = 2) -> Tensor:
    """The pooled feature (batch, C). ReID sets the last stride to 1 and trains on (Luo et al., CVPRW 2019)."""
    return layers.average(feature_map(state, images, last_stride=last_stride))


def classify(state: State, images: Tensor) -> Tensor:
    """Logits (batch, classes)."""
    return layers.linear(state, "fc", embed(state, images))
