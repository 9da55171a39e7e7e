"""A student as an ONNX file: laid out first, then streamed, never held whole.

    plan(stored, width, options)   sizes, id and costs of the file, before any weight is touched
    plan.chunks(start, stop)       any range of its bytes, in pieces of at most 256 KiB

The surprise: the file's size and the place of every weight are known from the architecture's table alone, so a range
that starts inside a weight expands only the rows it needs. The bytes are those that `onnx.helper` and
`SerializeToString` give for the same model. Protobuf writes fields by ascending number, which puts the data of a tensor
last in it and everything else of a graph on one side of its initialisers:

    ModelProto    ir_version, producer | graph                                  | opset, metadata
    GraphProto                           nodes, name | initialiser … | input, output
    TensorProto                                        dims, type, name, raw_data

Imports no torch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from threading import Lock
from typing import Any

import numpy as np
from onnx import TensorProto

from chains import onnxgraph
from chains.artifact import StoredChain, canonical_json
from chains.chain import Chain
from chains.cost import FLOAT_BYTES, Costs, count_macs, count_params, peak_activation_bytes
from chains.cut import Cuts
from chains.errors import ChainMismatch, UnsupportedOption
from chains.onnxgraph import EMITTER_VERSION, OPSETS, EmitOptions
from chains.onnxweights import Constant, Initialiser, Weight, initialisers, lift_initialiser, pixel_initialisers
from chains.width import Width

__all__ = ["EMITTER_VERSION", "OPSETS", "EmitOptions", "OnnxPlan", "plan", "require_finite", "write"]

CHUNK_BYTES = 256 * 1024
SMALL_BYTES = 32 * 1024  # pieces below this are joined: a write to a socket costs more than copying them
MAX_FILE_BYTES = 1_900_000_000  # protobuf ends at 2 GiB
LAYOUTS_KEPT = 128  # a ResNet-50's takes about a megabyte

GRAPH_FIELD, INITIALIZER_FIELD, RAW_DATA_FIELD = 7, 5, 9  # of ModelProto, GraphProto, TensorProto
DEFAULT_OPTIONS = EmitOptions()

Piece = bytes | memoryview
Segment = bytes | Weight


@dataclass(frozen=True, eq=False)
class Layout:
    """Where every byte of a file is: what is ready, and weights still to be made.

    Holds indices and vectors but no tensor of its chain, so that a cached layout keeps no chain in memory.
    """

    segments: tuple[Segment, ...]
    offsets: tuple[int, ...]  # of each segment, then the end of the file
    recipe: Mapping[str, Any]
    model_id: str
    file_name: str
    costs: Costs


@dataclass(frozen=True, eq=False)
class OnnxPlan:
    """One ONNX file, ready to be read from any byte. Cheap: the chain and a layout, no weights of its own."""

    chain: Chain
    layout: Layout

    @property
    def total_bytes(self) -> int:
        return self.layout.offsets[-1]

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides the bytes, as JSON values; a copy, for layouts are shared."""
        return deepcopy(dict(self.layout.recipe))

    @property
    def model_id(self) -> str:
        """sha256 of the recipe's canonical JSON, 64 hex digits."""
        return self.layout.model_id

    @property
    def file_name(self) -> str:
        return self.layout.file_name

    @property
    def costs(self) -> Costs:
        """Exact costs; `artifact_bytes` is `total_bytes`."""
        return self.layout.costs

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
        """Bytes `start` to `stop` (default: the end) in pieces of at most 256 KiB.

        Every piece is memory of its own, so a server may queue it. Raises `ValueError` unless 0 ≤ start ≤ stop ≤ size.
        """
        end = self.total_bytes if stop is None else stop
        if not 0 <= start <= end <= self.total_bytes:
            raise ValueError(f"bytes {start}..{end} are not a range of a file of {self.total_bytes}")
        return _joined(self._pieces(start, end))

    def _pieces(self, start: int, stop: int) -> Iterator[Piece]:
        segments, offsets = self.layout.segments, self.layout.offsets
        index = bisect_right(offsets, start) - 1
        while start < stop:
            segment, offset, end = segments[index], offsets[index], min(offsets[index + 1], stop)
            if isinstance(segment, bytes):
                yield memoryview(segment)[start - offset : end - offset]
            else:
                yield from segment.pieces(self.chain.tensors, start - offset, end - offset)
            start, index = end, index + 1


def plan(stored: StoredChain, width: Width, options: EmitOptions = DEFAULT_OPTIONS) -> OnnxPlan:
    """The file of `stored`'s student at `width`. Layouts are cached; nothing is expanded.

    Raises `WidthError` or `CutError` when the chain cannot give the width, `NotCalibrated` when it has no statistics
    for it, `UnsupportedOption` when the file would be too large for protobuf.
    """
    return OnnxPlan(stored.chain, _layouts.get(stored, width, options))


def write(stored: StoredChain, width: Width, options: EmitOptions = DEFAULT_OPTIONS) -> bytes:
    """The whole file of `plan(stored, width, options)`."""
    return b"".join(plan(stored, width, options).chunks())


