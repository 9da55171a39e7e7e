"""The ONNX graph of a student without its weights: nodes, inputs, outputs, metadata.

Everything here follows from the architecture's table, the chain's header and the options, so it is made before a single
weight is expanded. Messages are built by onnx's own protobuf classes; `chains/onnxfile.py` sets the weights between
them. The nodes do not depend on the width at all: widths differ in the shapes of their initialisers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from onnx import GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto
from onnx.helper import find_min_ir_version_for, make_node, make_opsetid, make_tensor_value_info

from chains.arch import EMBEDDING, IMAGES, Add, Architecture, Conv, MaxPool, Neck, architecture
from chains.chain import InputSpec
from chains.errors import UnsupportedOption

EMITTER_VERSION = 1  # part of every recipe: raise it whenever the bytes of any recipe change
OPSETS = range(11, 19)

Embedding = Literal["common", "native"]
Preprocess = Literal["none", "in-graph"]

LIFT = "embedding.lift"
NECK_SCALE, NECK_SHIFT = "neck.scale", "neck.shift"
PIXEL_SCALE, PIXEL_SHIFT = "pixels.scale", "pixels.shift"
NORMALISED = "images.normalised"


@dataclass(frozen=True)
class EmitOptions:
    """How a student is written.

    embedding: `common` answers in the teacher's coordinates, comparable across widths; `native` in the student's own.
    normalize: embeddings of length one. preprocess: `none` takes float32 [batch, 3, H, W], already mean/std-normalised;
    `in-graph` takes uint8 RGB [batch, H, W, 3]. Raises `UnsupportedOption` for anything else.
    """

    opset: int = 17
    embedding: Embedding = "common"
    normalize: bool = True
    preprocess: Preprocess = "none"

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise UnsupportedOption(f"opset {self.opset} is not one of {OPSETS.start}..{OPSETS.stop - 1}")
        _require_one_of("embedding", self.embedding, get_args(Embedding))
        _require_one_of("preprocess", self.preprocess, get_args(Preprocess))


def _require_one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnsupportedOption(f"{option} '{value[:40]}' is not one of {', '.join(known)}")


def head(opset: int) -> bytes:
    """The fields of the model in front of its graph.

    The producer's version is the emitter's, not the package's: a release must not change the bytes of a recipe.
    """
    ir_version = find_min_ir_version_for([make_opsetid("", opset)])
    model = ModelProto(ir_version=ir_version, producer_name="widthwise", producer_version=str(EMITTER_VERSION))
    return _serialised(model)


def tail(opset: int, metadata: Mapping[str, str]) -> bytes:
    """The fields of the model behind its graph."""
    properties = [StringStringEntryProto(key=key, value=value) for key, value in metadata.items()]
    return _serialised(ModelProto(opset_import=[make_opsetid("", opset)], metadata_props=properties))


def graph_tail(spec: InputSpec, embedding_dim: int, preprocess: Preprocess) -> bytes:
    """The fields of the graph behind its initialisers: `images` and `embedding`."""
    height, width = spec.height, spec.width
    if preprocess == "in-graph":
        images = make_tensor_value_info(IMAGES, TensorProto.UINT8, ["batch", height, width, 3])
    else:
        images = make_tensor_value_info(IMAGES, TensorProto.FLOAT, ["batch", 3, height, width])
    embedding = make_tensor_value_info(EMBEDDING, TensorProto.FLOAT, ["batch", embedding_dim])
    return _serialised(GraphProto(input=[images], output=[embedding]))


@lru_cache(maxsize=64)
def graph_head(architecture_name: str, options: EmitOptions, is_lifted: bool) -> bytes:
    """The fields of the graph in front of its initialisers: nodes in execution order, and the graph's name."""
    table = architecture(architecture_name)
    return _serialised(GraphProto(node=list(nodes(table, options, is_lifted)), name=table.name))


def _serialised(message: ModelProto | GraphProto) -> bytes:
    return bytes(message.SerializeToString())


def nodes(table: Architecture, options: EmitOptions, is_lifted: bool) -> Iterator[NodeProto]:
    """The nodes of the graph in execution order. `is_lifted`: the embedding is gathered into the teacher's channels."""
    images = IMAGES
    if options.preprocess == "in-graph":
        images = NORMALISED
        yield from _pixel_nodes()
    for node in table.nodes:
        match node:
            case Conv():
                yield from _conv_nodes(node, images if node.input == IMAGES else node.input)
            case MaxPool():
                yield make_node("MaxPool", [node.input], [node.output], node.name, **_window(node))
            case Add():
                total = f"{node.output}.sum"
                yield make_node("Add", list(node.inputs), [total], node.name)
                yield make_node("Relu", [total], [node.output], f"{node.output}.relu")
            case Neck():
                yield from _neck_nodes(node, options, is_lifted)


def _pixel_nodes() -> Iterator[NodeProto]:
    """`(x / 255 - mean) / std` as one multiplication and one addition per channel; uint8 NHWC to float32 NCHW."""
    yield make_node("Cast", [IMAGES], ["images.float"], "images.cast", to=TensorProto.FLOAT)
    yield make_node("Transpose", ["images.float"], ["images.planes"], "images.transpose", perm=[0, 3, 1, 2])
    yield make_node("Mul", ["images.planes", PIXEL_SCALE], ["images.scaled"], "images.scale")
    yield make_node("Add", ["images.scaled", PIXEL_SHIFT], [NORMALISED], "images.shift")


def _conv_nodes(conv: Conv, images: str) -> Iterator[NodeProto]:
    output = f"{conv.output}.linear" if conv.relu else conv.output
    weights = [f"{conv.name}.weight", f"{conv.name}.bias"]
    yield make_node("Conv", [images, *weights], [output], conv.name, **_window(conv))
    if conv.relu:
        yield make_node("Relu", [output], [conv.output], f"{conv.output}.relu")


def _window(node: Conv | MaxPool) -> dict[str, Any]:
    return {"kernel_shape": [node.kernel] * 2, "pads": [node.padding] * 4, "strides": [node.stride] * 2}


def _neck_nodes(neck: Neck, options: EmitOptions, is_lifted: bool) -> Iterator[NodeProto]:
    """Pooling, the neck as scale and shift, then what the options ask for; the last node writes the neck's output."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("GlobalAveragePool", [], {}),
        ("Flatten", [], {"axis": 1}),
        ("Mul", [NECK_SCALE], {}),
        ("Add", [NECK_SHIFT], {}),
    ]
    if is_lifted:
        steps.append(("Gather", [LIFT], {"axis": 1}))
    if options.normalize:
        steps.append(("LpNormalization", [], {"axis": 1, "p": 2}))
    value = neck.input
    for index, (operator, constants, attributes) in enumerate(steps):
        name = f"{neck.norm}.{operator.lower()}"
        output = neck.output if index == len(steps) - 1 else name
        yield make_node(operator, [value, *constants], [output], name, **attributes)
        value = output
