"""What a student costs a device, counted from the architecture's table: no network is built and nothing is run.

Definitions. MACs: multiply-adds of convolutions (and, in later architectures, linears and attention products) for one
image at the stated input size, biases not counted; FLOPs are two per MAC. Params: float initialiser elements of the
emitted ONNX graph, so with normalisation folded into weights and biases. Both are exact integers and equal a count over
the graph. The definition of MACs is that of fvcore's `flop_count.py`, which calls them flops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chains.arch import IMAGES, Add, Architecture, Conv, MaxPool, Neck, Node
from chains.chain import InputSpec
from chains.width import Width

FLOAT_BYTES = 4
LOAD_PEAK = 2.7  # onnxruntime's peak while loading, in multiples of the weights (measured; DESIGN §4)


@dataclass(frozen=True)
class Shape:
    """A value of the graph for one image: channels × height × width."""

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
        """A conservative bound on what the model adds to a process that runs it: the load peak of 2.7 × weights plus
        activations. The runtime's own code and arenas come on top; devices will report those."""
        return round(LOAD_PEAK * self.weight_bytes) + self.peak_activation_bytes


def count_macs(architecture: Architecture, width: Width, input: InputSpec) -> int:
    """Multiply-adds of one image."""
    shapes = value_shapes(architecture, width, input)
    return sum(_conv_macs(node, shapes) for node in architecture.nodes if isinstance(node, Conv))


def count_params(architecture: Architecture, width: Width) -> int:
    """Float elements of the emitted graph: conv weights and one bias each, scale and shift of the neck."""
    shapes = architecture.tensor_shapes(width)
    sizes = architecture.group_sizes(width)
    return sum(_node_params(node, shapes, sizes) for node in architecture.nodes)


def peak_activation_bytes(architecture: Architecture, width: Width, input: InputSpec) -> int:
    """Largest sum of float32 values alive at once, each living from its node to its last reader. A ReLU and the steps
    of the neck work in place, as runtimes let them; nothing else does."""
    shapes = value_shapes(architecture, width, input)
    last_use = {value: index for index, node in enumerate(architecture.nodes) for value in inputs_of(node)}
    alive = {IMAGES: shapes[IMAGES].float_bytes}
    peak = 0
    for index, node in enumerate(architecture.nodes):
        alive[node.output] = shapes[node.output].float_bytes
        peak = max(peak, sum(alive.values()))
        alive = {value: size for value, size in alive.items() if last_use.get(value, index + 1) > index}
    return peak


def value_shapes(architecture: Architecture, width: Width, input: InputSpec) -> dict[str, Shape]:
    """Shape of every value of the graph, the images included."""
    sizes = architecture.group_sizes(width)
    shapes = {IMAGES: Shape(3, input.height, input.width)}
    for node in architecture.nodes:
        shapes[node.output] = _output_shape(node, shapes, sizes)
    return shapes


def inputs_of(node: Node) -> tuple[str, ...]:
    """Names of the values a node reads."""
    return node.inputs if isinstance(node, Add) else (node.input,)


def _output_shape(node: Node, shapes: dict[str, Shape], sizes: dict[str, int]) -> Shape:
    before = shapes[inputs_of(node)[0]]
    match node:
        case Conv():
            return Shape(sizes[node.rows], *_strided(before, node))
        case MaxPool():
            return Shape(before.channels, *_strided(before, node))
        case Add():
            return before
        case Neck():
            return Shape(before.channels, 1, 1)


def _strided(before: Shape, node: Conv | MaxPool) -> Iterator[int]:
    return ((side + 2 * node.padding - node.kernel) // node.stride + 1 for side in (before.height, before.width))


def _conv_macs(conv: Conv, shapes: dict[str, Shape]) -> int:
    out = shapes[conv.output]
    return out.channels * out.pixels * shapes[conv.input].channels * conv.kernel**2


def _node_params(node: Node, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]) -> int:
    match node:
        case Conv():
            out, columns, height, width = shapes[f"{node.name}.weight"]
            return out * columns * height * width + out
        case Neck():
            return 2 * sizes[node.rows]
        case _:
            return 0
