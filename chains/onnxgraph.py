"""The ONNX graph of a student without its weights: nodes, inputs, outputs, metadata.

Everything here follows from the architecture's table, the chain's header and the options, so it is made before a single
weight is expanded. Messages are built by onnx's own protobuf classes; `chains/onnxfile.py` sets the weights between
them. Widths differ in the shapes of their initialisers only, but for depthwise convolutions, which state how many
groups they have. Operators are those of opset 11 wherever newer ones have a shorter word for the same (GELU,
LayerNormalization below 17).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from onnx import GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto
from onnx.helper import find_min_ir_version_for, make_node, make_opsetid, make_tensor, make_tensor_value_info

from chains.arch import NORM_EPSILON, Architecture, total
from chains.architectures import architecture
from chains.chain import InputSpec
from chains.cost import has_bias
from chains.errors import UnsupportedOption
from chains.nodes import (
    EMBEDDING,
    IMAGES,
    Activation,
    Add,
    Attention,
    ChannelAttention,
    Concat,
    Conv,
    GlobalPool,
    HalfPool,
    InstanceNorm,
    LayerNorm,
    Linear,
    Multiply,
    Neck,
    Node,
    Pool,
    Take,
    Tokens,
)
from chains.width import Width

EMITTER_VERSION = 1  # part of every recipe: raise it whenever the bytes of any recipe change
OPSETS = range(11, 19)

Embedding = Literal["common", "native"]
Preprocess = Literal["none", "in-graph"]
Sizes = tuple[tuple[str, int], ...] | None

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


@lru_cache(maxsize=256)
def graph_head(
    architecture_name: str, width: Width, options: EmitOptions, is_lifted: bool, sizes: Sizes = None
) -> bytes:
    """The fields of the graph in front of its initialisers: nodes in execution order, and the graph's name. sizes: of
    the groups, where they are not those of `width`."""
    table = architecture(architecture_name)
    table = table if sizes is None else table.fixed(dict(sizes))
    return _serialised(GraphProto(node=list(nodes(table, width, options, is_lifted)), name=table.name))


def _serialised(message: ModelProto | GraphProto) -> bytes:
    return bytes(message.SerializeToString())


def nodes(table: Architecture, width: Width, options: EmitOptions, is_lifted: bool) -> Iterator[NodeProto]:
    """The nodes of the graph in execution order. `is_lifted`: the embedding is gathered into the teacher's channels."""
    if options.preprocess == "in-graph":
        yield from _pixel_nodes()
    yield from _constant_nodes(table)
    emitter = _Emitter(table.group_sizes(width), options, is_lifted)
    for node in table.nodes:
        yield from emitter.emit(node)


def _pixel_nodes() -> Iterator[NodeProto]:
    """`(x / 255 - mean) / std` as one multiplication and one addition per channel; uint8 NHWC to float32 NCHW."""
    yield make_node("Cast", [IMAGES], ["images.float"], "images.cast", to=TensorProto.FLOAT)
    yield make_node("Transpose", ["images.float"], ["images.planes"], "images.transpose", perm=[0, 3, 1, 2])
    yield make_node("Mul", ["images.planes", PIXEL_SCALE], ["images.scaled"], "images.scale")
    yield make_node("Add", ["images.scaled", PIXEL_SHIFT], [NORMALISED], "images.shift")


# Numbers that some activations and layers need. They are nodes, not initialisers: no weight of the network.
CONSTANTS: Mapping[str, tuple[int, float]] = {
    "zero": (TensorProto.FLOAT, 0.0),
    "six": (TensorProto.FLOAT, 6.0),
    "half": (TensorProto.FLOAT, 0.5),
    "one": (TensorProto.FLOAT, 1.0),
    "inverse-root-two": (TensorProto.FLOAT, math.sqrt(0.5)),
}
OF_ACTIVATION: Mapping[Activation, tuple[str, ...]] = {
    "relu6": ("zero", "six"),
    "gelu": ("half", "one", "inverse-root-two"),
}


