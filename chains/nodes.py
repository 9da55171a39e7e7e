"""The layers of a network as data, of which `chains/arch.py` makes architectures.

A node reads named values and writes one. Its tensors are named as in the torch module; its channels are written as the
groups they belong to, in order (`Channels`): one group mostly, several where a layer's channels are cut in blocks, as
the heads of an attention or the two halves of an IBN-a layer.

Values have channels × height × width (feature maps), channels × tokens (transformers) or channels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGES = "images"
EMBEDDING = "embedding"

Channels = tuple[str, ...]
Activation = Literal["none", "relu", "relu6", "sigmoid", "gelu"]


@dataclass(frozen=True)
class Conv:
    """A convolution `name.weight`, (out, in, k, k) or, depthwise, (out, 1, k, k).

    norm: the batch normalisation behind it, folded into it when served. norm_rows: the groups of its rows which that
    covers, where these are not all; they are the last. bias: whether it has one of its own. columns: `None` for inputs
    that are not cut (the RGB images) and for depthwise ones. label: a name for this use of a layer that is used more
    than once.
    """

    name: str
    norm: str | None
    input: str
    output: str
    rows: Channels
    columns: Channels | None
    kernel: int
    stride: int = 1
    activation: Activation = "relu"
    bias: bool = False
    is_depthwise: bool = False
    norm_rows: Channels | None = None
    pads: bool = True
    label: str | None = None

    @property
    def padding(self) -> tuple[int, int]:
        """Before and after, of rows and of columns."""
        width = self.kernel // 2 if self.pads else 0
        return (width, width)

    @property
    def normed_rows(self) -> Channels:
        """The groups that the norm covers."""
        return self.rows if self.norm_rows is None else self.norm_rows

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class Linear:
    """A linear layer `name.weight` (out, in) on vectors or, if `on_tokens`, on every token.

    norm, bias: as of `Conv`. is_query: its rows are queries of an attention, which are multiplied with keys: their
    products count how many channels there are, so merging sums them (`chains.expand`).
    """

    name: str
    norm: str | None
    input: str
    output: str
    rows: Channels
    columns: Channels
    activation: Activation = "none"
    bias: bool = True
    on_tokens: bool = False
    is_query: bool = False

    norm_rows: None = None
    label: None = None

    @property
    def normed_rows(self) -> Channels:
        return self.rows

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class Pool:
    """Max pooling with padding kernel // 2, or average pooling without padding.

    pads_after: pads below and to the right only. For kernel 3 and stride 2 that is what torch calls no padding and
    `ceil_mode`: windows of the rows 2i, 2i + 1 and 2i + 2, the last of them cut off at the edge.
    """

    kind: Literal["max", "average"]
    name: str
    input: str
    output: str
    kernel: int
    stride: int
    pads_after: bool = False

    @property
    def padding(self) -> tuple[int, int]:
        """Before and after, of rows and of columns."""
        width = self.kernel // 2 if self.kind == "max" else 0
        return (0 if self.pads_after else width, width)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class GlobalPool:
    """The mean over a whole map. `keeps_map`: channels × 1 × 1, what a gate convolves, not a vector."""

    name: str
    input: str
    output: str
    keeps_map: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class HalfPool:
    """The mean over the upper half of a map and behind it that over the lower half, as one vector. Of an odd number of
    rows the middle one is in both."""

    name: str
    input: str
    output: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class Concat:
    """Vectors as one, one behind another."""

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Add:
    """Sum of two or more values of the same channels, then the activation."""

    name: str
    inputs: tuple[str, ...]
    output: str
    rows: Channels
    activation: Activation = "relu"


@dataclass(frozen=True)
class Multiply:
    """A map times its gate, a number per channel."""

    name: str
    inputs: tuple[str, str]
    output: str


@dataclass(frozen=True)
class InstanceNorm:
    """Instance normalisation with `name.weight` and `.bias` of the first groups of a map's channels; the others pass.

    rows: the groups it covers. channels: all groups of the map.
    """

    name: str
    input: str
    output: str
    rows: Channels
    channels: Channels
    activation: Activation = "none"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class Tokens:
    """A map as tokens, `extra` zero tokens in front of them, plus `name` (channels, tokens): position embeddings with
    the class token, which no network uses but as a sum with its position, added in."""

    name: str
    input: str
    output: str
    rows: Channels
    extra: int
    count: int  # of all tokens

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class LayerNorm:
    """Layer normalisation over channels with `name.weight` and `.bias`."""

    name: str
    input: str
    output: str
    rows: Channels
    epsilon: float = 1e-6  # the ViT's, not torch's default

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class Attention:
    """softmax(q kᵀ / √d) v, a head for each group in `rows`. inputs: q, k, v."""

    name: str
    inputs: tuple[str, str, str]
    output: str
    rows: Channels


@dataclass(frozen=True)
class ChannelAttention:
    """x + γ · softmax(−x yᵀ) x, maps as (channels, places): every channel takes in others of its own map, the more the
    less these look like it in the other map. inputs: x, y, of the same channels. `name.gamma` (1,) is one number at
    every width: `gain` is a group of one channel. label: as of `Conv`.

    Channels compete in the softmax, so one that stands for several should count as often, and counts once. As with
    `LayerNorm`, a student computes what its teacher does where all its parts are of one size, and about that elsewhere.
    """

    name: str
    inputs: tuple[str, str]
    output: str
    gain: Channels
    label: str


@dataclass(frozen=True)
class Take:
    """Tokens as a vector: for each entry of `tokens` the mean of those it lists, one entry behind another. A number per
    entry and channel."""

    name: str
    input: str
    output: str
    tokens: tuple[tuple[int, ...], ...] = ((0,),)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class Neck:
    """The BNNeck (Luo et al., CVPRW 2019): a one-dimensional batch normalisation; of a map, behind global average
    pooling. Its channels are the embedding's."""

    norm: str
    input: str
    output: str
    rows: Channels
    pools: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)


Weighted = Conv | Linear
Node = (
    Conv
    | Linear
    | Pool
    | GlobalPool
    | HalfPool
    | Concat
    | Add
    | Multiply
    | InstanceNorm
    | Tokens
    | LayerNorm
    | Attention
    | ChannelAttention
    | Take
    | Neck
)
