"""Vision transformers as other projects save them: TransReID's names, of which all others are dialects.

    TransReID     damo-cv/TransReID, damo-cv/TransReID-SSL   base.…       with and without jigsaw branches (JPM)
    PASS          CASIA-IVA-Lab/PASS-reID                    base.…       three part tokens
    OSKT          kiddo127/OSKT                              base.…       PASS, and behind the tokens a projection `dw`
    fast-reid     JDAI-CV/fast-reid                          backbone.…
    timm, DeiT    ImageNet: to begin with                    …

What our table keeps apart or together they keep otherwise, so reading is folding, and every fold here is exact but one:

    q, k, v       thirds of the rows of attn.qkv
    positions     pos_embed, the class and part tokens added to their own; side information (SIE) added to all, which is
                  exact for one camera and, of several, the mean
    dw            dw (W x + b + p) = (dw W) x + dw (b + p), so W, b and every position are multiplied by it

The surprise is what no tensor shows: heads, stride and image size. Heads are those of the architecture with that patch,
depth and width; stride and size follow from the number of positions, or from the architecture that the owner stated.
And a JPM file has two more last blocks: the global branch's own is `b1`, its neighbour in `base.blocks` is not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from chains.arch import Architecture
from chains.architectures import architecture
from chains.architectures.vit import OVERLAPPING_STRIDE, PART_TOKENS, SIZES, Settings, Size
from chains.chain import AFFINE, STATISTICS, Floats
from chains.errors import ArchitectureError, WeightsRefused, WidthError
from chains.importers.containers import State
from chains.importers.schemes import BATCHES, NOT_OURS, Arrays, Match, Pixels, Recognised, array
from chains.model import model_of
from chains.width import Width

IMAGES = ((256, 128), (384, 128), (224, 224))  # pixels, height and width, of published networks
SIE_COEFFICIENT = 3.0  # of every published configuration; it is not in the file
HALF: Pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and std in every ReID project's ViT configuration
OLD_SMALL = (768, 8)  # width and depth of what TransReID and fast-reid once called small
QKV = "qkv"

# Tensors of other networks under the same names: regular expression -> what they are.
FOREIGN: tuple[tuple[str, str], ...] = (
    (r"patch_embed\.conv\.", "part of a convolutional patch embedding (the ICS stem of TransReID-SSL)"),
    (r"^fcneck\.|^heads\.bottleneck\.1\.", "part of a layer that shortens the embedding in front of the neck"),
    (r"\.ls[12]\.|\.gamma_[12]$", "a scale of a layer (LayerScale)"),
    (r"\.attn\.[qk]_norm\.", "a norm of queries or keys"),
    (r"(^|\.)(fc_norm|norm_pre|attn_pool)\.", "a layer around the blocks, or another way to pool tokens"),
    (r"relative_position|\.w_msa\.", "a relative position (Swin, BEiT)"),
)
LOCAL = "of a local branch of JPM; the embedding is the global branch's"
FC = (r"^base\.fc\.", "a classifier that the project's code makes and never reads")
OWN_CLASSIFIER = "left out: it reads the answers of the four necks, which are not the embedding"

PRETRAINING = (
    "this is a ViT of ImageNet's classes, without a neck: it was never trained to tell people apart, so its students "
    "could not either. Train it on people first (`start` of a [teacher])"
)
OLD_SMALL_REASON = (
    ". It is the network that TransReID and fast-reid once called small: an MLP of three times the width, no bias in "
    "attn.qkv, and products scaled by 768^-0.5 and not by their heads. Train a vit_small (DeiT's), or export this one "
    "to ONNX and register that: frozen, it can be evaluated"
)


@dataclass(frozen=True)
class Dialect:
    """How one project names a ViT.

    marks: names that a file must have. tail: where the last block and the final norm are, if not with the others.
    ignored: regular expression -> why such tensors change no embedding. is_pretraining: ImageNet's, without a neck.
    """

    toolkit: str
    prefix: str
    marks: tuple[str, ...]
    neck: str | None = "bottleneck."
    classifier: str | None = "classifier.weight"
    tail: tuple[str, str] | None = None
    tokens: Literal["class", "parts", "distilled"] = "class"
    ignored: tuple[tuple[str, str], ...] = ()
    has_projection: bool = False
    is_pretraining: bool = False

    def match(self, tensors: State, stated: str | None = None) -> Match | None:
        """`None` for a file that has not the marks. stated: an architecture, whose heads, stride and image size are
        taken where it is a ViT."""
        if not all(mark in tensors for mark in self.marks):
            return None
        return Match(1.0, lambda: _Reading(self, tensors, _settings(stated)).take())


def size_of(file: Reader, prefix: str, stated: Size | None = None) -> Size:
    """The size with this patch, depth and width; of another width only the one that was stated, as its number of heads
    is not in the file. Raises `WeightsRefused` where there is none."""
    dim = file.length(f"{prefix}cls_token", (1, 1, -1))
    patch, depth = file.length(f"{prefix}patch_embed.proj.weight", (0, 3, 0, -1)), _depth(file.tensors, prefix)
    alike = [size for size in SIZES.values() if (size.patch, size.depth) == (patch, depth)]
    if stated in alike:
        return stated
    found = next((size for size in alike if size.width == dim), None)
    if found is None:
        listed = "; ".join(f"{s.name}: {s.width}, {s.depth} and {s.patch}" for s in SIZES.values())
        old = OLD_SMALL_REASON if (dim, depth) == OLD_SMALL else ""
        raise WeightsRefused(
            f"this ViT has {dim} channels, {depth} blocks and patches of {patch}, and those of this version have other "
            f"numbers ({listed}){old}"
        )
    return found


def placed(tried: Sequence[Settings], tokens: int, name: str) -> Settings:
    """The first of `tried` that has as many tokens, class and part tokens among them. `name` is of the position
    embeddings. Raises `WeightsRefused` where none has."""
    fits = next((settings for settings in tried if settings.token_count == tokens), None)
    if fits is None:
        counts = ", ".join(f"{settings.name} {settings.token_count}" for settings in dict.fromkeys(tried))
        raise WeightsRefused(
            f"{name} makes {tokens} tokens, and of those tried {counts}. State the image size: in the architecture's "
            "name, as in vit_small@320x160, or as the input of a chain"
        )
    return fits


def folded_positions(file: Reader, prefix: str, tokens: Literal["class", "parts", "distilled"]) -> NDArray[np.float64]:
    """What is added to each token, class and part tokens added in: (tokens, D). A distillation token is left out."""
    dim, count = file.length(f"{prefix}cls_token", (1, 1, -1)), file.length(f"{prefix}pos_embed", (1, -1, 0))
    positions = file.take(f"{prefix}pos_embed", (1, count, dim))[0].astype(np.float64)
    extra = ["cls_token"]
    if tokens == "parts":
        extra += [f"part_token{index + 1}" for index in range(PART_TOKENS)]
        places = ["cls_pos", *(f"part{index + 1}_pos" for index in range(PART_TOKENS))]
        first = [file.take(f"{prefix}{name}", (1, 1, dim))[0] for name in places]
        positions = np.concatenate([*first, positions])
    elif tokens == "distilled":
        positions = np.delete(positions, 1, axis=0)
    for index, name in enumerate(extra):
        positions[index] += file.take(f"{prefix}{name}", (1, 1, dim))[0, 0]
    folded: NDArray[np.float64] = positions
    return folded


class Reader:
    """Takes tensors out of a file, once their shapes are what they must be, and remembers which."""

    def __init__(self, tensors: State, wants: str) -> None:
        self.tensors, self.wants = tensors, wants
        self.taken: set[str] = set()
        self.notes: list[str] = []

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `WeightsRefused` where it is missing, and for a tensor with an empty axis."""
        if name not in self.tensors:
            raise WeightsRefused(f"{name} is missing, and {self.wants} needs it")
        shape = tuple(self.tensors[name].shape)
        if not all(shape):
            raise WeightsRefused(f"{name} has shape {shape}: it holds nothing")
        return shape

    def length(self, name: str, pattern: tuple[int, ...]) -> int:
        """How long the axis is whose place in `pattern` is -1; 0 there is any length. Raises `WeightsRefused` for a
        tensor of another shape."""
        shape = self.shape(name)
        if len(shape) != len(pattern) or any(
            want > 0 and want != has for want, has in zip(pattern, shape, strict=True)
        ):
            wanted = ", ".join(str(want) if want > 0 else "any" for want in pattern)
            raise WeightsRefused(f"{name} has shape {shape}; in {self.wants} it has ({wanted})")
        return shape[pattern.index(-1)]

    def take(self, name: str, shape: tuple[int, ...]) -> Floats:
        """The tensor as float32. Raises `WeightsRefused` for another shape, and as `schemes.array`."""
        if name not in self.tensors:
            raise WeightsRefused(f"{name} is missing; in {self.wants} it has shape {shape}")
        if tuple(self.tensors[name].shape) != shape:
            raise WeightsRefused(f"{name} has shape {tuple(self.tensors[name].shape)}; in {self.wants} it has {shape}")
        self.taken.add(name)
        return array(name, self.tensors, self.notes)