def _constant_nodes(table: Architecture) -> Iterator[NodeProto]:
    """The constants that the activations of this network read."""
    used = {node.activation for node in table.nodes if isinstance(node, Conv | Linear | Add | InstanceNorm)}
    for name in (name for activation, names in OF_ACTIVATION.items() if activation in used for name in names):
        data_type, value = CONSTANTS[name]
        yield _constant(f"constant.{name}", make_tensor(f"constant.{name}", data_type, [], [value]))


def _constant(output: str, value: TensorProto) -> NodeProto:
    return make_node("Constant", [], [output], output, value=value)


def _indices(output: str, values: list[int]) -> NodeProto:
    return _constant(output, make_tensor(output, TensorProto.INT64, [len(values)], values))


@dataclass(frozen=True)
class _Emitter:
    """Makes the nodes of one graph. sizes: channels of every group."""

    sizes: Mapping[str, int]
    options: EmitOptions
    is_lifted: bool

    def emit(self, node: Node) -> Iterator[NodeProto]:
        match node:
            case Conv():
                yield from self._conv(node)
            case Linear():
                yield from self._linear(node)
            case Pool():
                operator = "MaxPool" if node.kind == "max" else "AveragePool"
                yield make_node(operator, [node.input], [node.output], node.name, **_window(node))
            case GlobalPool():
                yield from self._steps(node.name, node.input, node.output, POOLING[: 1 if node.keeps_map else 2])
            case HalfPool():
                yield from self._half_pool(node)
            case Concat():
                yield make_node("Concat", list(node.inputs), [node.output], node.name, axis=1)
            case Add():
                yield from self._add(node)
            case Multiply():
                yield make_node("Mul", list(node.inputs), [node.output], node.name)
            case InstanceNorm():
                yield from self._instance_norm(node)
            case Tokens():
                yield from self._tokens(node)
            case LayerNorm():
                yield from self._layer_norm(node)
            case Attention():
                yield from self._attention(node)
            case ChannelAttention():
                yield from self._channel_attention(node)
            case Take():
                yield from self._take(node)
            case Neck():
                yield from self._neck(node)

    def _conv(self, conv: Conv) -> Iterator[NodeProto]:
        images = NORMALISED if conv.input == IMAGES and self.options.preprocess == "in-graph" else conv.input
        weights = [f"{conv.name}.weight", *([f"{conv.name}.bias"] if has_bias(conv) else [])]
        groups: dict[str, Any] = {"group": total(conv.rows, self.sizes)} if conv.is_depthwise else {}
        value = _before(conv.output, conv.activation)
        yield make_node("Conv", [images, *weights], [value], conv.label or conv.name, **_window(conv), **groups)
        yield from _activation(conv.output, conv.activation)

    def _linear(self, linear: Linear) -> Iterator[NodeProto]:
        """`Gemm` on vectors. It takes no batch of tokens: those are multiplied with the transposed weight."""
        weight, bias = f"{linear.name}.weight", f"{linear.name}.bias"
        value = _before(linear.output, linear.activation)
        if not linear.on_tokens:
            inputs = [linear.input, weight, *([bias] if has_bias(linear) else [])]
            yield make_node("Gemm", inputs, [value], linear.name, transB=1)
        else:
            product = f"{linear.name}.product" if has_bias(linear) else value
            yield make_node("MatMul", [linear.input, weight], [product], linear.name)
            if has_bias(linear):
                yield make_node("Add", [product, bias], [value], f"{linear.name}.add")
        yield from _activation(linear.output, linear.activation)

    def _add(self, node: Add) -> Iterator[NodeProto]:
        total = f"{node.output}.sum" if node.activation != "none" else node.output
        value = node.inputs[0]
        for index, term in enumerate(node.inputs[1:], start=2):
            is_last = index == len(node.inputs)
            name = node.name if is_last else f"{node.name}.{index}"
            yield make_node("Add", [value, term], [value := total if is_last else name], name)
        yield from _activation(node.output, node.activation, of=total)

    def _instance_norm(self, node: InstanceNorm) -> Iterator[NodeProto]:
        affine = [f"{node.name}.weight", f"{node.name}.bias"]
        value = _before(node.output, node.activation)
        if node.rows == node.channels:
            inputs = [node.input, *affine]
            yield make_node("InstanceNormalization", inputs, [value], node.name, epsilon=NORM_EPSILON)
        else:
            yield from self._half_normed(node, affine, value)
        yield from _activation(node.output, node.activation)

    def _half_normed(self, node: InstanceNorm, affine: list[str], value: str) -> Iterator[NodeProto]:
        """Slices, not a Split, whose sizes moved from attribute to input in opset 13."""
        border, end = total(node.rows, self.sizes), total(node.channels, self.sizes)
        first, rest, normed = f"{node.name}.first", f"{node.name}.rest", f"{node.name}.normed"
        yield _indices(f"{node.name}.axis", [1])
        for part, start, stop in ((first, 0, border), (rest, border, end)):
            yield _indices(f"{part}.start", [start])
            yield _indices(f"{part}.stop", [stop])
            yield make_node("Slice", [node.input, f"{part}.start", f"{part}.stop", f"{node.name}.axis"], [part], part)
        yield make_node("InstanceNormalization", [first, *affine], [normed], node.name, epsilon=NORM_EPSILON)
        yield make_node("Concat", [normed, rest], [value], f"{node.name}.concat", axis=1)

    def _tokens(self, node: Tokens) -> Iterator[NodeProto]:
        """Zero tokens by Pad, so that nobody need know the batch's size; what they hold is in the table added."""
        name = node.name
        yield _indices(f"{name}.shape", [0, 0, -1])
        yield make_node("Reshape", [node.input, f"{name}.shape"], [f"{name}.flat"], f"{name}.reshape")
        padded = f"{name}.patches"
        yield make_node("Transpose", [f"{name}.flat"], [padded], f"{name}.transpose", perm=[0, 2, 1])
        if node.extra:
            yield _indices(f"{name}.pads", [0, node.extra, 0, 0, 0, 0])
            yield make_node("Pad", [padded, f"{name}.pads"], [f"{name}.padded"], f"{name}.pad")
            padded = f"{name}.padded"
        yield make_node("Add", [padded, name], [node.output], f"{name}.add")

    def _layer_norm(self, node: LayerNorm) -> Iterator[NodeProto]:
        weight, bias = f"{node.name}.weight", f"{node.name}.bias"
        if self.options.opset >= 17:
            inputs = [node.input, weight, bias]
            settings: dict[str, Any] = {"axis": -1, "epsilon": node.epsilon}
            yield make_node("LayerNormalization", inputs, [node.output], node.name, **settings)
            return
        mean, centred, square, variance, shifted, deviation, unit, scaled = (
            f"{node.name}.{step}"
            for step in ("mean", "centred", "square", "variance", "shifted", "deviation", "unit", "scaled")
        )
        yield make_node("ReduceMean", [node.input], [mean], mean, axes=[-1], keepdims=1)
        yield make_node("Sub", [node.input, mean], [centred], centred)
        yield make_node("Mul", [centred, centred], [square], square)
        yield make_node("ReduceMean", [square], [variance], variance, axes=[-1], keepdims=1)
        epsilon = f"{node.name}.epsilon"
        yield _constant(epsilon, make_tensor(epsilon, TensorProto.FLOAT, [], [node.epsilon]))
        yield make_node("Add", [variance, epsilon], [shifted], shifted)
        yield make_node("Sqrt", [shifted], [deviation], deviation)
        yield make_node("Div", [centred, deviation], [unit], unit)
        yield make_node("Mul", [unit, weight], [scaled], scaled)
        yield make_node("Add", [scaled, bias], [node.output], node.name)

    def _attention(self, node: Attention) -> Iterator[NodeProto]:
        """Queries come scaled: `chains/onnxweights.py` folds 1/√d into their weights."""
        heads = len(node.rows)
        yield _indices(f"{node.name}.heads", [0, 0, heads, -1])
        yield _indices(f"{node.name}.joined", [0, 0, -1])
        by_head = {}
        for letter, value in zip("qkv", node.inputs, strict=True):
            split, by_head[letter] = f"{node.name}.{letter}.split", f"{node.name}.{letter}"
            order = [0, 2, 3, 1] if letter == "k" else [0, 2, 1, 3]
            yield make_node("Reshape", [value, f"{node.name}.heads"], [split], split)
            yield make_node("Transpose", [split], [by_head[letter]], by_head[letter], perm=order)
        products, weights, mixed = (f"{node.name}.{step}" for step in ("products", "weights", "mixed"))
        yield make_node("MatMul", [by_head["q"], by_head["k"]], [products], products)
        yield make_node("Softmax", [products], [weights], weights, axis=-1)
        yield make_node("MatMul", [weights, by_head["v"]], [mixed], mixed)
        yield make_node("Transpose", [mixed], [f"{node.name}.tokens"], f"{node.name}.tokens", perm=[0, 2, 1, 3])
        yield make_node("Reshape", [f"{node.name}.tokens", f"{node.name}.joined"], [node.output], node.name)

    def _take(self, node: Take) -> Iterator[NodeProto]:
        """Sums and a division, not a ReduceMean, whose axes moved from attribute to input in opset 18."""
        if len(node.tokens) == 1:
            yield from self._mean_token(node.name, node.input, node.output, node.tokens[0])
            return
        entries = [f"{node.name}.{index}" for index in range(len(node.tokens))]
        for entry, tokens in zip(entries, node.tokens, strict=True):
            yield from self._mean_token(entry, node.input, entry, tokens)
        yield make_node("Concat", entries, [node.output], node.name, axis=1)

    @staticmethod
    def _mean_token(name: str, value: str, output: str, tokens: tuple[int, ...]) -> Iterator[NodeProto]:
        """(batch, tokens, channels) → (batch, channels)."""
        taken = [output] if len(tokens) == 1 else [f"{name}.token{token}" for token in tokens]
        for token, gathered in zip(tokens, taken, strict=True):
            index = f"{gathered}.index"
            yield _constant(index, make_tensor(index, TensorProto.INT64, [], [token]))
            yield make_node("Gather", [value, index], [gathered], f"{gathered}.gather", axis=1)
        if len(tokens) == 1:
            return
        total = taken[0]
        for term in taken[1:]:
            yield make_node("Add", [total, term], [f"{term}.sum"], f"{term}.sum")
            total = f"{term}.sum"
        count = f"{name}.count"
        yield _constant(count, make_tensor(count, TensorProto.FLOAT, [], [len(tokens)]))
        yield make_node("Div", [total, count], [output], f"{name}.mean")

    def _half_pool(self, node: HalfPool) -> Iterator[NodeProto]:
        """The graph is the same for every size of images: it counts the rows itself."""
        shape, rows, more, middle, end, upper, lower = (
            f"{node.name}.{step}" for step in ("shape", "rows", "more", "middle", "end", "upper", "lower")
        )
        first, one, axis, last = (f"{node.name}.{constant}" for constant in ("first", "one", "axis", "last"))
        for constant, value in ((first, 0), (one, 1), (axis, 2), (last, 2**63 - 1)):
            yield _indices(constant, [value])
        yield make_node("Shape", [node.input], [shape], shape)
        yield make_node("Gather", [shape, axis], [rows], rows)
        yield make_node("Add", [rows, one], [more], more)
        yield make_node("Div", [rows, axis], [middle], middle)  # the axis is 2, and so are the halves
        yield make_node("Div", [more, axis], [end], end)
        for half, start, stop in ((upper, first, end), (lower, middle, last)):
            yield make_node("Slice", [node.input, start, stop, axis], [f"{half}.map"], f"{half}.slice")
            yield from self._steps(half, f"{half}.map", half, POOLING)
        yield make_node("Concat", [upper, lower], [node.output], node.name, axis=1)

    def _channel_attention(self, node: ChannelAttention) -> Iterator[NodeProto]:
        """Maps as (channels, places), and back to the shape they had."""
        places, shape = f"{node.label}.places", f"{node.label}.shape"
        own, other, turned, products = (f"{node.label}.{step}" for step in ("own", "other", "turned", "products"))
        yield _indices(places, [0, 0, -1])
        for value, flat in zip(node.inputs, (own, other), strict=True):
            yield make_node("Reshape", [value, places], [flat], flat)
        yield make_node("Transpose", [other], [turned], turned, perm=[0, 2, 1])
        yield make_node("MatMul", [own, turned], [products], products)
        yield make_node("Shape", [node.inputs[0]], [shape], shape)
        steps: list[Step] = [("Neg", [], {}), ("Softmax", [], {"axis": -1}), ("MatMul", [own], {})]
        steps += [("Mul", [f"{node.name}.gamma"], {}), ("Add", [own], {}), ("Reshape", [shape], {})]
        yield from self._steps(node.label, products, node.output, steps)

    def _neck(self, neck: Neck) -> Iterator[NodeProto]:
        """Pooling, the neck as scale and shift, then what the options ask for; the last node writes the output."""
        steps: list[Step] = [*(POOLING if neck.pools else ()), ("Mul", [NECK_SCALE], {}), ("Add", [NECK_SHIFT], {})]
        if self.is_lifted:
            steps.append(("Gather", [LIFT], {"axis": 1}))
        if self.options.normalize:
            steps.append(("LpNormalization", [], {"axis": 1, "p": 2}))
        yield from self._steps(neck.norm, neck.input, neck.output, steps)

    @staticmethod
    def _steps(name: str, value: str, output: str, steps: Sequence[Step]) -> Iterator[NodeProto]:
        """One operator after another; the last writes `output`."""
        for index, (operator, constants, attributes) in enumerate(steps):
            step = f"{name}.{operator.lower()}"
            made = output if index == len(steps) - 1 else step
            yield make_node(operator, [value, *constants], [made], step, **attributes)
            value = made


