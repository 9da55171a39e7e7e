"""Architectures as data: the layers of a network in order, and the channel group of every axis of every tensor.

This table is all the core knows of a backbone. Expansion, costs and the ONNX writer walk it and never mention a ResNet;
a new backbone is a plain torch module, a table (`chains/architectures`) and a test that the two agree. The idea of a
permutation-spec-like table is from git-re-basin (`src/weight_matching.py`).

A channel group is a set of channels that can only be cut together: the stem, each stage's residual stream, each block's
inner widths, each head of an attention. An axis whose channels are cut in blocks lists several groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Literal

from chains.errors import ArchitectureError, WidthError
from chains.nodes import (
    Add,
    ChannelAttention,
    Channels,
    Conv,
    GlobalPool,
    InstanceNorm,
    LayerNorm,
    Linear,
    Neck,
    Node,
    Pool,
    Tokens,
    Weighted,
)
from chains.width import USUAL_MULTIPLIERS, Multipliers, Width

ANY_SIZE = (Conv, Linear, Pool, GlobalPool, Add, InstanceNorm, Neck)  # nodes whose groups may have any sizes
NORM_EPSILON = 1e-5  # of every batch and instance normalisation, the one torch uses by default


@dataclass(frozen=True)
class Group:
    """A channel group of `width.stage(stage) * expansion` channels, or of `constant` ones at every width.

    rounds: an expansion that gives no whole number is rounded, halves up or always down, and never to 0; without it
    such a width is refused.
    """

    name: str
    stage: int = 0
    expansion: int | Fraction = 1
    constant: int | None = None
    rounds: bool | Literal["down"] = False

    def size(self, width: Width) -> int:
        """Raises `WidthError` where `width` gives a part of a channel."""
        if self.constant is not None:
            return self.constant
        exact = width.stage(self.stage) * Fraction(self.expansion)
        if self.rounds:
            return max(1, int(exact if self.rounds == "down" else exact + Fraction(1, 2)))
        if exact.denominator != 1:
            raise WidthError(
                f"width {width} gives {float(exact):.2f} channels in group '{self.name}'; there it must be a multiple "
                f"of {Fraction(self.expansion).denominator}"
            )
        return exact.numerator


@dataclass(frozen=True)
class Axes:
    """The groups of a tensor's rows (axis 0) and columns (axis 1); `None`: not cut, e.g. the RGB input of the stem.

    sums_rows: merging adds rows up instead of averaging them (queries; see `chains.expand`).
    """

    rows: Channels
    columns: Channels | None = None
    sums_rows: bool = False


@dataclass(frozen=True)
class Architecture:
    """A network as data: its groups, and its nodes in execution order.

    multipliers: what a width of this network usually has, () where it is one number. input_size: height and width of
    its images in pixels, where the network has tensors that depend on them. usual_stem: of the network as it was
    published.
    """

    name: str
    groups: Mapping[str, Group]
    nodes: tuple[Node, ...]
    multipliers: Multipliers = USUAL_MULTIPLIERS
    input_size: tuple[int, int] | None = None
    usual_stem: int = 64

    @property
    def usual_width(self) -> Width:
        """The width at which the network was published."""
        return Width(self.usual_stem, self.multipliers)

    @property
    def embedding_channels(self) -> Channels:
        """The groups the embedding's coordinates belong to: what the neck normalises."""
        return self.neck.rows

    def embedding_dim(self, width: Width) -> int:
        """Length of the embeddings of a network of `width`."""
        return total(self.embedding_channels, self.group_sizes(width))

    @cached_property
    def neck(self) -> Neck:
        return next(node for node in self.nodes if isinstance(node, Neck))

    @cached_property
    def axes(self) -> Mapping[str, Axes]:
        """Tensor name -> axes, for every tensor that expansion makes."""
        return {name: axes for node in self.nodes for name, axes in _axes_of(node)}

    @cached_property
    def averaged_axes(self) -> Mapping[str, Axes]:
        """`axes` in `mode: oskt`, where rows are shared and never summed."""
        return {name: Axes(axes.rows, axes.columns) for name, axes in self.axes.items()}

    @cached_property
    def norms(self) -> Mapping[str, Channels]:
        """Normalisation layer name -> its groups, for every layer with a weight and a bias per channel."""
        return {norm: rows for node in self.nodes for norm, rows in _norms_of(node)}

    @cached_property
    def batch_norms(self) -> Mapping[str, Channels]:
        """Those of `norms` that carry `running_mean` and `running_var` per width."""
        nodes = (node for node in self.nodes if isinstance(node, Conv | Linear | Neck))
        return {norm: rows for node in nodes for norm, rows in _norms_of(node)}

    @cached_property
    def step(self) -> int:
        """Stems of this network are multiples of it: those at which every group has whole channels."""
        return lcm(*(Fraction(group.expansion).denominator for group in self.groups.values() if not group.rounds))

    def group_sizes(self, width: Width) -> dict[str, int]:
        """Channels of every group at `width`. Raises `WidthError` for a width of another kind of network."""
        if len(width.multipliers) != len(self.multipliers):
            example = Width(16, self.multipliers)
            raise WidthError(f"{width} is no width of {self.name}; write it as in '{example}'")
        return {name: group.size(width) for name, group in self.groups.items()}

    def fixed(self, sizes: Mapping[str, int]) -> Architecture:
        """The network with `sizes` channels in its groups at every width: what per-layer pruning leaves. Raises
        `ArchitectureError` for a network with heads, gates or tokens, whose groups depend on each other, for sizes that
        are not those of its groups, and for one below 1."""
        if strangers := [node for node in self.nodes if not isinstance(node, ANY_SIZE)]:
            kind = type(strangers[0]).__name__
            raise ArchitectureError(f"the channels of {self.name} cannot be set layer by layer: it has a {kind}")
        if sizes.keys() != self.groups.keys():
            raise ArchitectureError(
                f"sizes of {sorted(sizes.keys() ^ self.groups.keys())[:4]} are not in both {self.name} and the list"
            )
        if empty := [group for group, size in sizes.items() if size < 1]:
            raise ArchitectureError(f"group '{empty[0]}' of {self.name} has {sizes[empty[0]]} channels; at least 1")
        groups = {name: replace(group, constant=sizes[name]) for name, group in self.groups.items()}
        return replace(self, groups=groups)

    def writers(self, group: str) -> tuple[str, ...]:
        """Names of the weight matrices with rows that are channels of `group`: what its rows are clustered on. A gain
        has a group of one channel to itself, and writes it."""
        layers = (node for node in self.nodes if isinstance(node, Conv | Linear) and group in node.rows)
        gains = (node for node in self.nodes if isinstance(node, ChannelAttention) and group in node.gain)
        names = (*(f"{layer.name}.weight" for layer in layers), *(f"{node.name}.gamma" for node in gains))
        return tuple(dict.fromkeys(names))

    def tensor_shapes(self, width: Width) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape at `width`: convs `(out, in, kh, kw)`, linears `(out, in)`, vectors `(out,)`."""
        sizes = self.group_sizes(width)
        return {name: shape for node in self.nodes for name, shape in _shapes_of(node, sizes)}

    def statistic_sizes(self, width: Width) -> dict[str, int]:
        """Batch normalisation layer name -> channels at `width`."""
        return channels_of(self.batch_norms, self.group_sizes(width))

    def norm_sizes(self, width: Width) -> dict[str, int]:
        """Normalisation layer name -> channels at `width`."""
        return channels_of(self.norms, self.group_sizes(width))

    def require_within(self, width: Width, teacher: Width) -> None:
        """Raise `WidthError` unless every group of `width` fits into that of `teacher`."""
        full = self.group_sizes(teacher)
        for group, size in self.group_sizes(width).items():
            if size > full[group]:
                raise WidthError(
                    f"width {width} needs {size} channels in group '{group}'; the teacher {teacher} has {full[group]}"
                )

    def require_sound(self) -> None:
        """Raises `ArchitectureError` for a group that is not known or has no writer, a value nobody makes, a value or
        tensor that two nodes disagree on. For tables under construction: those of this library are tested."""
        made = {"images"}
        for node in self.nodes:
            if unknown := [value for value in node.inputs if value not in made]:
                raise ArchitectureError(f"{self.name}: nobody makes {unknown[0]!r}, which {node.output!r} reads")
            if node.output in made:
                raise ArchitectureError(f"{self.name}: the value {node.output!r} is made twice")
            made.add(node.output)
            for tensor, axes in _axes_of(node):
                if self.axes[tensor] != axes:
                    raise ArchitectureError(f"{self.name}: two nodes give {tensor} other channels")
        named = {group for axes in self.axes.values() for group in (*axes.rows, *(axes.columns or ()))}
        if strangers := named - self.groups.keys():
            raise ArchitectureError(f"{self.name}: the groups {sorted(strangers)[:4]} are not in its list")
        if idle := [group for group in self.groups if not self.writers(group)]:
            raise ArchitectureError(f"{self.name}: no layer's rows are channels of {idle[:4]}")


def channels_of(layers: Mapping[str, Channels], sizes: Mapping[str, int]) -> dict[str, int]:
    """Layer name -> its channels, from its groups and their sizes."""
    return {name: total(groups, sizes) for name, groups in layers.items()}


def total(channels: Channels, sizes: Mapping[str, int]) -> int:
    """How many channels the groups have together."""
    return sum(sizes[group] for group in channels)


def _axes_of(node: Node) -> Iterator[tuple[str, Axes]]:
    match node:
        case Conv() | Linear():
            columns = None if isinstance(node, Conv) and node.is_depthwise else node.columns
            sums = isinstance(node, Linear) and node.is_query
            yield f"{node.name}.weight", Axes(node.rows, columns, sums)
            if node.bias:
                yield f"{node.name}.bias", Axes(node.rows, None, sums)
        case Tokens():
            yield node.name, Axes(node.rows)
        case ChannelAttention():
            yield f"{node.name}.gamma", Axes(node.gain)
    for norm, rows in _norms_of(node):
        yield f"{norm}.weight", Axes(rows)
        yield f"{norm}.bias", Axes(rows)


def _norms_of(node: Node) -> Iterator[tuple[str, Channels]]:
    match node:
        case Conv() | Linear() if node.norm is not None:
            yield node.norm, node.normed_rows
        case Neck():
            yield node.norm, node.rows
        case InstanceNorm() | LayerNorm():
            yield node.name, node.rows


def _shapes_of(node: Node, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, axes in _axes_of(node):
        rows = total(axes.rows, sizes)
        if isinstance(node, Conv | Linear) and name == f"{node.name}.weight":
            yield name, (rows, *weight_tail(node, sizes))
        elif isinstance(node, Tokens):
            yield name, (rows, node.count)
        else:
            yield name, (rows,)


def weight_tail(layer: Weighted, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a layer's weight behind its rows: columns and kernel."""
    if isinstance(layer, Linear):
        return (total(layer.columns, sizes),)
    if layer.is_depthwise:
        return (1, layer.kernel, layer.kernel)
    return (3 if layer.columns is None else total(layer.columns, sizes), layer.kernel, layer.kernel)
