"""ResNet-18 and ResNet-50 of any width, last stride 1, as plain torch modules.

Tensor names are torchvision's, so that its checkpoints and those of every ReID toolkit built on it line up. The
matching table without torch is in `chains/arch.py`; a test holds the two together. Residual networks: He et al., CVPR
2016; last stride 1: Luo et al., CVPRW 2019.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from chains.arch import STAGE_STRIDES
from chains.width import Width


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the first carries the stride."""

    expansion = 1

    def __init__(self, inputs: int, inner: int, stride: int, *, projects: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.downsample = _projection(inputs, inner, stride) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1; the 3×3 carries the stride and the output is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, inner: int, stride: int, *, projects: bool) -> None:
        super().__init__()
        outputs = inner * self.expansion
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
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


class ResNet(nn.Module):
    """Stem and four stages: images (batch, 3, H, W) → feature map (batch, `channels`, H / 16, W / 16)."""

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], width: Width) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width.stem, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width.stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.channels = width.stem
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._stage(block, depth, width.stage(index), index) for index, depth in enumerate(depths)
        )
        self.apply(_initialise)

    def _stage(self, block: type[BasicBlock | Bottleneck], depth: int, inner: int, stage: int) -> nn.Sequential:
        """A shortcut projects by its place, not by its widths: a narrow student has the layers of its teacher, also
        where stages 3 and 4 come out equally wide, as in `8x2-4-4`."""
        blocks: list[nn.Module] = []
        for index in range(depth):
            projects = index == 0 and (stage > 0 or block.expansion > 1)
            stride = STAGE_STRIDES[stage] if index == 0 else 1
            blocks.append(block(self.channels, inner, stride, projects=projects))
            self.channels = inner * block.expansion
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(images))))
        out: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"resnet18": BasicBlock, "resnet50": Bottleneck}