Step = tuple[str, list[str], dict[str, Any]]
POOLING: tuple[Step, ...] = (("GlobalAveragePool", [], {}), ("Flatten", [], {"axis": 1}))


def _before(output: str, activation: Activation) -> str:
    """What a layer writes in front of its activation."""
    return output if activation == "none" else f"{output}.linear"


def _activation(output: str, activation: Activation, of: str | None = None) -> Iterator[NodeProto]:
    """The activation that writes `output`. of: the value it is of, if not a layer's."""
    value = of or f"{output}.linear"
    match activation:
        case "relu":
            yield make_node("Relu", [value], [output], f"{output}.relu")
        case "relu6":
            yield make_node("Clip", [value, "constant.zero", "constant.six"], [output], f"{output}.relu6")
        case "sigmoid":
            yield make_node("Sigmoid", [value], [output], f"{output}.sigmoid")
        case "gelu":  # x/2 · (1 + erf(x / √2)); opset 20 has it as one operator
            scaled, error, shifted, half = (f"{output}.gelu.{step}" for step in ("scaled", "erf", "shifted", "half"))
            yield make_node("Mul", [value, "constant.inverse-root-two"], [scaled], scaled)
            yield make_node("Erf", [scaled], [error], error)
            yield make_node("Add", [error, "constant.one"], [shifted], shifted)
            yield make_node("Mul", [value, "constant.half"], [half], half)
            yield make_node("Mul", [half, shifted], [output], f"{output}.gelu")


def _window(node: Conv | Pool) -> dict[str, Any]:
    before, after = node.padding
    return {"kernel_shape": [node.kernel] * 2, "pads": [before, before, after, after], "strides": [node.stride] * 2}
