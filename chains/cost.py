"""What a student costs a device, counted from the architecture's table: no network is built and nothing is run.

Definitions. MACs: multiply-adds of convolutions, linears and attention products for one image at the stated input size,
biases not counted; FLOPs are two per MAC. Params: float initialiser elements of the
emitted ONNX graph, so with normalisation folded into weights and biases. Both are exact integers and equal a count over
the graph. The definition of MACs is that of fvcore's `flop_count.py`, which calls them flops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from chains.arch import Architecture, total, weight_tail
from chains.chain import InputSpec
from chains.nodes import (
    IMAGES,
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
    Weighted,
)
from chains.width import Width

FLOAT_BYTES = 4
LOAD_PEAK = 2.7  # onnxruntime's peak while loading, in multiples of the weights (measured; DESIGN §4)


@dataclass(frozen=True)
class Shape:
    """A value of the graph for one image: channels × height × width; tokens have their count as height."""

    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def float_bytes(self) -> int:
        return FLOAT_BYTES * self.channels * self.pixels


@dataclass(frozen=True)
class Costs:
    """Costs of one model at batch 1. `artifact_bytes` is the exact size of the ONNX file."""

    macs: int
    params: int
    peak_activation_bytes: int
    artifact_bytes: int

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def weight_bytes(self) -> int:
        return FLOAT_BYTES * self.params

    @property
    def memory_bytes_bound(self) -> int:
        """What the model itself adds to a process that runs it, at most: the load peak of 2.7 × weights plus
        activations. The runtime's own code and arenas come on top, some megabytes; devices will report those."""
        return round(LOAD_PEAK * self.weight_bytes) + self.peak_activation_bytes


def count_macs(architecture: Architecture, width: Width, input: InputSpec) -> int:
    """Multiply-adds of one image."""
    shapes, sizes = value_shapes(architecture, width, input), architecture.group_sizes(width)
    return sum(_macs(node, shapes, sizes) for node in architecture.nodes)


def count_params(architecture: Architecture, width: Width) -> int:
    """Float elements of the emitted graph: weights and one bias each, scale and shift of the neck; a layer that is used
    several times counts once."""
    sizes = architecture.group_sizes(width)
    return sum({name: count for node in architecture.nodes for name, count in _params(node, sizes)}.values())


def peak_activation_bytes(architecture: Architecture, width: Width, input: InputSpec) -> int:
    """Largest sum of float32 values alive at once, each living from its node to its last reader. A ReLU and the steps
    of the neck work in place, as runtimes let them; nothing else does. What a node of several steps holds while it
    works is counted with it."""
    shapes = value_shapes(architecture, width, input)
    last_use = {value: index for index, node in enumerate(architecture.nodes) for value in node.inputs}
    alive = {IMAGES: shapes[IMAGES].float_bytes}
    peak = 0
    for index, node in enumerate(architecture.nodes):
        alive[node.output] = shapes[node.output].float_bytes
        peak = max(peak, sum(alive.values()) + _working_bytes(node, shapes))
        alive = {value: size for value, size in alive.items() if last_use.get(value, index + 1) > index}
    return peak


def value_shapes(architecture: Architecture, width: Width, input: InputSpec) -> dict[str, Shape]:
    """Shape of every value of the graph, the images included."""
    sizes = architecture.group_sizes(width)
    shapes = {IMAGES: Shape(3, input.height, input.width)}
    for node in architecture.nodes:
        shapes[node.output] = _output_shape(node, shapes, sizes)
    return shapes


def _output_shape(node: Node, shapes: dict[str, Shape], sizes: Mapping[str, int]) -> Shape:
    before = shapes[node.inputs[0]]
    match node:
        case Conv():
            return Shape(total(node.rows, sizes), *_strided(before, node))
        case Pool():
            return Shape(before.channels, *_strided(before, node))
        case Linear():
            return Shape(total(node.rows, sizes), before.height, before.width)
        case Tokens():
            return Shape(before.channels, node.count, 1)
        case Take():
            return Shape(len(node.tokens) * before.channels, 1, 1)
        case HalfPool():
            return Shape(2 * before.channels, 1, 1)
        case Concat():
            return Shape(sum(shapes[value].channels for value in node.inputs), 1, 1)
        case GlobalPool() | Neck():
            return Shape(before.channels, 1, 1)
        case Attention():
            return shapes[node.inputs[2]]
        case Add() | Multiply() | InstanceNorm() | LayerNorm() | ChannelAttention():
            return before


def _strided(before: Shape, node: Conv | Pool) -> Iterator[int]:
    return ((side + sum(node.padding) - node.kernel) // node.stride + 1 for side in (before.height, before.width))


def _macs(node: Node, shapes: dict[str, Shape], sizes: Mapping[str, int]) -> int:
    out = shapes[node.output]
    match node:
        case Conv() | Linear():
            return out.channels * out.pixels * prod(weight_tail(node, sizes))
        case Attention():  # q kᵀ, and the weights times v
            return out.height**2 * (shapes[node.inputs[0]].channels + out.channels)
        case ChannelAttention():  # x yᵀ, and the weights times x
            return 2 * out.channels**2 * out.pixels
        case _:
            return 0


def _params(node: Node, sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Initialiser -> its floats."""
    match node:
        case Conv() | Linear():
            yield node.name, total(node.rows, sizes) * (prod(weight_tail(node, sizes)) + has_bias(node))
        case Neck():
            yield node.norm, 2 * total(node.rows, sizes)
        case InstanceNorm() | LayerNorm():
            yield node.name, 2 * total(node.rows, sizes)
        case Tokens():
            yield node.name, total(node.rows, sizes) * node.count
        case ChannelAttention():
            yield node.name, total(node.gain, sizes)


def has_bias(layer: Weighted) -> bool:
    """Whether the emitted layer has a bias: its own, or what folding its norm leaves."""
    return layer.bias or layer.norm is not None


def _working_bytes(node: Node, shapes: dict[str, Shape]) -> int:
    """What a node holds while it works, besides what it reads and writes."""
    out = shapes[node.output].float_bytes
    match node:
        case Attention():  # q, k and v by head; the products of all pairs of tokens, twice while normalised
            tokens, heads = shapes[node.output].height, len(node.rows)
            return 3 * out + 2 * FLOAT_BYTES * heads * tokens**2
        case ChannelAttention():  # y transposed and what is added; the products of all pairs, twice while normalised
            return 2 * out + 2 * FLOAT_BYTES * shapes[node.output].channels ** 2
        case HalfPool():  # the halves as maps, and each as a vector
            return shapes[node.input].float_bytes + out
        case LayerNorm() | InstanceNorm():
            return out
        case Take():
            return out if len(node.tokens) > 1 else 0
        case Conv() | Linear() if node.activation == "gelu":
            return 2 * out
        case Add():
            return out if len(node.inputs) > 2 else 0
        case _:
            return 0
