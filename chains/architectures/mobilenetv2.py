"""MobileNetV2: a stem, seventeen blocks that widen, filter and narrow again, a last 1×1 convolution, the neck.

Sandler et al., CVPR 2018. Tensor names are torchreid's (torchreid/models/mobilenetv2.py), and so is the network: its
first block has a 1×1 convolution too, which torchvision's lacks, and the last stride is 2, so that images of 256×128
end as maps of 8×4. A width is one number, the stem: `w32` is the published network, and at other stems every group
keeps its share of it, rounded. That is not torchreid's x1_4, whose sizes are 1.4 times those of w32, each cut to a
whole number: no stem gives them.

Blocks of a stage are joined by shortcuts, all but the first: those of one stage write one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from chains.arch import Architecture, Group
from chains.nodes import EMBEDDING, IMAGES, Add, Channels, Conv, Neck, Node

MOBILENETV2 = "mobilenetv2"
PUBLISHED_STEM = 32
LAST_CHANNELS = 1280  # at the published stem, as all channels here


@dataclass(frozen=True)
class Stage:
    """Blocks of equal output. widening: a block's inner channels per channel it reads; stride: of the first block."""

    name: str
    channels: int
    blocks: int
    stride: int
    widening: int = 6


STAGES = (
    Stage("conv2", 16, blocks=1, stride=1, widening=1),
    Stage("conv3", 24, blocks=2, stride=2),
    Stage("conv4", 32, blocks=3, stride=2),
    Stage("conv5", 64, blocks=4, stride=2),
    Stage("conv6", 96, blocks=3, stride=1),
    Stage("conv7", 160, blocks=3, stride=2),
    Stage("conv8", 320, blocks=1, stride=1),
)


def table(name: str) -> Architecture:
    """The MobileNetV2; `name` is what the architecture will be called."""
    return _Layout().build(name)


def inner(block: str) -> str:
    """The group that a block widens to."""
    return f"{block}.inner"


class _Layout:
    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.nodes: list[Node] = []

    def build(self, name: str) -> Architecture:
        channels, group = PUBLISHED_STEM, self._add_group("stem", PUBLISHED_STEM)
        value = self._add_unit("conv1", IMAGES, group, None, kernel=3, stride=2)
        for stage in STAGES:
            out = self._add_group(stage.name, stage.channels)
            for index in range(stage.blocks):
                block = f"{stage.name}.{index}"
                self._add_group(inner(block), channels * stage.widening)
                value = self._add_block(block, value, group, out, stage.stride if index == 0 else 1)
                channels, group = stage.channels, out
        last = self._add_group("conv9", LAST_CHANNELS)
        value = self._add_unit("conv9", value, last, (group,))
        self.nodes.append(Neck("neck", value, EMBEDDING, (last,)))
        return Architecture(name, self.groups, tuple(self.nodes), multipliers=(), usual_stem=PUBLISHED_STEM)

    def _add_group(self, name: str, channels: int) -> str:
        self.groups[name] = Group(name, expansion=Fraction(channels, PUBLISHED_STEM), rounds=True)
        return name

    def _add_block(self, name: str, value: str, group: str, out: str, stride: int) -> str:
        """Its input is added where it has the channels of the output: in all blocks of a stage but the first."""
        rows = inner(name)
        widened = self._add_unit(f"{name}.conv1", value, rows, (group,))
        filtered = self._add_unit(f"{name}.dwconv2", widened, rows, None, kernel=3, stride=stride, is_depthwise=True)
        narrow = f"{name}.conv3"
        narrowed = name if out != group else narrow
        self.nodes.append(
            Conv(f"{narrow}.0", f"{narrow}.1", filtered, narrowed, (out,), (rows,), kernel=1, activation="none")
        )
        if out == group:
            self.nodes.append(Add(f"{name}.add", (value, narrowed), name, (out,), "none"))
        return name

    def _add_unit(
        self,
        name: str,
        value: str,
        group: str,
        columns: Channels | None,
        kernel: int = 1,
        stride: int = 1,
        *,
        is_depthwise: bool = False,
    ) -> str:
        """Convolution, norm, ReLU6."""
        self.nodes.append(
            Conv(
                f"{name}.conv",
                f"{name}.bn",
                value,
                name,
                (group,),
                columns,
                kernel,
                stride,
                "relu6",
                is_depthwise=is_depthwise,
            )
        )
        return name
