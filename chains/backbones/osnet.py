"""OSNets of any width, with or without instance normalisation, as plain torch modules.

Tensor names are torchreid's, so that its checkpoints load as they are. The matching table without torch is in
`chains/architectures/osnet.py`; a test holds the two together. OSNet: Zhou et al., ICCV 2019; OSNet-IBN and OSNet-AIN:
Zhou et al., TPAMI 2021.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from chains.architectures.osnet import (
    BLOCKS,
    EMBEDDING_CHANNELS,
    GATE_SHARE,
    MIDDLE_SHARE,
    OSNETS,
    STAGES,
    STREAMS,
    Settings,
)
from chains.backbones.base import Backbone
from chains.width import Width


class ConvUnit(nn.Module):
    """A convolution, a normalisation (of batches, if it is not given) and, unless it `is_linear`, a ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        norm: nn.Module | None = None,
        is_linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs) if norm is None else norm
        self.is_linear = is_linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out if self.is_linear else functional.relu(out)


class LightConv(nn.Module):
    """A 3×3 convolution in two: 1×1 without norm or activation, then depthwise 3×3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv2(self.conv1(x))))


class LightStream(nn.Module):
    """Light convolutions one after another, under the name they have in OSNet-AIN."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.layers = _light_convs(channels, length)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Gate(nn.Module):
    """Weighs the channels of a map by what two 1×1 convolutions make of its average."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.fc2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))
        return x * torch.sigmoid(self.fc2(hidden))


class OmniScaleBlock(nn.Module):
    """A residual block of four streams of one to four light convolutions, which pass one and the same gate."""

    def __init__(self, name: str, inputs: int, outputs: int, settings: Settings, *, projects: bool) -> None:
        super().__init__()
        middle = _share(outputs, MIDDLE_SHARE)
        self.is_ain = settings.is_ain
        self.norms_sum, self.norms_residual = name in settings.normed_sums, name in settings.normed_residuals
        self.conv1 = ConvUnit(inputs, middle)
        self._add_streams(middle)
        self.gate = Gate(middle, _share(outputs, GATE_SHARE))
        self.conv3 = ConvUnit(middle, outputs, norm=nn.Identity() if self.norms_residual else None, is_linear=True)
        self.downsample = ConvUnit(inputs, outputs, is_linear=True) if projects else nn.Identity()
        if self.norms_sum or self.norms_residual:
            self.IN = nn.InstanceNorm2d(outputs, affine=True)

    def _add_streams(self, channels: int) -> None:
        if self.is_ain:
            self.conv2 = nn.ModuleList(LightStream(channels, length + 1) for length in range(STREAMS))
        else:
            self.conv2a = LightConv(channels)
            self.conv2b, self.conv2c, self.conv2d = (_light_convs(channels, length) for length in (2, 3, 4))

    @property
    def streams(self) -> Iterable[nn.Module]:
        return self.conv2 if self.is_ain else (self.conv2a, self.conv2b, self.conv2c, self.conv2d)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(x)
        first, second, third, fourth = (self.gate(stream(inner)) for stream in self.streams)
        out = self.conv3(first + second + third + fourth)
        if self.norms_residual:
            out = self.IN(out)
        out = out + self.downsample(x)
        return functional.relu(self.IN(out) if self.norms_sum else out)


class OSNet(Backbone):
    """Images (batch, 3, H, W) → feature (batch, 512), that of the reduction behind the global average: not negative."""

    channels = EMBEDDING_CHANNELS

    def __init__(self, name: str, width: Width) -> None:
        super().__init__()
        settings = OSNETS[name]
        norm = nn.InstanceNorm2d(width.stem, affine=True) if settings.has_stem_instance_norm else None
        self.conv1 = ConvUnit(3, width.stem, 7, 2, norm=norm)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.conv2, self.conv3, self.conv4 = (self._stage(stage, width, settings) for stage in STAGES)
        self.pool2, self.pool3 = (
            _transition(width.stage(stage)) if settings.is_ain else nn.Identity() for stage in (1, 2)
        )
        last = width.stage(len(STAGES))
        self.conv5 = ConvUnit(last, last)
        reduction = nn.Linear(last, EMBEDDING_CHANNELS)
        self.fc = nn.Sequential(reduction, nn.BatchNorm1d(EMBEDDING_CHANNELS), nn.ReLU())
        self.apply(_initialise)

    @staticmethod
    def _stage(name: str, width: Width, settings: Settings) -> nn.Sequential:
        """Its first block projects the shortcut by its place, not by its widths, as our ResNets do."""
        index = STAGES.index(name) + 1
        outputs = width.stage(index)
        layers: list[nn.Module] = []
        for block in range(BLOCKS):
            inputs = outputs if block else width.stage(index - 1)
            layers.append(OmniScaleBlock(f"{name}.{block}", inputs, outputs, settings, projects=block == 0))
        if name != STAGES[-1] and not settings.is_ain:
            layers.append(_transition(outputs))
        return nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool2(self.conv2(self.maxpool(self.conv1(images))))
        x = self.conv5(self.conv4(self.pool3(self.conv3(x))))
        feature: Tensor = self.fc(x.mean(dim=(2, 3)))
        return feature


def _light_convs(channels: int, length: int) -> nn.Sequential:
    return nn.Sequential(*(LightConv(channels) for _ in range(length)))


def _transition(channels: int) -> nn.Sequential:
    """Halves the height and the width of a map."""
    return nn.Sequential(ConvUnit(channels, channels), nn.AvgPool2d(2, 2))


def _share(channels: int, share: Fraction) -> int:
    return max(1, int(channels * share))


def _initialise(module: nn.Module) -> None:
    """Norms start as the identity by torch's default."""
    if isinstance(module, nn.Conv2d):
        # torch's fan_out leaves the groups out; that of a depthwise convolution is its fan_in
        mode = "fan_out" if module.groups == 1 else "fan_in"
        nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