def require_finite(stored: StoredChain, width: Width) -> None:
    """Make every weight of the student at `width` once, and look at it.

    Finite tensors are not enough: sums and folded normalisation can overflow. Raises `ChainMismatch` naming the first
    initialiser that holds NaN or infinity; raises as `plan` too. Takes a full expansion: for publishing, not serving.
    """
    draft = _Draft(stored, width, DEFAULT_OPTIONS, stored.chain.cuts(width))
    with np.errstate(over="ignore", invalid="ignore"):
        for initialiser in draft.initialisers:
            if not initialiser.is_finite(stored.chain.tensors):
                raise ChainMismatch(
                    f"{initialiser.name} of the student at {width} overflows once it is merged and its norm is folded"
                )


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same bytes with small pieces joined and large ones cut, none above 256 KiB."""
    waiting: list[Piece] = []
    size = 0
    for piece in pieces:
        if waiting and (len(piece) >= SMALL_BYTES or size + len(piece) > CHUNK_BYTES):
            yield b"".join(waiting)
            waiting, size = [], 0
        if len(piece) >= SMALL_BYTES:
            yield from (piece[cut : cut + CHUNK_BYTES] for cut in range(0, len(piece), CHUNK_BYTES))
        else:
            waiting.append(piece)
            size += len(piece)
    if waiting:
        yield b"".join(waiting)


class Layouts:
    """Layouts by chain digest, width and options; the least recently used leave."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._lock = Lock()
        self._layouts: OrderedDict[tuple[str, Width, EmitOptions], Layout] = OrderedDict()

    def get(self, stored: StoredChain, width: Width, options: EmitOptions) -> Layout:
        key = (stored.digest, width, options)
        with self._lock:
            if key in self._layouts:
                self._layouts.move_to_end(key)
                return self._layouts[key]
        layout = lay_out(stored, width, options)  # outside the lock: that two threads make the same one is harmless
        with self._lock:
            self._layouts[key] = layout
            while len(self._layouts) > self._kept:
                self._layouts.popitem(last=False)
        return layout


_layouts = Layouts(LAYOUTS_KEPT)


def lay_out(stored: StoredChain, width: Width, options: EmitOptions) -> Layout:
    """The layout of one file, made anew; raises as `plan`."""
    draft = _Draft(stored, width, options, stored.chain.cuts(width))
    segments = tuple(_segments(draft))
    offsets = (0, *accumulate(len(part) if isinstance(part, bytes) else part.size_bytes for part in segments))
    if offsets[-1] > MAX_FILE_BYTES:
        raise UnsupportedOption(f"the model has {offsets[-1]:,} bytes; one ONNX file holds at most {MAX_FILE_BYTES:,}")
    costs = _costs(draft, artifact_bytes=offsets[-1])
    return Layout(segments, offsets, draft.recipe, draft.model_id, draft.file_name, costs)


