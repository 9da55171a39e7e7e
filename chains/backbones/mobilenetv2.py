"""MobileNetV2 of any width as a plain torch module: Sandler et al., CVPR 2018, with torchreid's names and strides.

The matching table without torch is in `chains/architectures/mobilenetv2.py`; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from chains.architectures.mobilenetv2 import STAGES, Stage, inner, table
from chains.backbones.base import Backbone
from chains.width import Width


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu6(self.bn(self.conv(x)))


class InvertedResidual(nn.Module):
    """1×1 to `inner` channels, 3×3 depthwise, 1×1 to the output, which stays linear."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, *, has_shortcut: bool) -> None:
        super().__init__()
        self.conv1 = Unit(inputs, inner)
        self.dwconv2 = Unit(inner, inner, 3, stride, groups=inner)
        self.conv3 = nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.has_shortcut = has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(self.dwconv2(self.conv1(x)))
        return out + x if self.has_shortcut else out


class MobileNetV2(Backbone):
    """Images (batch, 3, H, W) → feature map (batch, `channels`, H / 32, W / 32)."""

    def __init__(self, name: str, width: Width) -> None:
        super().__init__()
        sizes = table(name).group_sizes(width)
        self.conv1 = Unit(3, sizes["stem"], 3, 2)
        inputs = sizes["stem"]
        for stage in STAGES:
            self.add_module(stage.name, _blocks(stage, inputs, sizes))
            inputs = sizes[stage.name]
        self.channels = sizes["conv9"]
        self.conv9 = Unit(inputs, self.channels)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.conv1(images)
        for stage in STAGES:
            x = self.get_submodule(stage.name)(x)
        out: Tensor = self.conv9(x)
        return out


def _blocks(stage: Stage, inputs: int, sizes: Mapping[str, int]) -> nn.Sequential:
    """A shortcut goes by its place, not by its widths: stages that come out equally wide in a narrow student have no
    more of them than the teacher's."""
    outputs, blocks = sizes[stage.name], []
    for index in range(stage.blocks):
        widened = sizes[inner(f"{stage.name}.{index}")]
        stride = stage.stride if index == 0 else 1
        blocks.append(InvertedResidual(inputs, widened, outputs, stride, has_shortcut=index > 0))
        inputs = outputs
    return nn.Sequential(*blocks)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
