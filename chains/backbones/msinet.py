"""MSINet of any width as a plain torch module: Gu et al., CVPR 2023, with its authors' names, up to its feature.

The matching table without torch, and what is left out of the published network, is in `chains/architectures/msinet.py`;
a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from chains.architectures.msinet import CELLS, HALVES, LAST_STAGE, LONG, TRANSITIONS, Cell, Interaction, table
from chains.backbones.base import Backbone
from chains.backbones.osnet import ConvUnit, Gate, LightConv
from chains.width import Width


class ChannelAttention(nn.Module):
    """own + γ · softmax(−own · otherᵀ) · own, maps (batch, channels, h, w) as (channels, places): each channel takes in
    others of its own map, the more the less these look like it in the other map. γ starts at zero.

    Sums over the places run to hundreds, which half precision has in whole numbers, so this is never computed in it."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        precision = torch.promote_types(own.dtype, torch.float32)
        with torch.autocast(own.device.type, enabled=False):
            values, keys = (branch.flatten(2).to(precision) for branch in (own, other))
            weights = torch.softmax(-(values @ keys.transpose(1, 2)), dim=-1)  # (batch, channels, channels)
            return own + self.gamma * (weights @ values).reshape(own.shape)


class InteractingCell(nn.Module):
    """A residual cell of a short and a long branch of light convolutions, which interact twice. sizes: channels of the
    groups of the table."""

    def __init__(self, cell: Cell, inputs: int, sizes: Mapping[str, int]) -> None:
        super().__init__()
        name, outputs, middle = cell.name, sizes[cell.group], sizes[f"{cell.name}.conv1a"]
        self.interactions = cell.interactions
        self.conv1a, self.conv1b = ConvUnit(inputs, middle), ConvUnit(inputs, middle)
        self.conv2a, self.conv2b = LightConv(middle), _long_part(middle)
        self.conv3a, self.conv3b = LightConv(middle), _long_part(middle)
        self._op2, self._op3 = (
            _interacting(interaction, middle, sizes.get(f"{name}._op{place}", 0))
            for place, interaction in zip((2, 3), cell.interactions, strict=True)
        )
        self.conv4a, self.conv4b = (ConvUnit(middle, outputs, is_linear=True) for _ in "ab")
        self.downsample = ConvUnit(inputs, outputs, is_linear=True) if cell.is_first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.interactions
        a, b = self.conv1a(x), self.conv1b(x)
        a, b = _interact(first, self._op2, self.conv2a(a), self.conv2b(b))
        a, b = _interact(second, self._op3, self.conv3a(a), self.conv3b(b))
        return functional.relu(self.conv4a(a) + self.conv4b(b) + self.downsample(x))


class MSINet(Backbone):
    """Images (batch, 3, H, W) → feature (batch, `channels`): averages of the last map, and of the halves of the map in
    front of the last stage."""

    def __init__(self, name: str, width: Width) -> None:
        super().__init__()
        sizes = table(name).group_sizes(width)
        self.conv1 = ConvUnit(3, width.stem, 7, 2)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.cells = nn.Sequential()
        inputs = width.stem
        for cell in CELLS:
            if cell.is_first and cell.stage - 1 in TRANSITIONS:
                self.cells.append(nn.Sequential(ConvUnit(inputs, inputs), nn.AvgPool2d(2, 2)))
            self.cells.append(InteractingCell(cell, inputs, sizes))
            inputs = sizes[cell.group]
        self.f_conv = nn.Conv2d(width.stage(2), sizes[HALVES], 1)
        self.channels = inputs + 2 * sizes[HALVES]
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        x = self.cells[:LAST_STAGE](self.maxpool(self.conv1(images)))
        last: Tensor = self.cells[LAST_STAGE:](x)
        return torch.cat((last.mean(dim=(2, 3)), *_half_means(self.f_conv(x))), dim=1)


def _half_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, channels, h, w) → upper, lower (batch, channels). Of an odd number of rows the middle one is in both."""
    rows = x.shape[2]
    return x[:, :, : (rows + 1) // 2].mean(dim=(2, 3)), x[:, :, rows // 2 :].mean(dim=(2, 3))


def _long_part(channels: int) -> nn.Sequential:
    return nn.Sequential(*(LightConv(channels) for _ in range(LONG)))


def _interacting(interaction: Interaction, channels: int, inner: int) -> nn.Module:
    """What an interaction learns. inner: of a gate."""
    if interaction == "gate":
        return Gate(channels, inner)
    return ChannelAttention() if interaction == "attention" else nn.Identity()


def _interact(interaction: Interaction, module: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    match interaction:
        case "none":
            return a, b
        case "exchange":
            return b, a
        case "gate":
            return module(a), module(b)
        case "attention":
            return module(a, b), module(b, a)


def _initialise(module: nn.Module) -> None:
    """Norms start as the identity by torch's default, attentions because their γ is zero."""
    if isinstance(module, nn.Conv2d):
        # torch's fan_out leaves the groups out; that of a depthwise convolution is its fan_in
        mode = "fan_out" if module.groups == 1 else "fan_in"
        nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
        if module.bias is not None:
            nn.init.zeros_(module.bias)