@dataclass(frozen=True, eq=False)
class _Draft:
    """The file that was asked for, and what follows from that without laying it out."""

    stored: StoredChain
    width: Width
    options: EmitOptions
    cuts: Cuts

    @property
    def chain(self) -> Chain:
        return self.stored.chain

    @cached_property
    def is_lifted(self) -> bool:
        """Whether the embedding is gathered into the teacher's channels: asked for, or it is as long as theirs and only
        their order is missing.
        """
        return self.options.embedding == "common" or self.native_dim == self.chain.embedding_dim

    @property
    def native_dim(self) -> int:
        return len(self.cuts.of(self.chain.table.embedding_channels))

    @property
    def embedding_dim(self) -> int:
        return self.chain.embedding_dim if self.is_lifted else self.native_dim

    @property
    def embedding_space(self) -> str:
        """Id of the space the embeddings can be compared in: a native one is comparable with its own width only."""
        return self.chain.embedding_space if self.is_lifted else self.chain.native_space(self.width)

    @cached_property
    def macs(self) -> int:
        return count_macs(self.chain.table, self.width, self.chain.input)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return {
            "chain_digest": self.stored.digest,
            "width": str(self.width),
            "input": [self.chain.input.height, self.chain.input.width],
            "opset": self.options.opset,
            "dtype": "float32",
            "embedding": self.options.embedding,
            "normalize": self.options.normalize,
            "preprocess": self.options.preprocess,
            "emitter_version": EMITTER_VERSION,
        }

    @cached_property
    def model_id(self) -> str:
        return hashlib.sha256(canonical_json(self.recipe).encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """`resnet50_w24_<chain>_<id8>.onnx`: trackers read the architecture from a ReID model's file name."""
        is_usual = self.width.multipliers == self.chain.table.multipliers
        width = str(self.width.stem) if is_usual else str(self.width)
        return f"{self.chain.architecture}_w{width}_{self.chain.name}_{self.model_id[:8]}.onnx"

    @cached_property
    def pixel_constants(self) -> tuple[Constant, ...]:
        return tuple(pixel_initialisers(self.chain.input)) if self.options.preprocess == "in-graph" else ()

    @property
    def initialisers(self) -> tuple[Initialiser, ...]:
        """In the order of the nodes that read them."""
        lift = (lift_initialiser(self.chain, self.width),) if self.is_lifted else ()
        return (*self.pixel_constants, *initialisers(self.chain, self.width, self.cuts), *lift)


def _segments(draft: _Draft) -> Iterator[Segment]:
    """The file in order: bytes that are ready, and weights that are made when they are read."""
    options, constants = draft.options, draft.initialisers
    head = onnxgraph.graph_head(draft.chain.architecture, draft.width, options, draft.is_lifted, _sizes(draft.chain))
    tail = onnxgraph.graph_tail(draft.chain.input, draft.embedding_dim, options.preprocess)
    headers = [_header(constant) for constant in constants]
    graph_bytes = len(head) + sum(map(len, headers)) + sum(constant.size_bytes for constant in constants) + len(tail)
    ready = onnxgraph.head(options.opset) + _field(GRAPH_FIELD, graph_bytes) + head
    for header, constant in zip(headers, constants, strict=True):
        if isinstance(constant, Weight):
            yield ready + header
            yield constant
            ready = b""
        else:
            ready += header + constant.values.tobytes()
    yield ready + tail + onnxgraph.tail(options.opset, _metadata(draft))


def _sizes(chain: Chain) -> onnxgraph.Sizes:
    return None if chain.sizes is None else tuple(sorted(chain.sizes.items()))


def _header(constant: Initialiser) -> bytes:
    """From the start of an initialiser in its graph to the first byte of its data."""
    is_index = isinstance(constant, Constant) and constant.values.dtype.kind == "i"
    data_type = TensorProto.INT64 if is_index else TensorProto.FLOAT
    tensor = TensorProto(dims=constant.shape, data_type=data_type, name=constant.name)
    fields = bytes(tensor.SerializeToString()) + _field(RAW_DATA_FIELD, constant.size_bytes)
    return _field(INITIALIZER_FIELD, len(fields) + constant.size_bytes) + fields


def _field(number: int, length: int) -> bytes:
    """The start of a length-delimited protobuf field: its key (wire type 2), then the length."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    """Seven bits per byte, low ones first, the high bit set on all but the last.

    >>> _varint(300).hex()
    'ac02'
    """
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _metadata(draft: _Draft) -> dict[str, str]:
    """What the file says about itself, in the order it is written. `Image.*` are keys of the ONNX standard."""
    spec = draft.chain.input
    raw_pixels = {"Image.NominalPixelRange": "NominalRange_0_255"} if draft.pixel_constants else {}
    return {
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
        **raw_pixels,
        "reid.input_size": f"{spec.height}x{spec.width}",
        "reid.mean": canonical_json(list(spec.mean)),
        "reid.std": canonical_json(list(spec.std)),
        "reid.embedding_dim": str(draft.embedding_dim),
        "reid.embedding_space": draft.embedding_space,
        "reid.distance": "cosine",
        "reid.l2_normalized": "true" if draft.options.normalize else "false",
        **_threshold_metadata(draft),
        "widthwise.recipe": canonical_json(draft.recipe),
        "widthwise.chain_digest": draft.stored.digest,
        "widthwise.width": str(draft.width),
        "cost.macs": str(draft.macs),
        "license": draft.chain.license,
    }


def _threshold_metadata(draft: _Draft) -> dict[str, str]:
    """Cosine cut-offs for queries of this file: against a gallery of its own width, and against each width by name.

    Nothing where the chain has none, so that files of older chains stay as they are, byte for byte; and nothing for a
    native embedding, whose cosines are others than those of the common space that the cut-offs are for.
    """
    if not draft.is_lifted or draft.chain.frontier is None:
        return {}
    by_rate: dict[str, dict[str, float]] = {}
    for at_rate, gallery, threshold in draft.chain.frontier.thresholds_of(draft.width):
        by_rate.setdefault(at_rate.rate_name, {})[str(gallery)] = threshold.cosine
    own = {rate: found[str(draft.width)] for rate, found in by_rate.items() if str(draft.width) in found}
    everywhere = {"reid.thresholds": canonical_json(by_rate)} if by_rate else {}
    return {f"reid.threshold_far_{rate}": canonical_json(cosine) for rate, cosine in own.items()} | everywhere


def _costs(draft: _Draft, artifact_bytes: int) -> Costs:
    """Costs of the file: those of the architecture, and what in-graph preprocessing adds to them."""
    chain, width = draft.chain, draft.width
    pixel_params = sum(constant.values.size for constant in draft.pixel_constants)
    peak = peak_activation_bytes(chain.table, width, chain.input)
    if draft.pixel_constants:
        one_image = FLOAT_BYTES * 3 * chain.input.height * chain.input.width
        peak = max(peak, 2 * one_image)  # each of its nodes reads one float image and writes another
    return Costs(draft.macs, count_params(chain.table, width) + pixel_params, peak, artifact_bytes)