class _Reading:
    """One file laid out by one dialect."""

    def __init__(self, dialect: Dialect, tensors: State, stated: Settings | None) -> None:
        self.dialect, self.tensors, self.stated = dialect, tensors, stated
        self.prefix = dialect.prefix
        self.file = Reader(tensors, f"a ViT of {dialect.toolkit}")
        self.missing: list[str] = []

    def take(self) -> Recognised:
        """Raises `WeightsRefused` with the first mismatch."""
        _refuse_foreign(self.tensors)
        self.dim = self.file.length(f"{self.prefix}cls_token", (1, 1, -1))
        self.depth = _depth(self.tensors, self.prefix)
        size = size_of(self.file, self.prefix, None if self.stated is None else self.stated.size)
        positions = self._positions()
        settings = self._placed(size, len(positions))
        table, width = architecture(settings.name), _width(self.dim, settings)
        self.file.wants = f"{settings.name} of width {width}"
        positions = self._resized(positions, settings)
        arrays = self._weights(table, width) | {"positions": positions.T.astype(np.float32)}
        if self.dialect.has_projection:
            arrays |= self._projected(arrays)
        neck = self._neck(width, table)
        classifier = self._classifier(table.embedding_dim(width))
        if not self.dialect.is_pretraining:
            self.file.notes.append("mean and std of 0.5 are those of the toolkit's configurations; the file has none")
        ignored = tuple(sorted(f"{name}: {why}" for name, why in self._ignored()))
        return Recognised(
            toolkit=self.dialect.toolkit,
            model=model_of(settings.name, width, _plain_neck(table, width) | arrays | neck),
            neck=bool(neck),
            classifier=classifier,
            pixels=None if self.dialect.is_pretraining else HALF,
            pretraining=PRETRAINING if self.dialect.is_pretraining else None,
            matched=len(self.file.taken),
            missing=tuple(self.missing),
            ignored=ignored,
            notes=tuple(self.file.notes),
        )

    def _positions(self) -> NDArray[np.float64]:
        """(tokens, D), side information added."""
        positions = folded_positions(self.file, self.prefix, self.dialect.tokens)
        name = f"{self.prefix}sie_embed"
        if name not in self.tensors:
            return positions
        sides = self.file.length(name, (-1, 1, 0))
        self.file.notes.append(
            f"sie_embed: the mean over {sides} cameras or views, times {SIE_COEFFICIENT} as in every published "
            "configuration, was added to all tokens; it is not told here which camera an image is from"
        )
        side: NDArray[np.float64] = self.file.take(name, (sides, 1, self.dim)).astype(np.float64).mean(axis=0)
        return positions + SIE_COEFFICIENT * side

    def _placed(self, size: Size, tokens: int) -> Settings:
        """The settings whose grid has as many patches: those that were stated, or of published image sizes. Weights to
        begin with are resized to those that were stated."""
        has_parts = self.dialect.tokens == "parts"
        base = Settings(size, size.image, has_parts=has_parts)
        stated = self.stated
        if stated is not None:
            wanted = replace(base, image=stated.image, overlaps=stated.overlaps)
            if wanted.token_count == tokens or self.dialect.is_pretraining:
                return wanted
        tried = [wanted for image in (size.image, *IMAGES) for wanted in strides(replace(base, image=image))]
        fits = placed(tried, tokens, f"{self.prefix}pos_embed")
        self.file.notes.append(
            f"{tokens} tokens are those of patches at stride {fits.stride} in images of {fits.image[0]}×{fits.image[1]}"
        )
        return fits

    def _resized(self, positions: NDArray[np.float64], settings: Settings) -> NDArray[np.float64]:
        """Positions for another grid, as the ReID projects resize ImageNet's: bilinear, the class token's kept. Only of
        weights to begin with; all others fit."""
        if len(positions) == settings.token_count:
            return positions
        side = round((len(positions) - 1) ** 0.5)
        if side * side != len(positions) - 1:
            raise WeightsRefused(
                f"{self.prefix}pos_embed has {len(positions) - 1} patches, which is no square to be resized to "
                f"{settings.grid[0]}×{settings.grid[1]}"
            )
        grid = torch.from_numpy(positions[1:].reshape(1, side, side, -1)).permute(0, 3, 1, 2)
        wider = functional.interpolate(grid, size=settings.grid, mode="bilinear", align_corners=False)
        self.file.notes.append(f"positions were resized from {side}×{side} to {settings.grid[0]}×{settings.grid[1]}")
        return np.concatenate([positions[:1], wider[0].flatten(1).T.numpy()])

    def _weights(self, table: Architecture, width: Width) -> Arrays:
        """Every tensor of the table but positions and neck."""
        arrays: Arrays = {}
        for name, shape in table.tensor_shapes(width).items():
            if name == "positions" or name.startswith("neck."):
                continue
            letter = re.search(r"\.attn\.([qkv])\.", name)
            if letter is None:
                arrays[name] = self.file.take(self._source(name), shape)
                continue
            source = self._source(name.replace(f".{letter[1]}.", f".{QKV}."))
            whole = self.file.take(source, (3 * shape[0], *shape[1:]))
            arrays[name] = whole[QKV.index(letter[1]) * shape[0] :][: shape[0]]
        return arrays

    def _source(self, name: str) -> str:
        """Where a tensor of the backbone is in the file."""
        if self.dialect.tail is not None:
            block, norm = self.dialect.tail
            for ours, theirs in ((f"blocks.{self.depth - 1}.", block), ("norm.", norm)):
                if name.startswith(ours):
                    return theirs + name.removeprefix(ours)
        return f"{self.prefix}{name}"

    def _projected(self, arrays: Arrays) -> Arrays:
        """Patch embedding and positions behind the projection; sums in float64."""
        dw = self.file.take(f"{self.prefix}dw.weight", (self.dim, self.dim)).astype(np.float64)
        names = ("patch_embed.proj.weight", "patch_embed.proj.bias", "positions")
        self.file.notes.append("the projection dw was multiplied into the patch embedding, the tokens and positions")
        return {name: np.tensordot(dw, arrays[name].astype(np.float64), axes=1).astype(np.float32) for name in names}

    def _neck(self, width: Width, table: Architecture) -> Arrays:
        """The neck; empty where the file has none, and where it has several that make no single one."""
        place = self.dialect.neck
        if place is None or f"{place}running_mean" not in self.tensors:
            if place is not None:
                self.file.notes.append(
                    "the file has no neck, so the embedding is the feature; an identity neck was added"
                )
            return {}
        if self.has_many_necks:
            self.file.notes.append(
                "the embedding is [class token; mean of the part tokens] in front of the four necks, as PASS is tested "
                "(NECK_FEAT before): four batch norms make no single one. An identity neck was added"
            )
            return {}
        size = table.embedding_dim(width)
        if self.dialect.tokens == "parts" and self.file.shape(f"{place}running_mean") == (self.dim,):
            raise WeightsRefused(
                f"{place}running_mean has shape ({self.dim},) and there is no bottleneck_1: PASS with mean fusion, "
                f"whose embedding is one of {self.dim} numbers; in {table.name} it has {size}, class and parts apart"
            )
        kinds = [kind for kind in (*AFFINE, *STATISTICS) if kind != "bias" or f"{place}bias" in self.tensors]
        if "bias" not in kinds:
            self.missing.append(f"{place}bias: absent; taken as zeros")
        if self.prefix == "base.":
            self.file.notes.append(
                "the embedding is behind the neck; these projects' published figures are of the feature before it"
            )
        return {f"neck.{kind}": self.file.take(f"{place}{kind}", (size,)) for kind in kinds}

    @property
    def has_many_necks(self) -> bool:
        return self.dialect.tokens == "parts" and "bottleneck_1.running_mean" in self.tensors

    def _classifier(self, channels: int) -> torch.Tensor | None:
        """(identities, D), of any number of identities; one that does not read the embedding is left out, and said."""
        name = self.dialect.classifier
        if name is None or name not in self.tensors or self.has_many_necks:
            return None
        shape = self.file.shape(name)
        if len(shape) != 2 or shape[1] != channels:
            self.file.notes.append(f"{name} has shape {shape} and reads no embedding of {channels} numbers; left out")
            return None
        return torch.from_numpy(self.file.take(name, shape).copy())

    def _ignored(self) -> Iterator[tuple[str, str]]:
        """Tensors that play no part, and why. Raises `WeightsRefused` for one among the network's that is not its."""
        for name, tensor in self.tensors.items():
            if name in self.file.taken or name.endswith(BATCHES):
                continue
            why = next((why for pattern, why in self.dialect.ignored if re.search(pattern, name)), None)
            if why is None and self._is_replaced(name):
                why = "the global branch has a last block and a norm of its own (b1)"
            if why is None and name.startswith(self.prefix):
                raise WeightsRefused(
                    f"{name} of shape {tuple(tensor.shape)} is unknown to {self.file.wants}, so this is another network"
                )
            is_left_out = name == self.dialect.classifier and self.has_many_necks
            yield name, OWN_CLASSIFIER if is_left_out else why or NOT_OURS

    def _is_replaced(self, name: str) -> bool:
        """Whether a JPM file has another of it in its global branch."""
        replaced = (f"{self.prefix}blocks.{self.depth - 1}.", f"{self.prefix}norm.")
        return self.dialect.tail is not None and name.startswith(replaced)


