"""OSNets: stem, three stages of two omni-scale blocks, a linear reduction to 512 numbers. Tensor names are torchreid's.

OSNet: Zhou et al., ICCV 2019; OSNet-IBN and OSNet-AIN: Zhou et al., TPAMI 2021. A width is the stem, and what the
stages have in multiples of it: x1.0 is `64x4-6-8`, x0.25 `16x4-6-8`.

A block has four streams of one to four light convolutions (1×1, then depthwise 3×3) on the same input, and sums them,
each weighed by its gate. The surprise: it is *one* gate. So the last light convolutions of the four streams write one
channel group, while those in front of them each have their own: what a stream holds between two of its layers is seen
by nobody else. The embedding has 512 coordinates at every width, as in the paper, where narrower OSNets keep it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from chains.arch import Architecture, Group
from chains.nodes import (
    EMBEDDING,
    IMAGES,
    Activation,
    Add,
    Conv,
    GlobalPool,
    InstanceNorm,
    Linear,
    Multiply,
    Neck,
    Node,
    Pool,
)
from chains.width import Multipliers

MULTIPLIERS: Multipliers = (4, 6, 8)
STAGES = ("conv2", "conv3", "conv4")
BLOCKS = 2  # of every stage
STREAMS = 4
EMBEDDING_CHANNELS = 512
MIDDLE_SHARE = Fraction(1, 4)  # of a block's output channels
GATE_SHARE = MIDDLE_SHARE / 16


@dataclass(frozen=True)
class Settings:
    """Where an OSNet normalises per instance: behind the stem, instead of per batch; behind the residual sum of some
    blocks; inside the residual of some, in place of its last batch normalisation. is_ain: it has the names of
    torchreid's `osnet_ain.py`, which are others than those of `osnet.py`."""

    has_stem_instance_norm: bool = False
    normed_sums: tuple[str, ...] = ()
    normed_residuals: tuple[str, ...] = ()
    is_ain: bool = False

    def streams(self, block: str) -> Iterator[tuple[str, ...]]:
        """The light convolutions of each stream of `block`, shortest stream first."""
        for index in range(STREAMS):
            if self.is_ain:
                yield tuple(f"{block}.conv2.{index}.layers.{layer}" for layer in range(index + 1))
            else:
                stream = f"{block}.conv2{'abcd'[index]}"
                yield tuple(f"{stream}.{layer}" for layer in range(index + 1)) if index else (stream,)

    def transition(self, stage: str) -> str:
        """What halves the map behind `stage`: a convolution, `.0` in it, and an average pooling."""
        return stage.replace("conv", "pool") if self.is_ain else f"{stage}.{BLOCKS}"


OSNETS = {
    "osnet": Settings(),
    "osnet_ibn": Settings(has_stem_instance_norm=True, normed_sums=("conv2.0", "conv2.1")),
    "osnet_ain": Settings(  # where its architecture search left them
        has_stem_instance_norm=True, normed_residuals=("conv2.0", "conv2.1", "conv3.1", "conv4.0"), is_ain=True
    ),
}


def table(name: str) -> Architecture:
    """The OSNet called `name`."""
    return _Layout(OSNETS[name]).build(name)


