"""Vision transformers: a patch embedding, tokens with positions, blocks of attention and MLP, a norm, one token.

Dosovitskiy et al., ICLR 2021; as a ReID network: TransReID (He et al., ICCV 2021). Tensor names are TransReID's, with
three differences: q, k and v are linears of their own (`attn.q`), for a head's rows of all three are one group, cut
alike and per head; `positions` (channels, tokens) holds the position embeddings with class and part tokens added in,
which no network uses but as that sum; and there is no unused classifier.

Names are a small language (`Settings.parse`):

    vit_small                 ViT-S: patches of 16, 12 blocks, 6 heads, w384, images of 256×128
    vit_base                  ViT-B: 12 heads, w768
    vit_tiny                  for tests and very small devices: patches of 8, 4 blocks, 3 heads, w96, images of 64×32
    vit_small_s12             overlapping patches, stride 12 (TransReID)
    vit_small_pass            three part tokens; the embedding is the class token and behind it the mean of the parts
                              (PASS, Zhu et al., ECCV 2022), twice as long
    vit_small_dw              tokens of the teacher's width at every width, and behind them one more projection
                              (OSKT, ICCV 2025), which cuts them to size
    vit_small_pass@384x128    for images of 384×128 pixels (height × width)

Options come in this order and may be combined. A width is one number, the channels of the residual stream: `w168`.
Heads belong to the architecture, so every head of a narrower student has fewer channels, and widths are multiples of
the heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from chains.arch import Architecture, Group
from chains.errors import ArchitectureError, WidthError
from chains.nodes import (
    EMBEDDING,
    IMAGES,
    Add,
    Attention,
    Channels,
    Conv,
    LayerNorm,
    Linear,
    Neck,
    Node,
    Take,
    Tokens,
)
from chains.width import Width

MLP_RATIO = 4
PART_TOKENS = 3
OVERLAPPING_STRIDE = 12
MAX_SIDE = 4096  # pixels, the most a configuration allows
RESIDUAL = "residual"
FRONT = "front"  # what `_dw` reads: tokens at the teacher's width


@dataclass(frozen=True)
class Size:
    """width: channels of the residual stream as published; image: height and width in pixels."""

    name: str
    patch: int
    depth: int
    heads: int
    width: int
    image: tuple[int, int]


SIZES = {
    size.name: size
    for size in (
        Size("vit_tiny", 8, 4, 3, 96, (64, 32)),
        Size("vit_small", 16, 12, 6, 384, (256, 128)),
        Size("vit_base", 16, 12, 12, 768, (256, 128)),
    )
}
# Those to list, without all that the options combine to.
VITS = (
    *SIZES,
    *("vit_small_s12", "vit_base_s12"),
    *("vit_small_pass", "vit_base_pass"),
    *("vit_tiny_dw", "vit_small_dw", "vit_base_dw"),
)
OPTIONS = ("s12", "pass", "dw")
_PATTERN = re.compile(
    rf"(?P<size>{'|'.join(SIZES)}){''.join(f'(?P<{option}>_{option})?' for option in OPTIONS)}"
    r"(@(?P<height>[1-9][0-9]{0,3})x(?P<width>[1-9][0-9]{0,3}))?"
)


@dataclass(frozen=True)
class Settings:
    """What the name of a ViT says; `Settings.parse(settings.name) == settings`. image: height and width in pixels.

    Raises `ArchitectureError` for images that no patch fits into, and for patches that do not overlap."""

    size: Size
    image: tuple[int, int]
    overlaps: bool = False
    has_parts: bool = False
    has_projection: bool = False

    def __post_init__(self) -> None:
        patch, (height, width) = self.size.patch, self.image
        if not all(patch <= side <= MAX_SIDE for side in self.image):
            raise ArchitectureError(
                f"{self.name} is for images of {height}x{width} pixels (height x width); each side must have between "
                f"{patch}, one patch, and {MAX_SIDE}"
            )
        if self.overlaps and patch <= OVERLAPPING_STRIDE:
            raise ArchitectureError(
                f"{self.name}: patches of {patch} pixels do not overlap at stride {OVERLAPPING_STRIDE}; leave out _s12"
            )

    @classmethod
    def parse(cls, name: str) -> Settings:
        """Read a name such as `vit_small_s12_pass@384x128`. Raises `ArchitectureError` for anything else, a second name
        of the same among it."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise ArchitectureError(
                f"'{name[:40]}' is no ViT; write {', '.join(SIZES)}, then of _s12, _pass, _dw what it has, in this "
                "order, then the image size where it is another, as in 'vit_small_s12_pass@384x128'"
            )
        size = SIZES[match["size"]]
        image = size.image if match["height"] is None else (int(match["height"]), int(match["width"]))
        settings = cls(size, image, *(match[option] is not None for option in OPTIONS))
        if settings.name != name:
            raise ArchitectureError(f"'{name}' is {settings.name}, which is its only name")
        return settings

    @property
    def name(self) -> str:
        options = zip(OPTIONS, (self.overlaps, self.has_parts, self.has_projection), strict=True)
        size = "" if self.image == self.size.image else f"@{self.image[0]}x{self.image[1]}"
        return self.size.name + "".join(f"_{option}" for option, is_set in options if is_set) + size

    @property
    def stride(self) -> int:
        """Of the patches."""
        return OVERLAPPING_STRIDE if self.overlaps else self.size.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; what is left at the right and at the bottom belongs to none."""
        rows, columns = ((side - self.size.patch) // self.stride + 1 for side in self.image)
        return rows, columns

    @property
    def extra_tokens(self) -> int:
        """The class token and those of parts."""
        return 1 + (PART_TOKENS if self.has_parts else 0)

    @property
    def token_count(self) -> int:
        return self.extra_tokens + self.grid[0] * self.grid[1]

    @property
    def taken(self) -> tuple[tuple[int, ...], ...]:
        """The tokens that become the embedding, as of `chains.nodes.Take`."""
        return ((0,), tuple(range(1, 1 + PART_TOKENS))) if self.has_parts else ((0,),)


def with_projection(name: str) -> str:
    """The name of the same ViT with `_dw`. Raises `ArchitectureError` as `Settings.parse`."""
    return replace(Settings.parse(name), has_projection=True).name


def is_transformer(table: Architecture) -> bool:
    """Whether the OSKT paper treats the network as it does ViTs."""
    return any(isinstance(node, LayerNorm) for node in table.nodes)


def refined_name(table: Architecture, width: Width) -> str:
    """What the chain of a teacher is in mode `oskt`: of the teacher's architecture or, of a ViT without the projection
    `dw`, of the one with it. Raises `WidthError` for a ViT of another width than its name's, at which `dw` reads
    tokens."""
    if not is_transformer(table) or FRONT in table.groups:
        return table.name
    name = with_projection(table.name)
    reads = Settings.parse(name).size.width
    if reads != width.stem:
        raise WidthError(
            f"mode 'oskt' makes {table.name} {name}, whose tokens have {reads} channels; a teacher of {width} is none. "
            "Refine it in mode 'nested'"
        )
    return name


def table(name: str) -> Architecture:
    """The ViT called `name`. Raises `ArchitectureError` as `Settings.parse`."""
    return _Layout(Settings.parse(name)).build(name)


class _Layout:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.groups = {RESIDUAL: Group(RESIDUAL)}
        self.nodes: list[Node] = []

    def build(self, name: str) -> Architecture:
        size, value = self.settings.size, self._add_tokens()
        for index in range(size.depth):
            value = self._add_block(f"blocks.{index}", value)
        self.nodes += [
            LayerNorm("norm", value, "norm", (RESIDUAL,)),
            Take("feature", "norm", "feature", self.settings.taken),
            Neck("neck", "feature", EMBEDDING, (RESIDUAL,) * len(self.settings.taken), pools=False),
        ]
        size, image = self.settings.size, self.settings.image
        return Architecture(
            name, self.groups, tuple(self.nodes), multipliers=(), input_size=image, usual_stem=size.width
        )

    def _add_tokens(self) -> str:
        settings, group = self.settings, RESIDUAL
        if settings.has_projection:
            group = FRONT
            self.groups[FRONT] = Group(FRONT, constant=settings.size.width)
        patches = Conv(
            "patch_embed.proj",
            None,
            IMAGES,
            "patches",
            (group,),
            None,
            settings.size.patch,
            settings.stride,
            "none",
            bias=True,
            pads=False,
        )
        tokens = Tokens("positions", "patches", "tokens", (group,), settings.extra_tokens, settings.token_count)
        self.nodes += [patches, tokens]
        if not settings.has_projection:
            return "tokens"
        self.nodes.append(Linear("dw", None, "tokens", "dw", (RESIDUAL,), (FRONT,), bias=False, on_tokens=True))
        return "dw"

    def _add_block(self, name: str, value: str) -> str:
        """x + attention(norm1(x)), then x + mlp(norm2(x))."""
        norm1, norm2, attended = f"{name}.norm1", f"{name}.norm2", f"{name}.attended"
        self.nodes += [
            LayerNorm(norm1, value, norm1, (RESIDUAL,)),
            *self._attention(f"{name}.attn", norm1),
            Add(f"{attended}.add", (value, f"{name}.attn.proj"), attended, (RESIDUAL,), "none"),
            LayerNorm(norm2, attended, norm2, (RESIDUAL,)),
            *self._mlp(f"{name}.mlp", norm2),
            Add(f"{name}.add", (attended, f"{name}.mlp.fc2"), name, (RESIDUAL,), "none"),
        ]
        return name

    def _attention(self, name: str, normed: str) -> Iterator[Node]:
        heads, mixed, proj = self._heads(name), f"{name}.mixed", f"{name}.proj"
        for letter in "qkv":
            part = f"{name}.{letter}"
            yield Linear(part, None, normed, part, heads, (RESIDUAL,), on_tokens=True, is_query=letter == "q")
        yield Attention(mixed, (f"{name}.q", f"{name}.k", f"{name}.v"), mixed, heads)
        yield Linear(proj, None, mixed, proj, (RESIDUAL,), heads, on_tokens=True)

    def _heads(self, name: str) -> Channels:
        """A group for each head: its rows of q, k and v."""
        count = self.settings.size.heads
        heads = tuple(f"{name}.{head}" for head in range(count))
        self.groups |= {head: Group(head, expansion=Fraction(1, count)) for head in heads}
        return heads

    def _mlp(self, name: str, normed: str) -> Iterator[Node]:
        fc1, fc2 = f"{name}.fc1", f"{name}.fc2"
        self.groups[name] = Group(name, expansion=MLP_RATIO)
        yield Linear(fc1, None, normed, fc1, (name,), (RESIDUAL,), "gelu", on_tokens=True)
        yield Linear(fc2, None, fc1, fc2, (RESIDUAL,), (name,), on_tokens=True)
