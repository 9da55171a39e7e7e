"""The initialisers of a student's ONNX graph: small ones ready, convolution weights expanded as they are read.

Batch normalisation is folded into the convolution in front of it: with s = γ / √(var + ε) per row,

    W' = W · s        bias = β - mean · s        all in float32

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

from chains.arch import NORM_EPSILON, Conv, Neck
from chains.chain import AFFINE, STATISTICS, Chain, Floats, InputSpec
from chains.cost import FLOAT_BYTES
from chains.cut import Cut, Runs
from chains.expand import merge
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
    """A convolution's folded weight, made when it is read; it knows the chain's tensor by name only.

    shape: (out, in, kh, kw). rows, columns: runs of the chain's tensor. scale: float32 (out, 1, 1, 1).
    """

    name: str
    shape: tuple[int, ...]
    rows: Runs
    columns: Runs | None
    scale: Floats

    @property
    def size_bytes(self) -> int:
        return FLOAT_BYTES * prod(self.shape)

    def is_finite(self, tensors: Mapping[str, Floats]) -> bool:
        """Whether every number is, once made; a slab in memory at a time."""
        slabs = self.pieces(tensors, 0, self.size_bytes)
        return all(bool(np.isfinite(np.frombuffer(slab, "<f4")).all()) for slab in slabs)

    def pieces(self, tensors: Mapping[str, Floats], start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `start` to `stop` of the data, expanding only the rows that hold them."""
        row_bytes = self.size_bytes // self.shape[0]
        first, last = start // row_bytes, -(-stop // row_bytes)
        step = max(1, SLAB_BYTES // tensors[self.name][0].nbytes)
        for row in range(first, last, step):
            data = self._expanded(tensors[self.name], slice(row, min(row + step, last)))
            yield data[max(start - row * row_bytes, 0) : stop - row * row_bytes]

    def _expanded(self, tensor: Floats, window: slice) -> memoryview:
        """The bytes of a window of rows: memory of its own."""
        rows = merge(tensor, self.rows[window], self.columns) * self.scale[window]
        return rows.astype("<f4", copy=False).reshape(-1).view(np.uint8).data


Initialiser = Constant | Weight


def initialisers(chain: Chain, width: Width, cuts: Mapping[str, Cut]) -> Iterator[Initialiser]:
    """Weight and bias of every convolution, scale and shift of the neck, in the order of the nodes that read them."""
    chain.require_calibrated(width)
    shapes = chain.table.tensor_shapes(width)
    for node in chain.table.nodes:
        if isinstance(node, Conv):
            name = f"{node.name}.weight"
            scale, shift = _fold(chain, width, node, cuts[node.rows].parts)
            columns = None if node.columns is None else cuts[node.columns].parts
            yield Weight(name, shapes[name], cuts[node.rows].rows, columns, scale.reshape(-1, 1, 1, 1))
            yield _floats(f"{node.name}.bias", shift)
        elif isinstance(node, Neck):
            scale, shift = _fold(chain, width, node, cuts[node.rows].parts)
            yield _floats(NECK_SCALE, scale)
            yield _floats(NECK_SHIFT, shift)


def _fold(chain: Chain, width: Width, node: Conv | Neck, parts: Runs) -> tuple[Floats, Floats]:
    """Batch normalisation as (scale s, shift β - mean · s), each (rows,)."""
    mean, variance = (chain.statistics[width][f"{node.norm}.{kind}"] for kind in STATISTICS)
    gamma, beta = (_affine(chain, width, f"{node.norm}.{kind}", parts) for kind in AFFINE)
    scale = gamma / np.sqrt(variance + np.float32(NORM_EPSILON))
    return scale, beta - mean * scale


def _affine(chain: Chain, width: Width, name: str, parts: Runs) -> Floats:
    """A norm's weight or bias at `width`: its own, or else the merged one."""
    own = chain.own_norms.get(width)
    return merge(chain.tensors[name], parts) if own is None else own[name]


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
