"""The initialisers of a student's ONNX graph: small ones ready, weights expanded as they are read.

Batch normalisation is folded into the convolution in front of it: with s = γ / √(var + ε) per row,

    W' = W · s        bias = β + (b - mean) · s        all in float32, b: the layer's own bias, if it has one

and 1/√d, what an attention scales its products by, into the queries.

Expansion sums left to right (`chains/expand.py`) and the rest are single IEEE operations per element, so the same chain
gives the same bytes on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chains.arch import NORM_EPSILON, Axes
from chains.chain import AFFINE, STATISTICS, Chain, Floats, InputSpec
from chains.cost import FLOAT_BYTES, has_bias
from chains.cut import Cuts, Runs
from chains.expand import expand_tensor, merge, query_factor
from chains.nodes import ChannelAttention, Channels, Conv, InstanceNorm, LayerNorm, Linear, Neck, Node, Tokens, Weighted
from chains.onnxgraph import LIFT, NECK_SCALE, NECK_SHIFT, PIXEL_SCALE, PIXEL_SHIFT
from chains.width import Width

SLAB_BYTES = (
    1024 * 1024
)  # teacher columns of the rows expanded at once: it fits a core's cache, and numpy's calls are few


@dataclass(frozen=True, eq=False)
class Constant:
    """An initialiser that is ready: float32 or int64 values, little-endian."""

    name: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size_bytes(self) -> int:
        return self.values.nbytes

    def is_finite(self, _: Mapping[str, Floats]) -> bool:
        return bool(np.isfinite(self.values).all())


@dataclass(frozen=True, eq=False)
class Weight:
    """A layer's folded weight, made when it is read; it knows the chain's tensor by name only.

    shape: as the chain's tensor, (rows, …). rows, columns: runs of it. scale: float32 (rows, 1, …). is_transposed: the
    file holds (columns, rows), what `MatMul` reads. sums_rows: as of `chains.arch.Axes`.
    """

    name: str
    student_shape: tuple[int, ...]
    rows: Runs
    columns: Runs | None
    scale: Floats
    is_transposed: bool = False
    sums_rows: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As it stands in the file."""
        return self.student_shape[::-1] if self.is_transposed else self.student_shape

    @property
    def size_bytes(self) -> int:
        return FLOAT_BYTES * prod(self.shape)

    def is_finite(self, tensors: Mapping[str, Floats]) -> bool:
        """Whether every number is, once made; a slab in memory at a time."""
        slabs = self.pieces(tensors, 0, self.size_bytes)
        return all(bool(np.isfinite(np.frombuffer(slab, "<f4")).all()) for slab in slabs)

    def pieces(self, tensors: Mapping[str, Floats], start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `start` to `stop` of the data, expanding only what holds them: rows, or columns where transposed."""
        line_bytes = self.size_bytes // self.shape[0]
        first, last = start // line_bytes, -(-stop // line_bytes)
        tensor = tensors[self.name]
        step = max(1, SLAB_BYTES * (tensor.shape[1] if self.is_transposed else len(tensor)) // tensor.nbytes)
        expanded = self._expanded_columns if self.is_transposed else self._expanded_rows
        for line in range(first, last, step):
            data = expanded(tensor, slice(line, min(line + step, last)))
            yield data[max(start - line * line_bytes, 0) : stop - line * line_bytes]

    def _expanded_rows(self, tensor: Floats, window: slice) -> memoryview:
        """The bytes of a window of rows: memory of its own."""
        rows = merge(tensor, self.rows[window], self.columns, sums_rows=self.sums_rows)
        return _bytes_of(rows * self.scale[window])

    def _expanded_columns(self, tensor: Floats, window: slice) -> memoryview:
        """The bytes of a window of columns, each a line: memory of its own."""
        if self.columns is None:
            lines = merge(tensor[:, window], self.rows, sums_rows=self.sums_rows)
        else:
            columns = self.columns[window]
            first, last = int(columns.starts.min()), int(columns.stops.max())
            shifted = Runs(columns.starts - first, columns.stops - first, last - first)
            lines = merge(tensor[:, first:last], self.rows, shifted, sums_rows=self.sums_rows)
        return _bytes_of(np.ascontiguousarray((lines * self.scale).T))


Initialiser = Constant | Weight


def initialisers(chain: Chain, width: Width, cuts: Cuts) -> Iterator[Initialiser]:
    """Weights and biases of every layer in the order of the nodes that read them; a layer that is used again is there
    once."""
    chain.require_calibrated(width)
    maker = _Maker(chain, width, cuts)
    seen: set[str] = set()
    for node in chain.table.nodes:
        for initialiser in maker.of(node):
            if initialiser.name not in seen:
                seen.add(initialiser.name)
                yield initialiser


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes the initialisers of one student."""

    chain: Chain
    width: Width
    cuts: Cuts

    def of(self, node: Node) -> Iterator[Initialiser]:
        match node:
            case Conv() | Linear():
                yield from self._layer(node)
            case Neck():
                scale, shift = self._fold(node.norm, node.rows)
                yield _floats(NECK_SCALE, scale)
                yield _floats(NECK_SHIFT, shift)
            case InstanceNorm() | LayerNorm():
                for kind in AFFINE:
                    yield _floats(f"{node.name}.{kind}", self._affine(f"{node.name}.{kind}", node.rows))
            case Tokens():
                cut = self.cuts.of(node.rows)
                ones = np.ones((len(cut), 1), np.float32)
                yield Weight(node.name, (len(cut), node.count), cut.rows, None, ones, is_transposed=True)
            case ChannelAttention():
                yield _floats(f"{node.name}.gamma", self._vector(f"{node.name}.gamma"))

    def _layer(self, layer: Weighted) -> Iterator[Initialiser]:
        name = f"{layer.name}.weight"
        axes, cut = self.chain.axes[name], self.cuts.of(layer.rows)
        columns = None if axes.columns is None else self.cuts.of(axes.columns).parts
        scale, shift = self._scale_and_shift(layer)
        tail = self.chain.tensors[name].shape[1:]
        shape = (len(cut), *(tail if columns is None else (len(columns), *tail[1:])))
        by_row = (scale * self._query_factor(axes, cut.rows)).reshape(-1, *(1,) * len(tail))
        is_transposed = isinstance(layer, Linear) and layer.on_tokens
        yield Weight(name, shape, cut.rows, columns, by_row, is_transposed, axes.sums_rows)
        if has_bias(layer):
            yield _floats(f"{layer.name}.bias", shift)

    def _scale_and_shift(self, layer: Weighted) -> tuple[Floats, Floats]:
        """What folding multiplies each row by, and the bias it leaves; (rows,)."""
        size = len(self.cuts.of(layer.rows))
        scale, shift = np.ones(size, np.float32), np.zeros(size, np.float32)
        if layer.norm is not None:
            normed = len(self.cuts.of(layer.normed_rows))  # the last of the rows
            scale[size - normed :], shift[size - normed :] = self._fold(layer.norm, layer.normed_rows)
        if isinstance(layer, Linear) and layer.is_query:
            scale *= np.float32(1 / np.sqrt(size / len(layer.rows)))
        if layer.bias:
            shift = shift + self._vector(f"{layer.name}.bias") * scale
        return scale, shift

    def _vector(self, name: str) -> Floats:
        return expand_tensor(name, self.chain.tensors[name], self.chain.axes[name], self.cuts)

    @staticmethod
    def _query_factor(axes: Axes, rows: Runs) -> np.float32:
        return np.float32(query_factor(rows) if axes.sums_rows else 1)

    def _fold(self, norm: str, groups: Channels) -> tuple[Floats, Floats]:
        """Batch normalisation as (scale s, shift β - mean · s), each (channels,)."""
        mean, variance = (self.chain.statistics[self.width][f"{norm}.{kind}"] for kind in STATISTICS)
        gamma, beta = (self._affine(f"{norm}.{kind}", groups) for kind in AFFINE)
        scale = gamma / np.sqrt(variance + np.float32(NORM_EPSILON))
        return scale, beta - mean * scale

    def _affine(self, name: str, groups: Channels) -> Floats:
        """A norm's weight or bias at `width`: its own, or else the merged one."""
        own = self.chain.own_norms.get(self.width)
        return merge(self.chain.tensors[name], self.cuts.of(groups).parts) if own is None else own[name]


def _bytes_of(lines: Floats) -> memoryview:
    return lines.astype("<f4", copy=False).reshape(-1).view(np.uint8).data


def pixel_initialisers(spec: InputSpec) -> Iterator[Constant]:
    """Scale and shift (1, 3, 1, 1) that take a pixel in 0..255 to `(pixel / 255 - mean) / std`."""
    mean, std = np.array(spec.mean), np.array(spec.std)
    yield _floats(PIXEL_SCALE, (1 / (255 * std)).reshape(1, 3, 1, 1))
    yield _floats(PIXEL_SHIFT, (-mean / std).reshape(1, 3, 1, 1))


def lift_initialiser(chain: Chain, width: Width) -> Constant:
    """The indices that gather a native embedding into the teacher's channels."""
    return Constant(LIFT, chain.lift(width).astype("<i8", copy=False))


def _floats(name: str, values: NDArray[Any]) -> Constant:
    return Constant(name, values.astype("<f4", copy=False))
