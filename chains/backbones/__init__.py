"""Backbones: plain torch modules that take their widths and know nothing of chains."""

from __future__ import annotations

from collections.abc import Callable

from chains import architectures
from chains.arch import Architecture
from chains.architectures.mobilenetv2 import MOBILENETV2
from chains.architectures.msinet import MSINET
from chains.architectures.osnet import OSNETS
from chains.architectures.resnet import RESNETS
from chains.architectures.vit import VITS
from chains.backbones.base import Backbone
from chains.backbones.mobilenetv2 import MobileNetV2
from chains.backbones.msinet import MSINet
from chains.backbones.osnet import OSNet
from chains.backbones.resnet import ResNet
from chains.backbones.vit import ViT
from chains.errors import ArchitectureError
from chains.width import Width

__all__ = ["BACKBONES", "Backbone", "backbone", "register"]

BACKBONES: dict[str, Callable[[str, Width], Backbone]] = dict.fromkeys(RESNETS, ResNet) | {
    MOBILENETV2: MobileNetV2,
    MSINET: MSINet,
    **dict.fromkeys(OSNETS, OSNet),
    **dict.fromkeys(VITS, ViT),
}

FAMILIES: dict[str, Callable[[str, Width], Backbone]] = {"resnet": ResNet, "vit_": ViT}  # as in `chains.architectures`


def register(name: str, table: Callable[[str], Architecture], make: Callable[[str, Width], Backbone]) -> None:
    """Make a network of your own known in this process, table and torch module. Raises as
    `chains.architectures.register`; that the two agree, `tests/contracts` shows."""
    architectures.register(name, table)
    BACKBONES[name] = make


def backbone(name: str, width: Width) -> Backbone:
    """The backbone of the architecture called `name`. Raises `ArchitectureError` when there is none."""
    make = BACKBONES.get(name) or next((FAMILIES[start] for start in FAMILIES if name.startswith(start)), None)
    if make is None:
        raise ArchitectureError(f"'{name[:40]}' has no torch module; there are: {', '.join(BACKBONES)}")
    return make(name, width)
