"""Architectures as data: the layers of a network in order, and the channel group of every axis of every tensor.

This table is all the core knows of a backbone. Expansion, costs and the ONNX writer walk it and never mention a ResNet;
a new backbone is a plain torch module, a table here and a test that the two agree. The idea of a permutation-spec-like
table is from git-re-basin (`src/weight_matching.py`).

A channel group is a set of channels that can only be cut together: the stem, each stage's residual stream, each block's
inner widths. Where a stage starts with an identity shortcut (basic blocks, stage 1) it shares the group in front of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from chains.errors import ArchitectureError, WidthError
from chains.width import Width

NORM_EPSILON = 1e-5  # of every batch normalisation, the one torch uses by default
IMAGES = "images"
EMBEDDING = "embedding"


@dataclass(frozen=True)
class Group:
    """A channel group of `width.stage(stage) * expansion` channels."""

    name: str
    stage: int
    expansion: int = 1

    def size(self, width: Width) -> int:
        return width.stage(self.stage) * self.expansion


@dataclass(frozen=True)
class Axes:
    """The group of a tensor's rows (axis 0) and columns (axis 1); `None`: not cut, e.g. the RGB input of the stem."""

    rows: str
    columns: str | None = None


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, its batch normalisation `norm`, and a ReLU behind it if `relu`."""

    name: str
    norm: str
    input: str
    output: str
    rows: str
    columns: str | None
    kernel: int
    stride: int = 1
    relu: bool = True

    @property
    def padding(self) -> int:
        return self.kernel // 2


@dataclass(frozen=True)
class MaxPool:
    """Max pooling with padding kernel // 2."""

    name: str
    input: str
    output: str
    kernel: int
    stride: int

    @property
    def padding(self) -> int:
        return self.kernel // 2


@dataclass(frozen=True)
class Add:
    """Sum of two values of one group, then ReLU."""

    name: str
    inputs: tuple[str, str]
    output: str
    rows: str


@dataclass(frozen=True)
class Neck:
    """Global average pooling, then a one-dimensional batch normalisation: the BNNeck (Luo et al., CVPRW 2019)."""

    norm: str
    input: str
    output: str
    rows: str


Node = Conv | MaxPool | Add | Neck