class _Layout:
    """Nodes and groups of one OSNet, in the making. Where a node is named after its output, its value has that name."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.groups: dict[str, Group] = {}
        self.nodes: list[Node] = []

    def build(self, name: str) -> Architecture:
        self._add_stem(self._add_group(Group("stem")))
        value, group = "maxpool", "stem"
        for stage, layer in enumerate(STAGES, start=1):
            out = self._add_group(Group(layer, stage))
            for index in range(BLOCKS):
                value, group = self._add_block(f"{layer}.{index}", stage, index, value, group, out), out
            if layer != STAGES[-1]:
                value = group = self._add_transition(layer, stage, value, group)
        last = self._add_group(Group("conv5", len(STAGES)))
        value = self._add_unit("conv5", value, last, group)
        self._add_embedding(value, last)
        return Architecture(name, self.groups, tuple(self.nodes), MULTIPLIERS)

    def _add_stem(self, stem: str) -> None:
        is_normed = self.settings.has_stem_instance_norm
        norm, value, activation = (None, "conv1.conv", "none") if is_normed else ("conv1.bn", "conv1", "relu")
        self.nodes.append(
            Conv("conv1.conv", norm, IMAGES, value, (stem,), None, kernel=7, stride=2, activation=activation)  # type: ignore[arg-type] # mypy widens it to str
        )
        if is_normed:
            self.nodes.append(InstanceNorm("conv1.bn", value, "conv1", (stem,), (stem,), "relu"))
        self.nodes.append(Pool("max", "maxpool", "conv1", "maxpool", kernel=3, stride=2))

    def _add_transition(self, stage: str, index: int, value: str, group: str) -> str:
        """Returns the value and the group, which have the same name."""
        name = self.settings.transition(stage)
        out = self._add_group(Group(name, index))
        value = self._add_unit(f"{name}.0", value, out, group)
        self.nodes.append(Pool("average", f"{name}.1", value, name, kernel=2, stride=2))
        return name

    def _add_embedding(self, value: str, group: str) -> None:
        reduced = self._add_group(Group("fc", constant=EMBEDDING_CHANNELS))
        self.nodes.append(GlobalPool("global_avgpool", value, "pooled"))
        self.nodes.append(Linear("fc.0", "fc.1", "pooled", "fc", (reduced,), (group,), "relu"))
        self.nodes.append(Neck("neck", "fc", EMBEDDING, (reduced,), pools=False))

    def _add_block(self, name: str, stage: int, index: int, value: str, group: str, out: str) -> str:
        middle = self._add_group(Group(f"{name}.conv1", stage, MIDDLE_SHARE, rounds="down"))
        inner = self._add_unit(f"{name}.conv1", value, middle, group)
        summed, tails = self._add_streams(name, stage, inner, middle)
        residual = self._add_residual(name, summed, out, tails)
        shortcut = value if index else self._add_unit(f"{name}.downsample", value, out, group, "none")
        is_normed = name in self.settings.normed_sums
        total = f"{name}.sum" if is_normed else name
        self.nodes.append(Add(f"{name}.add", (residual, shortcut), total, (out,), "none" if is_normed else "relu"))
        if is_normed:
            self.nodes.append(InstanceNorm(f"{name}.IN", total, name, (out,), (out,), "relu"))
        return name

    def _add_streams(self, block: str, stage: int, value: str, group: str) -> tuple[str, str]:
        """The sum of the gated streams, and its group."""
        tails = self._add_group(Group(f"{block}.streams", stage, MIDDLE_SHARE, rounds="down"))
        self._add_group(Group(f"{block}.gate", stage, GATE_SHARE, rounds="down"))
        gated = []
        for index, stream in enumerate(self.settings.streams(block)):
            out, columns = value, group
            for light in stream:
                is_last = light == stream[-1]
                rows = tails if is_last else self._add_group(Group(light, stage, MIDDLE_SHARE, rounds="down"))
                out, columns = self._add_light(light, out, rows, columns), rows
            gated.append(self._add_gate(block, index, out, tails))
        self.nodes.append(Add(f"{block}.fuse", tuple(gated), f"{block}.fuse", (tails,), "none"))
        return f"{block}.fuse", tails

    def _add_light(self, name: str, value: str, rows: str, columns: str) -> str:
        """A 1×1 convolution without norm or activation, then a depthwise 3×3 on the same channels."""
        point, depth = f"{name}.conv1", f"{name}.conv2"
        self.nodes.append(Conv(point, None, value, point, (rows,), (columns,), kernel=1, activation="none"))
        self.nodes.append(Conv(depth, f"{name}.bn", point, name, (rows,), None, kernel=3, is_depthwise=True))
        return name

    def _add_gate(self, block: str, index: int, value: str, tails: str) -> str:
        """Weighs stream `index`. The layers are the same for every stream; only the values differ."""
        name, use = f"{block}.gate", f"{block}.gate.{index}"
        pooled, hidden, weights, gated = (f"{use}.{step}" for step in ("pool", "fc1", "fc2", "multiply"))
        squeezed, tail = (f"{block}.gate",), (tails,)
        self.nodes += [
            GlobalPool(pooled, value, pooled, keeps_map=True),
            Conv(f"{name}.fc1", None, pooled, hidden, squeezed, tail, 1, bias=True, label=hidden),
            Conv(
                f"{name}.fc2", None, hidden, weights, tail, squeezed, 1, activation="sigmoid", bias=True, label=weights
            ),
            Multiply(gated, (value, weights), gated),
        ]
        return gated

    def _add_residual(self, block: str, value: str, out: str, group: str) -> str:
        """The 1×1 convolution that widens the sum of the streams, with the norm this block has there."""
        name = f"{block}.conv3"
        if block not in self.settings.normed_residuals:
            return self._add_unit(name, value, out, group, "none")
        self.nodes.append(Conv(f"{name}.conv", None, value, name, (out,), (group,), kernel=1, activation="none"))
        self.nodes.append(InstanceNorm(f"{block}.IN", name, f"{block}.residual", (out,), (out,)))
        return f"{block}.residual"

    def _add_unit(self, name: str, value: str, rows: str, columns: str, activation: Activation = "relu") -> str:
        """A 1×1 convolution with its batch norm."""
        self.nodes.append(
            Conv(f"{name}.conv", f"{name}.bn", value, name, (rows,), (columns,), 1, activation=activation)
        )
        return name

    def _add_group(self, group: Group) -> str:
        self.groups[group.name] = group
        return group.name