def _settings(stated: str | None) -> Settings | None:
    """What a stated name says; `None` where it is no ViT's."""
    try:
        return None if stated is None else Settings.parse(stated)
    except ArchitectureError:
        return None


def strides(settings: Settings) -> list[Settings]:
    """The same with patches side by side and, where they can, overlapping."""
    overlap = [replace(settings, overlaps=True)] if settings.size.patch > OVERLAPPING_STRIDE else []
    return [replace(settings, overlaps=False), *overlap]


def _depth(tensors: State, prefix: str) -> int:
    """How many blocks there are, from the first on."""
    depth = 0
    while f"{prefix}blocks.{depth}.norm1.weight" in tensors:
        depth += 1
    return depth


def _width(dim: int, settings: Settings) -> Width:
    try:
        width = Width(dim, ())
        architecture(settings.name).group_sizes(width)
        return width
    except WidthError as error:
        raise WeightsRefused(f"{settings.name} has no such width: {error}") from error


def _refuse_foreign(tensors: State) -> None:
    for name in tensors:
        what = next((what for pattern, what in FOREIGN if re.search(pattern, name)), None)
        if what is not None:
            raise WeightsRefused(f"{name[:80]} of shape {tuple(tensors[name].shape)} is {what}; no ViT here has one")


def _plain_neck(table: Architecture, width: Width) -> Arrays:
    size = table.embedding_dim(width)
    ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)
    return {"neck.weight": ones, "neck.bias": zeros, "neck.running_mean": zeros, "neck.running_var": ones}


