"""ONNX graphs as frozen teachers: checked, run, never trained. One image input, one embedding output, and beside it
perhaps a feature map.

A graph is a program. It can name files to read weights from, so those are refused before anything is run, and it can
ask for any amount of memory and time, so it is only ever run where both are capped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto
from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from chains.errors import WeightsRefused

MAX_BYTES = 2 * 2**30 - 1  # of one protobuf
OPSETS = range(7, 27)
DOMAINS = frozenset({"", "ai.onnx"})
FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
THREADS = 2
MAX_CHANNELS = 16_384  # of an embedding and of a map: whoever learns from them builds a layer for each of these

Channels = tuple[float, float, float]
Pixels = tuple[Channels, Channels]
"""mean and std of 0..1, one number per channel"""
Floats = NDArray[np.float32]
_CHANNELS = TypeAdapter(tuple[FiniteFloat, FiniteFloat, FiniteFloat], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class FrozenGraph:
    """What a graph wants and gives. map: the output (n, C, h, w) beside the embedding, if there is one. batch: `None`
    where any number of images goes in; height, width: `None` where any size does. pixels: mean and std of 0..1, where
    its metadata state them under the names that models of this project have (`reid.mean`)."""

    path: Path
    input: str
    output: str
    map: str | None
    is_half: bool
    batch: int | None
    height: int | None
    width: int | None
    pixels: Pixels | None
    opset: int
    parameters: int


def read_graph(path: Path) -> FrozenGraph:
    """Check a graph without running it. Raises `WeightsRefused` with the reason."""
    if path.stat().st_size > MAX_BYTES:
        raise WeightsRefused("the ONNX file is larger than 2 GiB, which one file cannot be")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except MemoryError:
        raise
    except Exception as error:  # protobuf's classes have no types, and its message says nothing
        raise WeightsRefused("the file cannot be read as ONNX; it may be cut short or damaged") from error
    _refuse_external(model)
    opset = _opset(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except MemoryError:
        raise
    except Exception as error:  # the checker raises its own, shape inference's, and those of the bindings
        raise WeightsRefused(f"onnx.checker refuses the graph: {_first_line(error)}") from error
    graph = model.graph
    image, (embedding, found) = _only_input(graph), _outputs(graph)
    batch, height, width = _image_shape(image)
    return FrozenGraph(
        path=path,
        input=image.name,
        output=embedding.name,
        map=None if found is None else found.name,
        is_half=image.type.tensor_type.elem_type == TensorProto.FLOAT16,
        batch=batch,
        height=height,
        width=width,
        pixels=_stated_pixels(model),
        opset=opset,
        parameters=sum(int(np.prod(tensor.dims)) for tensor in graph.initializer),
    )


class Session:
    """A graph in onnxruntime on the CPU, ready for any number of images. with_map: the map is asked for, if there is
    one. Raises `WeightsRefused` where it cannot be."""

    def __init__(self, graph: FrozenGraph, threads: int = THREADS, *, with_map: bool = False) -> None:
        self._graph = graph
        self._outputs = [graph.output, graph.map] if with_map and graph.map is not None else [graph.output]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's own classes share no base
            raise WeightsRefused(f"onnxruntime cannot load the graph: {_first_line(error)}") from error

    def __call__(self, images: Floats) -> tuple[Floats, Floats | None]:
        """Embeddings (n, D) of normalised images (n, 3, H, W), and their maps. Raises `WeightsRefused` when it
        fails."""
        feed = images.astype(np.float16) if self._graph.is_half else images
        size = self._graph.batch or len(feed)
        try:
            padded = np.concatenate([feed, np.repeat(feed[-1:], -len(feed) % size, axis=0)])
            found = [
                self._session.run(self._outputs, {self._graph.input: padded[start : start + size]})
                for start in range(0, len(padded), size)
            ]
            whole = [np.concatenate(parts).astype(np.float32)[: len(feed)] for parts in zip(*found, strict=True)]
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise WeightsRefused(f"onnxruntime cannot run the graph: {_first_line(error)}") from error
        return whole[0], whole[1] if len(whole) > 1 else None


def embed_frozen(graph: FrozenGraph, images: Floats) -> Floats:
    """Embeddings (n, D) of normalised images (n, 3, H, W) by onnxruntime. Raises `WeightsRefused` when it fails."""
    embeddings, _ = Session(graph)(images)
    require_shapes(len(images), embeddings.shape, None)
    return embeddings


def require_map(graph: FrozenGraph, images: Floats) -> None:
    """Raises `WeightsRefused` where the map of a graph that has one is none that can be learnt from."""
    embeddings, found = Session(graph, with_map=True)(images)
    require_shapes(len(images), embeddings.shape, None if found is None else found.shape)


def require_shapes(images: int, embedding: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    """The shapes of an embedding and of a map, if there is one. Raises `WeightsRefused` for others than (images, D) and
    (images, C, h, w), with D and C up to `MAX_CHANNELS`."""
    for what, shape, form in (("an embedding", embedding, "(images, D)"), ("a map", found, "(images, C, h, w)")):
        if shape is None:
            continue
        if len(shape) != form.count(",") + 1 or shape[0] != images or 0 in shape:
            raise WeightsRefused(f"it answers {what} of shape {shape} to {images} images; a teacher answers {form}")
        if shape[1] > MAX_CHANNELS:
            raise WeightsRefused(
                f"it answers {what} of shape {shape} to {images} images: {shape[1]:,} channels, and {MAX_CHANNELS:,} "
                "can be learnt from"
            )


def require_pixels(graph: FrozenGraph, registered: Pixels) -> None:
    """Raises `WeightsRefused` for a graph that states another mean and std than it was registered with. Nobody can tell
    which are wrong, and it would contradict its registration wherever it is used, for it is kept as it came."""
    if graph.pixels is not None and not same_pixels(graph.pixels, registered):
        (mean, std), (own_mean, own_std) = registered, graph.pixels
        raise WeightsRefused(
            f"the teacher was registered with mean {mean} and std {std}, and its metadata state mean {own_mean} and "
            f"std {own_std}; register it with those, or with the size of its images alone"
        )


def same_pixels(one: Pixels, other: Pixels) -> bool:
    """Whether two statements mean the same mean and std, which people write down with four digits."""
    return bool(np.allclose(np.array(one), np.array(other), atol=1e-4))


def _refuse_external(model: ModelProto) -> None:
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "another file")
            raise WeightsRefused(
                f"weights of the graph lie in another file ('{place[:80]}'), which was not sent and is not read: save "
                "it as one file, onnx.save_model(model, path, save_as_external_data=False)"
            )


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: Any) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(graph)


def _opset(model: ModelProto) -> int:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if foreign := sorted(domain[:80] for domain in opsets if domain not in DOMAINS):
        raise WeightsRefused(f"the graph uses operators of {', '.join(foreign)}; only ONNX's own are run")
    opset = max(opsets.values(), default=0)
    if opset not in OPSETS:
        raise WeightsRefused(f"the graph has opset {opset}; {OPSETS.start} to {OPSETS.stop - 1} can be run")
    return opset


def _only_input(graph: GraphProto) -> ValueInfoProto:
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise WeightsRefused(f"the graph has {len(inputs)} inputs; a teacher has one, the images")
    image: ValueInfoProto = inputs[0]
    return image


def _outputs(graph: GraphProto) -> tuple[ValueInfoProto, ValueInfoProto | None]:
    """The embedding, and the map: the one of two outputs that has four dimensions."""
    outputs = list(graph.output)
    maps = [value for value in outputs if len(value.type.tensor_type.shape.dim) == 4]
    if len(outputs) == 2 and len(maps) == 1:
        (embedding,) = (value for value in outputs if value is not maps[0])
        return embedding, maps[0]
    if len(outputs) != 1:
        names = ", ".join(value.name[:40] for value in outputs[:5])
        raise WeightsRefused(
            f"the graph has {len(outputs)} outputs ({names}); a teacher has one, the embedding, "
            "and perhaps a feature map of four dimensions beside it"
        )
    return outputs[0], None


def _stated_pixels(model: ModelProto) -> Pixels | None:
    marks = {entry.key: entry.value for entry in model.metadata_props}
    if not {"reid.mean", "reid.std"} <= marks.keys():
        return None
    said = marks["reid.mean"], marks["reid.std"]
    try:
        mean, std = map(_CHANNELS.validate_json, said)
    except ValidationError as error:
        raise _no_pixels(*said) from error
    if min(std) <= 0:
        raise _no_pixels(*said)
    return mean, std


def _no_pixels(mean: str, std: str) -> WeightsRefused:
    return WeightsRefused(
        f"its metadata state a reid.mean of {mean[:80]} and a reid.std of {std[:80]}; each is a JSON list of three "
        "finite numbers, std > 0"
    )


def _image_shape(value: ValueInfoProto) -> tuple[int | None, int | None, int | None]:
    """(batch, height, width), `None` for what is free."""
    kind = value.type.tensor_type
    if kind.elem_type not in FLOATS:
        raise WeightsRefused("the graph's input is no float tensor; a teacher takes normalised images (n, 3, H, W)")
    shape = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.shape.dim]
    if len(shape) != 4 or shape[1] not in (3, None):
        raise WeightsRefused(f"the graph's input has shape {shape}; a teacher takes normalised images (n, 3, H, W)")
    batch, _, height, width = shape
    if any(size is not None and not 16 <= size <= 1024 for size in (height, width)):
        raise WeightsRefused(f"the graph wants images of {height}×{width}; 16 to 1024 pixels either way can be checked")
    if batch is not None and batch > 64:
        raise WeightsRefused(f"the graph wants {batch} images at once; make its batch free, or 64 at most")
    return batch, height, width


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
