"""fast-reid (JDAI-CV/fast-reid; He et al., 2020): Baseline with a ResNet and an EmbeddingHead.

Names: fastreid/modeling/backbones/resnet.py, fastreid/layers/{batch_norm,non_local,pooling}.py,
fastreid/modeling/heads/embedding_head.py (earlier: bnneck_head.py), fastreid/modeling/meta_arch/baseline.py.

    pixel_mean, pixel_std (1, 3, 1, 1)     of pixels 0..255; in the file of earlier versions only
    backbone.* (`residual`)                bn1.IN, bn1.BN with IBN; se.fc.0, se.fc.2; NL_2.{0,1}, NL_3.{0,…} (SBS, AGW)
    heads.pool_layer.p (1,)                generalised-mean pooling (SBS, AGW)
    heads.bottleneck.0.*                   the neck, a BatchNorm2d; after a reduction heads.bottleneck.0.weight
                                           (E, C, 1, 1), heads.bottleneck.1.*
    heads.weight (ids, D)                  the classifier

Its head changed names twice: bnneck and classifier.weight, then bottleneck.0 and classifier.weight, then bottleneck.0
and weight. The stem's max pooling was torchvision's in early 2020; in later versions it has no padding and rounds up.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tests.originals import layers
from tests.originals.residual import Build, feature_map, shapes
from tests.originals.state import Shapes, State, batch_norm, conv, linear, random_state, under

DEPTHS = {"18x": "resnet18", "34x": "resnet34", "50x": "resnet50", "101x": "resnet101"}
NON_LOCAL = {"18x": (0, 0, 0, 0), "34x": (0, 0, 0, 0), "50x": (0, 2, 3, 0), "101x": (0, 2, 9, 0)}
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
NON_LOCAL_SCALE = 1e-4  # their norms start at zero; as y grows with the cube of x, random ones near one would explode
SMALLEST = 1e-6  # of what generalised-mean pooling raises to a power
Head = Literal["weight", "classifier", "bnneck"]


def checkpoint(
    depth: str = "50x",
    *,
    ibn: bool = False,
    se: bool = False,
    non_local: bool = False,
    non_local_inner: int | None = None,
    gem: bool = False,
    reduced_to: int = 0,
    head: Head = "weight",
    pixels: bool = False,
    identities: int = 751,
    stem: int = 64,
    seed: int = 0,
) -> State:
    """The defaults are its bag of tricks; SBS is `ibn`, `non_local`, `gem`. reduced_to: EMBEDDING_DIM; head: newest,
    between, oldest names; pixels: with the buffers of earlier versions; non_local_inner: 1 in earlier versions, half of
    the channels since; stem: 64 as published, less for a toy."""
    build = Build(DEPTHS[depth], stem, ibn, se, NON_LOCAL[depth] if non_local else (0, 0, 0, 0), non_local_inner)
    buffers: State = {}
    if pixels:
        buffers = {f"pixel_{kind}": _pixels(values) for kind, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD))}
    found = under("backbone.", shapes(build)) | _head(head, build.features, reduced_to, identities)
    state = random_state(found, seed)
    neck = _neck(state)
    state[f"{neck}.bias"] = torch.zeros_like(state[f"{neck}.bias"])  # frozen there, and saved
    for name in [name for name in state if name.endswith(".W.1.weight")]:
        state[name] *= NON_LOCAL_SCALE
    if gem:
        buffers["heads.pool_layer.p"] = torch.tensor([2.7])  # starts at 3 and is trained
    return buffers | state


def _head(head: Head, features: int, reduced_to: int, identities: int) -> Shapes:
    if reduced_to and head == "bnneck":
        raise ValueError(f"no reference for the oldest head with a reduction to {reduced_to}: take a newer `head`")
    width = reduced_to or features
    neck = "heads.bnneck" if head == "bnneck" else f"heads.bottleneck.{1 if reduced_to else 0}"
    found = conv("heads.bottleneck.0", reduced_to, features) if reduced_to else {}
    found |= batch_norm(neck, width)
    return found | linear("heads" if head == "weight" else "heads.classifier", identities, width, bias=False)


def training_file(state: State) -> dict[str, Any]:
    """What its Checkpointer writes (fastreid/utils/checkpoint.py)."""
    return {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 59}


def embed(state: State, images: Tensor, *, padded_pool: bool = False) -> Tensor:
    """Pixels 0..255 (batch, 3, H, W) → the feature after the neck (batch, D); padded_pool: as in early versions."""
    mean = state.get("pixel_mean", _pixels(PIXEL_MEAN)).to(images)
    std = state.get("pixel_std", _pixels(PIXEL_STD)).to(images)
    backbone = {
        name.removeprefix("backbone."): tensor for name, tensor in state.items() if name.startswith("backbone.")
    }
    pool = layers.max_pooled if padded_pool else _rounded_up_pool
    x = _pooled(state, feature_map(backbone, (images - mean) / std, last_stride=1, pool=pool))
    if "heads.bottleneck.1.running_mean" in state:
        x = layers.conv(state, "heads.bottleneck.0", x)
    return layers.batch_norm(state, _neck(state), x)[:, :, 0, 0]


def _pooled(state: State, x: Tensor) -> Tensor:
    """The average, or (mean of xᵖ)^(1/p), with x held above `SMALLEST`: (batch, C, 1, 1)."""
    if "heads.pool_layer.p" not in state:
        return x.mean(dim=(2, 3), keepdim=True)
    power = state["heads.pool_layer.p"].reshape(1, 1, 1, 1)
    return x.clamp(min=SMALLEST).pow(power).mean(dim=(2, 3), keepdim=True).pow(1 / power)


def _rounded_up_pool(x: Tensor) -> Tensor:
    """The windows are rows 2i, 2i + 1, 2i + 2, the last one cut off at the edge."""
    return functional.max_pool2d(x, 3, 2, ceil_mode=True)


def _neck(state: State) -> str:
    places = ("heads.bnneck", "heads.bottleneck.1", "heads.bottleneck.0")
    return next(place for place in places if f"{place}.running_mean" in state)


def _pixels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(1, 3, 1, 1)
