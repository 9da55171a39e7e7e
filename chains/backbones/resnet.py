"""ResNets of any width, with or without IBN-a, in the variants of the toolkits, as plain torch modules.

Tensor names are torchvision's, so that its checkpoints and those of every ReID toolkit built on it line up. The
matching table without torch, and what the names of variants mean, is in `chains/architectures/resnet.py`; a test holds
the two together. Residual networks: He et al., CVPR 2016; last stride 1: Luo et al., CVPRW 2019; IBN-a: Pan et al.,
ECCV 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from chains.architectures.resnet import BASIC, IBN_STAGES, Reduction, Settings, settings
from chains.backbones.base import Backbone
from chains.width import Width


class HalfInstanceNorm(nn.Module):
    """IBN-a's normalisation: the first half of the channels per instance, the others per batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)  # the authors' names
        self.BN = nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        half = self.IN.num_features
        return torch.cat((self.IN(x[:, :half]), self.BN(x[:, half:])), dim=1)


def _first_norm(inner: int, is_ibn: bool) -> nn.Module:
    return HalfInstanceNorm(inner) if is_ibn else nn.BatchNorm2d(inner)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the first carries the stride."""

    expansion = 1

    def __init__(self, inputs: int, inner: int, stride: int, *, projects: bool, is_ibn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = _first_norm(inner, is_ibn)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.downsample = _projection(inputs, inner, stride) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1; the 3×3 carries the stride and the output is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, inner: int, stride: int, *, projects: bool, is_ibn: bool) -> None:
        super().__init__()
        outputs = inner * self.expansion
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = _first_norm(inner, is_ibn)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The shortcut of the first block of a stage."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(Backbone):
    """Stem and four stages: images (batch, 3, H, W) → feature map (batch, `channels`, H / 16, W / 16), or a vector
    (batch, `channels`) where the network reduces it in front of the neck."""

    def __init__(self, name: str, width: Width) -> None:
        super().__init__()
        self.settings = settings(name)
        self.conv1 = nn.Conv2d(3, width.stem, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width.stem)
        after = self.settings.pool_pads_after
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if after else 1, ceil_mode=after)
        self.channels = width.stem
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._stage(self.settings, width.stage(stage), stage) for stage in range(4)
        )
        if (reduction := self.settings.reduction) is not None:
            self.add_module(reduction.name, _reducing(self.channels, reduction))
            self.channels = reduction.channels
        self.apply(_initialise)

    def _stage(self, settings: Settings, inner: int, stage: int) -> nn.Sequential:
        """A shortcut projects by its place, not by its widths: a narrow student has the layers of its teacher, also
        where stages 3 and 4 come out equally wide, as in `8x2-4-4`."""
        block = BasicBlock if settings.block is BASIC else Bottleneck
        is_ibn = settings.is_ibn and stage < IBN_STAGES
        blocks: list[nn.Module] = []
        for index in range(settings.depths[stage]):
            projects = index == 0 and (stage > 0 or block.expansion > 1)
            stride = settings.strides[stage] if index == 0 else 1
            blocks.append(block(self.channels, inner, stride, projects=projects, is_ibn=is_ibn))
            self.channels = inner * block.expansion
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images))
        x = self.maxpool(functional.relu(x) if self.settings.has_stem_relu else x)
        out: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if (reduction := self.settings.reduction) is None:
            return out
        reduced: Tensor = self.get_submodule(reduction.name)(out.mean(dim=(2, 3)))
        return functional.relu(reduced) if reduction.is_normed else reduced


def _reducing(inputs: int, reduction: Reduction) -> nn.Sequential:
    """The layers in front of the neck; the ReLU behind their norm is `ResNet`'s."""
    linear = nn.Linear(inputs, reduction.channels, bias=reduction.is_normed)
    return nn.Sequential(linear, nn.BatchNorm1d(reduction.channels)) if reduction.is_normed else nn.Sequential(linear)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
