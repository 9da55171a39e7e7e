"""MSINet: stem, three stages of two cells, whose two branches interact twice, the neck. Tensor names are its authors'.

Gu et al., CVPR 2023 (reid/models/msinet.py), with the interactions their search on MSMT17 found: its light convolutions
and gates are OSNet's, its channel attention is its own. A width is written as OSNet's; `64x4-6-8` is as published.

The feature is the one they test with inside a domain: the average of the last map, 512 numbers, and behind it those of
the upper and of the lower half of an earlier one (`f_conv`), 128 each. What trains beside it, and what turns it into
the embedding of their tests in other domains (`fc`, `head`, `f_fc`, `f_head`), is left out: the neck is ours.

A gate is one for both branches, and channel attention matches their channels one by one: where either joins two
branches, the layers in front of it write one group. Branches that only change places keep a group each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chains.arch import Architecture, Group
from chains.architectures.osnet import GATE_SHARE, MIDDLE_SHARE, MULTIPLIERS
from chains.nodes import (
    EMBEDDING,
    IMAGES,
    Activation,
    Add,
    ChannelAttention,
    Concat,
    Conv,
    GlobalPool,
    HalfPool,
    Multiply,
    Neck,
    Node,
    Pool,
)

MSINET = "msinet"
LONG = 3  # light convolutions of the long branch in front of each interaction; the short one has one
GAIN = "gain"  # the group of every attention's γ

Interaction = Literal["none", "exchange", "gate", "attention"]


@dataclass(frozen=True)
class Cell:
    """A residual cell: its stage, from 1, and how its branches interact behind the first and the second light part."""

    name: str
    stage: int
    interactions: tuple[Interaction, Interaction]

    @property
    def group(self) -> str:
        """The group of its output: that of the stage."""
        return f"stage{self.stage}"

    @property
    def is_first(self) -> bool:
        """Of its stage: its shortcut is projected."""
        return int(self.name.rpartition(".")[2]) % 3 == 0


CELLS = (  # between the stages stand the transitions, cells.2 and cells.5
    Cell("cells.0", 1, ("gate", "gate")),
    Cell("cells.1", 1, ("exchange", "gate")),
    Cell("cells.3", 2, ("attention", "gate")),
    Cell("cells.4", 2, ("gate", "none")),
    Cell("cells.6", 3, ("gate", "attention")),
    Cell("cells.7", 3, ("exchange", "attention")),
)
TRANSITIONS = {1: "cells.2", 2: "cells.5"}  # behind which stage
LAST_STAGE = 6  # number of its first cell
HALVES = "f_conv"  # the 1×1 convolution of the halves of the map behind the last transition, and its group
HALF_CHANNELS = 2  # of each half, per channel of the stem


@dataclass(frozen=True)
class Branch:
    """A value and the group of its channels."""

    value: str
    group: str


Branches = tuple[Branch, Branch]


def table(name: str) -> Architecture:
    """The MSINet; `name` is what the architecture will be called."""
    return _Layout().build(name)


class _Layout:
    """Nodes and groups in the making. Where a node is named after its output, its value has that name."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.nodes: list[Node] = []

    def build(self, name: str) -> Architecture:
        self._add_group(Group(GAIN, constant=1))
        value, group = self._add_stem()
        for cell in CELLS:
            if cell.is_first:
                value, group = self._add_transition(cell.stage - 1, value, group)
                self._add_group(Group(cell.group, cell.stage))
                if cell.stage - 1 == max(TRANSITIONS):
                    self._add_halves(value, group)
            value, group = self._add_cell(cell, value, group)
        self.nodes.append(GlobalPool("average", value, "average"))
        self.nodes.append(Concat("feature", ("average", "halves"), "feature"))
        self.nodes.append(Neck("neck", "feature", EMBEDDING, (group, HALVES, HALVES), pools=False))
        return Architecture(name, self.groups, tuple(self.nodes), MULTIPLIERS)

    def _add_stem(self) -> tuple[str, str]:
        stem = self._add_group(Group("stem"))
        self.nodes.append(Conv("conv1.conv", "conv1.bn", IMAGES, "conv1", (stem,), None, kernel=7, stride=2))
        self.nodes.append(Pool("max", "maxpool", "conv1", "maxpool", kernel=3, stride=2))
        return "maxpool", stem

    def _add_transition(self, stage: int, value: str, group: str) -> tuple[str, str]:
        """Halves the map behind `stage`; behind the stem, 0, there is nothing to do."""
        if stage not in TRANSITIONS:
            return value, group
        name = TRANSITIONS[stage]
        out = self._add_group(Group(name, stage))
        value = self._add_unit(f"{name}.0", value, out, group)
        self.nodes.append(Pool("average", f"{name}.1", value, name, kernel=2, stride=2))
        return name, out

    def _add_halves(self, value: str, group: str) -> None:
        rows = (self._add_group(Group(HALVES, expansion=HALF_CHANNELS)),)
        self.nodes.append(Conv(HALVES, None, value, HALVES, rows, (group,), kernel=1, activation="none", bias=True))
        self.nodes.append(HalfPool("halves", HALVES, "halves"))

    def _add_cell(self, cell: Cell, value: str, group: str) -> tuple[str, str]:
        name, out = cell.name, cell.group
        branches = self._add_unit_of(cell, "conv1a", value, group), self._add_unit_of(cell, "conv1b", value, group)
        for place, interaction in zip((2, 3), cell.interactions, strict=True):
            branches = self._add_light_parts(cell, place, branches, is_tied=interaction in ("gate", "attention"))
            branches = self._add_interaction(cell, f"{name}._op{place}", interaction, branches)
        ends = [
            self._add_unit(f"{name}.conv4{letter}", branch.value, out, branch.group, "none")
            for letter, branch in zip("ab", branches, strict=True)
        ]
        shortcut = self._add_unit(f"{name}.downsample", value, out, group, "none") if cell.is_first else value
        self.nodes.append(Add(f"{name}.add", (*ends, shortcut), name, (out,)))
        return name, out

    def _add_unit_of(self, cell: Cell, layer: str, value: str, columns: str) -> Branch:
        name = f"{cell.name}.{layer}"
        rows = self._add_middle(cell, name)
        return Branch(self._add_unit(name, value, rows, columns), rows)

    def _add_light_parts(self, cell: Cell, place: int, branches: Branches, *, is_tied: bool) -> Branches:
        """One light convolution on the short branch, three on the long one. is_tied: both end in one group."""
        short, long = (f"{cell.name}.conv{place}{letter}" for letter in "ab")
        tied = self._add_middle(cell, f"{cell.name}.tails{place}") if is_tied else None
        first = self._add_light(cell, short, branches[0], tied)
        second = branches[1]
        for index in range(LONG):
            second = self._add_light(cell, f"{long}.{index}", second, tied if index == LONG - 1 else None)
        return first, second

    def _add_light(self, cell: Cell, name: str, branch: Branch, rows: str | None) -> Branch:
        """A 1×1 convolution without norm or activation, then a depthwise 3×3. rows: `None` for a group of its own."""
        point, depth = f"{name}.conv1", f"{name}.conv2"
        group = self._add_middle(cell, name) if rows is None else rows
        self.nodes.append(
            Conv(point, None, branch.value, point, (group,), (branch.group,), kernel=1, activation="none")
        )
        self.nodes.append(Conv(depth, f"{name}.bn", point, name, (group,), None, kernel=3, is_depthwise=True))
        return Branch(name, group)

    def _add_interaction(self, cell: Cell, name: str, interaction: Interaction, branches: Branches) -> Branches:
        short, long = branches
        match interaction:
            case "none":
                return branches
            case "exchange":
                return long, short
            case "gate":
                self._add_group(Group(name, cell.stage, GATE_SHARE, rounds="down"))
                return self._add_gate(name, f"{name}.a", short), self._add_gate(name, f"{name}.b", long)
            case "attention":
                return self._add_attention(name, "a", short, long), self._add_attention(name, "b", long, short)

    def _add_attention(self, name: str, letter: str, own: Branch, other: Branch) -> Branch:
        use = f"{name}.{letter}"
        self.nodes.append(ChannelAttention(name, (own.value, other.value), use, (GAIN,), label=use))
        return Branch(use, own.group)

    def _add_gate(self, name: str, use: str, branch: Branch) -> Branch:
        """The layers of `name` on one of its branches, as OSNet has them."""
        pooled, hidden, weights = (f"{use}.{step}" for step in ("pool", "fc1", "fc2"))
        rows, squeezed = (branch.group,), (name,)
        self.nodes += [
            GlobalPool(pooled, branch.value, pooled, keeps_map=True),
            Conv(f"{name}.fc1", None, pooled, hidden, squeezed, rows, 1, bias=True, label=hidden),
            Conv(
                f"{name}.fc2", None, hidden, weights, rows, squeezed, 1, activation="sigmoid", bias=True, label=weights
            ),
            Multiply(use, (branch.value, weights), use),
        ]
        return Branch(use, branch.group)

    def _add_unit(self, name: str, value: str, rows: str, columns: str, activation: Activation = "relu") -> str:
        """A 1×1 convolution with its batch norm."""
        self.nodes.append(
            Conv(f"{name}.conv", f"{name}.bn", value, name, (rows,), (columns,), 1, activation=activation)
        )
        return name

    def _add_middle(self, cell: Cell, name: str) -> str:
        """A group inside a cell."""
        return self._add_group(Group(name, cell.stage, MIDDLE_SHARE, rounds="down"))

    def _add_group(self, group: Group) -> str:
        self.groups[group.name] = group
        return group.name
