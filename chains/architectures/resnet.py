"""ResNets: stem, four stages of residual blocks, neck. Tensor names are torchvision's.

He et al., CVPR 2016; last stride 1: Luo et al., CVPRW 2019; IBN-a: Pan et al., ECCV 2018, whose names its two halves
have (`bn1.IN`, `bn1.BN`): the first normalisation of every block of stages 1 to 3 is one of instances for the first
half of its channels, so that the block's first inner width is cut in two halves of equal size.

Toolkits changed what no tensor shows, so a name says it: `resnet50`, then any of

    _ibn_a      see above
    _bot        no ReLU between the stem's norm and its pooling (the strong baseline of Luo et al.)
    _stride2    the last stage halves the map, as on ImageNet (torchvision, torchreid)
    _fastreid   the stem pools without padding, rounding up (fast-reid since August 2020)
    _fc512      512 numbers by a linear layer, batch norm and ReLU in front of the neck (torchreid's resnet50_fc512)
    _emb512     so many numbers by a linear layer without bias in front of the neck (fast-reid's EMBEDDING_DIM)

in this order, one of the three in the middle and one of the last two. `resnet18_ibn_a_fastreid_emb256` is one.

Where a stage starts with an identity shortcut (basic blocks, stage 1) it shares the group in front of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from chains.arch import Architecture, Group
from chains.errors import ArchitectureError
from chains.nodes import (
    EMBEDDING,
    IMAGES,
    Activation,
    Add,
    Channels,
    Conv,
    GlobalPool,
    InstanceNorm,
    Linear,
    Neck,
    Node,
    Pool,
)

IBN_STAGES = 3  # the last stage keeps plain batch normalisation


@dataclass(frozen=True)
class Block:
    """What differs between residual blocks: how much wider the output is, and the kernel of each convolution."""

    expansion: int
    kernels: tuple[int, ...]
    strided: int  # index of the conv that carries the block's stride


@dataclass(frozen=True)
class Reduction:
    """A linear layer in front of the neck that answers `channels` numbers: `name.0` with a bias, batch norm `name.1`
    and ReLU, or, not `is_normed`, nothing but the weight `name.0`."""

    name: str
    channels: int
    is_normed: bool


@dataclass(frozen=True)
class Settings:
    """One ResNet: its blocks, how many per stage, and what a toolkit changed; see the module."""

    block: Block
    depths: tuple[int, int, int, int]
    is_ibn: bool = False
    has_stem_relu: bool = True
    pool_pads_after: bool = False
    last_stride: int = 1  # keeps the final map twice as tall and wide, the rule in ReID since BoT
    reduction: Reduction | None = None

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Of the first block of each stage."""
        return (1, 2, 2, self.last_stride)


BASIC = Block(expansion=1, kernels=(3, 3), strided=0)
BOTTLENECK = Block(expansion=4, kernels=(1, 3, 1), strided=1)
DEPTHS: dict[str, tuple[Block, tuple[int, int, int, int]]] = {
    "18": (BASIC, (2, 2, 2, 2)),
    "34": (BASIC, (3, 4, 6, 3)),
    "50": (BOTTLENECK, (3, 4, 6, 3)),
    "101": (BOTTLENECK, (3, 4, 23, 3)),
}
RESNETS = (  # that are listed; every other name of the grammar is known too
    *(f"resnet{depth}" for depth in DEPTHS),
    *(f"resnet{depth}_ibn_a" for depth in DEPTHS),
    *(f"resnet50_{variant}" for variant in ("bot", "stride2", "fastreid", "fc512", "emb512")),
)
_NAME = re.compile(
    r"resnet(?P<depth>18|34|50|101)(?P<ibn>_ibn_a)?(_(?P<variant>bot|stride2|fastreid))?"
    r"(?P<fc>_fc512)?(_emb(?P<embedding>[1-9][0-9]{0,3}))?"
)


def settings(name: str) -> Settings:
    """What `name` says. Raises `ArchitectureError` for a name that is no ResNet's."""
    match = _NAME.fullmatch(name)
    if match is None or (match["fc"] and match["embedding"]):
        raise ArchitectureError(f"no architecture '{name[:40]}'; ResNets are written as in {', '.join(RESNETS)}")
    block, depths = DEPTHS[match["depth"]]
    reduction = Reduction("fc", 512, is_normed=True) if match["fc"] else None
    if match["embedding"]:
        reduction = Reduction("reduction", int(match["embedding"]), is_normed=False)
    return Settings(
        block,
        depths,
        is_ibn=match["ibn"] is not None,
        has_stem_relu=match["variant"] != "bot",
        pool_pads_after=match["variant"] == "fastreid",
        last_stride=2 if match["variant"] == "stride2" else 1,
        reduction=reduction,
    )