_JPM_TAIL = ("b1.0.", "b1.1.")
_JPM = ((r"^b2\.|^bottleneck_[1-4]\.|^classifier_[1-4]\.", LOCAL), FC)
_NECKS = (r"^bottleneck(_[1-3])?\.", "one of the four necks, which make no single one")
_HEAD = (r"^(head|head_dist|pre_logits)\.", "of ImageNet's classifier")
_DISTILLED = (r"^dist_token$", "the token that learnt from another network; people's networks have none")
_CHAIN = (r"_gene(\.|$)|\.(s1|entire)\.", "of the weight chain beside it, which `widthwise import-chain` reads")
SCHEMES: tuple[Dialect, ...] = (
    Dialect(
        "OSKT",
        "base.",
        ("base.dw.weight", "base.part_token1"),
        tokens="parts",
        ignored=(_NECKS, FC, _CHAIN),
        has_projection=True,
    ),
    Dialect("PASS", "base.", ("base.part_token1",), tokens="parts", ignored=(_NECKS, FC)),
    Dialect("TransReID (JPM)", "base.", ("base.cls_token", "b1.0.norm1.weight"), tail=_JPM_TAIL, ignored=_JPM),
    Dialect("TransReID", "base.", ("base.cls_token",), ignored=(FC,)),
    Dialect(
        "fast-reid",
        "backbone.",
        ("backbone.cls_token",),
        neck="heads.bottleneck.0.",
        classifier="heads.weight",
    ),
    Dialect(
        "DeiT",
        "",
        ("cls_token", "dist_token"),
        neck=None,
        classifier=None,
        tokens="distilled",
        ignored=(_HEAD, _DISTILLED),
        is_pretraining=True,
    ),
    Dialect(
        "timm",
        "",
        ("cls_token", "patch_embed.proj.weight"),
        neck=None,
        classifier=None,
        ignored=(_HEAD,),
        is_pretraining=True,
    ),
)