@dataclass(frozen=True)
class Architecture:
    """A network as data: its groups, and its nodes in execution order."""

    name: str
    groups: Mapping[str, Group]
    nodes: tuple[Node, ...]

    @property
    def embedding_group(self) -> str:
        """The group the embedding's coordinates belong to: what the neck normalises."""
        return self.neck.rows

    @cached_property
    def neck(self) -> Neck:
        return next(node for node in self.nodes if isinstance(node, Neck))

    @cached_property
    def axes(self) -> Mapping[str, Axes]:
        """Tensor name -> axes, for every tensor that expansion makes: conv weights, norm weights and biases."""
        table: dict[str, Axes] = {}
        for node in self.nodes:
            if isinstance(node, Conv):
                table[f"{node.name}.weight"] = Axes(node.rows, node.columns)
            if isinstance(node, Conv | Neck):
                table[f"{node.norm}.weight"] = table[f"{node.norm}.bias"] = Axes(node.rows)
        return table

    @cached_property
    def norms(self) -> Mapping[str, str]:
        """Normalisation layer name -> its group; each carries `running_mean` and `running_var` per width."""
        return {node.norm: node.rows for node in self.nodes if isinstance(node, Conv | Neck)}

    def group_sizes(self, width: Width) -> dict[str, int]:
        """Channels of every group at `width`."""
        return {name: group.size(width) for name, group in self.groups.items()}

    def writers(self, group: str) -> tuple[str, ...]:
        """Names of the weight matrices whose rows are channels of `group`: what its rows are clustered on."""
        convs = (node for node in self.nodes if isinstance(node, Conv) and node.rows == group)
        return tuple(f"{conv.name}.weight" for conv in convs)

    def tensor_shapes(self, width: Width) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape at `width`: convs `(out, in, kh, kw)`, norm vectors `(out,)`."""
        sizes = self.group_sizes(width)
        shapes: dict[str, tuple[int, ...]] = {}
        for node in self.nodes:
            if isinstance(node, Conv):
                inputs = 3 if node.columns is None else sizes[node.columns]
                shapes[f"{node.name}.weight"] = (sizes[node.rows], inputs, node.kernel, node.kernel)
            if isinstance(node, Conv | Neck):
                shapes[f"{node.norm}.weight"] = shapes[f"{node.norm}.bias"] = (sizes[node.rows],)
        return shapes

    def require_within(self, width: Width, teacher: Width) -> None:
        """Raise `WidthError` unless every group of `width` fits into that of `teacher`."""
        full = self.group_sizes(teacher)
        for group, size in self.group_sizes(width).items():
            if size > full[group]:
                raise WidthError(
                    f"width {width} needs {size} channels in group '{group}'; the teacher {teacher} has {full[group]}"
                )


@dataclass(frozen=True)
class _Block:
    """What differs between residual blocks: how much wider the output is, and the kernel of each convolution."""

    expansion: int
    kernels: tuple[int, ...]
    strided: int  # index of the conv that carries the block's stride


BASIC = _Block(expansion=1, kernels=(3, 3), strided=0)
BOTTLENECK = _Block(expansion=4, kernels=(1, 3, 1), strided=1)
RESNETS = {"resnet18": (BASIC, (2, 2, 2, 2)), "resnet50": (BOTTLENECK, (3, 4, 6, 3))}
STAGE_STRIDES = (1, 2, 2, 1)  # last stride 1 keeps the final map twice as tall and wide, the rule in ReID since BoT


def architecture_names() -> tuple[str, ...]:
    return tuple(RESNETS)


@cache
def architecture(name: str) -> Architecture:
    """The architecture called `name`. Raises `ArchitectureError` when there is none."""
    if name not in RESNETS:
        raise ArchitectureError(f"no architecture '{name[:40]}'; there are: {', '.join(RESNETS)}")
    block, depths = RESNETS[name]
    return _ResNetTable(block, depths).build(name)


class _ResNetTable:
    """Lays out a ResNet: stem, four stages of residual blocks, neck. Tensor names are torchvision's."""

    def __init__(self, block: _Block, depths: tuple[int, ...]) -> None:
        self.block = block
        self.depths = depths
        self.groups = {"stem": Group("stem", stage=0)}
        self.nodes: list[Node] = []

    def build(self, name: str) -> Architecture:
        self.nodes.append(Conv("conv1", "bn1", IMAGES, "stem", "stem", None, kernel=7, stride=2))
        self.nodes.append(MaxPool("maxpool", "stem", "pooled", kernel=3, stride=2))
        value, group = "pooled", "stem"
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                value, group = self._add_block(f"layer{stage + 1}.{index}", stage, index, value, group)
        self.nodes.append(Neck("neck", value, EMBEDDING, group))
        return Architecture(name, self.groups, tuple(self.nodes))

    def _add_block(self, name: str, stage: int, index: int, value: str, group: str) -> tuple[str, str]:
        stride = STAGE_STRIDES[stage] if index == 0 else 1
        needs_projection = index == 0 and (stage > 0 or self.block.expansion > 1)
        out = f"layer{stage + 1}" if needs_projection else group
        if needs_projection:
            self.groups[out] = Group(out, stage, self.block.expansion)
        inner, shortcut = self._add_convs(name, stage, stride, value, group, out), value
        if needs_projection:
            shortcut = f"{name}.downsample"
            self.nodes.append(
                Conv(f"{shortcut}.0", f"{shortcut}.1", value, shortcut, out, group, kernel=1, stride=stride, relu=False)
            )
        self.nodes.append(Add(f"{name}.add", (inner, shortcut), name, out))
        return name, out

    def _add_convs(self, name: str, stage: int, stride: int, value: str, group: str, out: str) -> str:
        last = len(self.block.kernels) - 1
        for index, kernel in enumerate(self.block.kernels):
            rows = out if index == last else f"{name}.{'ab'[index]}"
            if index != last:
                self.groups[rows] = Group(rows, stage)
            conv, norm = f"{name}.conv{index + 1}", f"{name}.bn{index + 1}"
            self.nodes.append(
                Conv(
                    conv,
                    norm,
                    value,
                    conv,
                    rows,
                    group,
                    kernel,
                    stride if index == self.block.strided else 1,
                    index != last,
                )
            )
            value, group = conv, rows
        return value