def table(name: str) -> Architecture:
    """The ResNet called `name`. Raises `ArchitectureError` for a name that is no ResNet's."""
    return _Layout(settings(name)).build(name)


class _Layout:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.block, self.is_ibn = settings, settings.block, settings.is_ibn
        self.groups = {"stem": Group("stem", stage=0)}
        self.nodes: list[Node] = []

    def build(self, name: str) -> Architecture:
        activation: Activation = "relu" if self.settings.has_stem_relu else "none"
        self.nodes.append(Conv("conv1", "bn1", IMAGES, "stem", ("stem",), None, 7, 2, activation))
        pads_after = self.settings.pool_pads_after
        self.nodes.append(Pool("max", "maxpool", "stem", "pooled", kernel=3, stride=2, pads_after=pads_after))
        value, group = "pooled", "stem"
        for stage, depth in enumerate(self.settings.depths):
            for index in range(depth):
                value, group = self._add_block(f"layer{stage + 1}.{index}", stage, index, value, group)
        self._add_neck(value, group, self.settings.reduction)
        return Architecture(name, self.groups, tuple(self.nodes))

    def _add_neck(self, value: str, group: str, reduction: Reduction | None) -> None:
        if reduction is None:
            self.nodes.append(Neck("neck", value, EMBEDDING, (group,)))
            return
        name, is_normed = reduction.name, reduction.is_normed
        self.groups[name] = Group(name, constant=reduction.channels)
        norm, activation = (f"{name}.1", "relu") if is_normed else (None, "none")
        linear = Linear(f"{name}.0", norm, "avgpool", name, (name,), (group,), activation, bias=is_normed)  # type: ignore[arg-type] # mypy widens it to str
        self.nodes += [
            GlobalPool("avgpool", value, "avgpool"),
            linear,
            Neck("neck", name, EMBEDDING, (name,), pools=False),
        ]

    def _add_block(self, name: str, stage: int, index: int, value: str, group: str) -> tuple[str, str]:
        stride = self.settings.strides[stage] if index == 0 else 1
        needs_projection = index == 0 and (stage > 0 or self.block.expansion > 1)
        out = f"layer{stage + 1}" if needs_projection else group
        if needs_projection:
            self.groups[out] = Group(out, stage, self.block.expansion)
        inner, shortcut = self._add_convs(name, stage, stride, value, group, out), value
        if needs_projection:
            shortcut = f"{name}.downsample"
            conv, norm = f"{shortcut}.0", f"{shortcut}.1"
            self.nodes.append(Conv(conv, norm, value, shortcut, (out,), (group,), 1, stride, activation="none"))
        self.nodes.append(Add(f"{name}.add", (inner, shortcut), name, (out,)))
        return name, out

    def _add_convs(self, name: str, stage: int, stride: int, value: str, group: str, out: str) -> str:
        last = len(self.block.kernels) - 1
        columns: Channels = (group,)
        for index, kernel in enumerate(self.block.kernels):
            conv, norm = f"{name}.conv{index + 1}", f"{name}.bn{index + 1}"
            step = stride if index == self.block.strided else 1
            if index == 0 and self.is_ibn and stage < IBN_STAGES:
                value, columns = self._add_ibn(conv, norm, stage, step, value, columns, kernel)
                continue
            rows = (out,) if index == last else (self._add_group(f"{name}.{'ab'[index]}", stage),)
            activation = "none" if index == last else "relu"
            self.nodes.append(Conv(conv, norm, value, conv, rows, columns, kernel, step, activation))  # type: ignore[arg-type]
            value, columns = conv, rows
        return value

    def _add_group(self, name: str, stage: int, share: Fraction | int = 1) -> str:
        self.groups[name] = Group(name, stage, share)
        return name

    def _add_ibn(
        self, conv: str, norm: str, stage: int, stride: int, value: str, columns: Channels, kernel: int
    ) -> tuple[str, Channels]:
        """A convolution whose first half of channels is normalised per instance, the second per batch."""
        block, half = conv.rpartition(".")[0], Fraction(1, 2)
        rows = (self._add_group(f"{block}.a.in", stage, half), self._add_group(f"{block}.a.bn", stage, half))
        mixed = f"{conv}.mixed"
        self.nodes.append(
            Conv(conv, f"{norm}.BN", value, mixed, rows, columns, kernel, stride, "none", norm_rows=rows[1:])
        )
        self.nodes.append(InstanceNorm(f"{norm}.IN", mixed, conv, rows[:1], rows, "relu"))
        return conv, rows
