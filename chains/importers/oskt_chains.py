"""Weight chains that the authors of OSKT refined (Li, Qi, Geng, ICCV 2025; kiddo127/OSKT), as chains of `mode: oskt`.

Theirs is two files: a state dict, which holds the teacher and the chain's few rows beside it, and `gene_matcher.json`
with one label per teacher row. The same chain is written here as clusters and tensors:

    clusters   labels of a channel group; channels sorted by (label, channel), one stored row per label
    weights    few rows in the order of the labels, teacher columns, which move to where their channels stand now
    vectors    norms and biases at teacher resolution: of a ResNet the teacher's own, of a ViT the chain's
    neck       that of the narrowest student, repeated over each cluster

    ResNet-50  base.GeneChain.layer1.0.conv1.weight   base.layer1.0.bn1.weight   GeneNet_bottleneck.weight
    ViT        base.blocks.0.mlp.fc1_weight_gene      base.norm_gene.weight      bottlenecks.s1.weight

Surprises. A ResNet's chain has norms under its own name too: copies, which may be a step old. Its blocks are in the
file twice, which is checked. A ViT's students take the bias of the attention's projection from the teacher in the
authors' code, from the chain in the paper: `Wanted.projection_bias`. Its four necks make no single one, so the neck's
weights of the part tokens' half are the mean of three. And neither file has statistics of students: they are measured
(`chains.calibrate`), and no width is served before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chains.arch import Architecture
from chains.architectures import architecture
from chains.architectures.vit import FRONT, MLP_RATIO, RESIDUAL, Settings
from chains.chain import AFFINE, Chain, Floats, InputSpec
from chains.cut import SharedClusters, joined_order
from chains.errors import WeightsRefused, WidthError
from chains.importers.containers import State, read_safetensors, read_torch, sniff
from chains.importers.recognise import without_wrapping
from chains.importers.schemes import Arrays, Pixels
from chains.importers.vits import HALF, Reader, folded_positions, placed, size_of, strides
from chains.nodes import Conv
from chains.refine import Refined
from chains.width import Width

IMAGENET: Pixels = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std in the authors' ResNet configurations
MAX_MATCHER_BYTES = 8 * 2**20  # a ViT-B's has one megabyte
RESNET = "resnet50"  # the only one that the authors refine
GENE_CHAIN = "base.GeneChain."
TWICE = ".Gene_Bottleneck."
NARROWEST = "s1"  # what the ViT's file calls the chain's own student
STREAM = "dw_proj_fc2"  # the ViT's key of everything that writes the residual stream
Labels = NDArray[np.int64]
Matcher = Mapping[str, Any]
Clusters = dict[str, SharedClusters]

# What else is in the files: regular expression -> why no student needs it. The first that fits counts.
LEFT_OUT: tuple[tuple[str, str], ...] = (
    (re.escape(TWICE), "the chain's blocks a second time; compared, and the same"),
    (r"\.trans_|colAdders|rowAveragers", "matrices that repeat, add or average channels, as the labels say"),
    (r"^base\.GeneChain\.", "copies of the teacher's norms, which may be a step old"),
    (r"\.(s1|entire)\.", "the networks that training copied weights into"),
    (r"(^|_)classifier\.", "classifiers"),
    (r"^base\.fc\.", "a classifier that the project's code makes and never reads"),
    (r"^bottleneck(_[1-3])?\.|running_|_bottleneck\.", "statistics, and the teacher's necks"),
    (r"^base\.", "the teacher's own tensors, where the chain has others"),
)
NOT_CALIBRATED = (
    "not calibrated: no width is served before `widthwise calibrate` has measured its statistics on training images"
)
UNKNOWN = "not known to be in such a file"


@dataclass(frozen=True)
class Wanted:
    """What the files do not say. ladder: widths, narrow to wide, as in `8`, `16x2-3-4` or `w168`. height, width: of
    images, in pixels. projection_bias: whose bias the attention projections of a ViT's students take, the chain's as in
    the paper or the teacher's as in the authors' code."""

    name: str
    ladder: tuple[str, ...]
    height: int = 256
    width: int = 128
    license: str = "unknown"
    projection_bias: Literal["chain", "teacher"] = "chain"


@dataclass(frozen=True, eq=False)
class Imported:
    """A chain from the authors' files, not calibrated. clusters, matched: how many label lists and tensors were read;
    ignored: reason -> how many tensors were left out because of it; notes: what was done or assumed, for people."""

    chain: Chain
    clusters: int
    matched: int
    ignored: Mapping[str, int]
    notes: tuple[str, ...]

    def text(self) -> str:
        """What was read and what was not, in lines for people."""
        chain = self.chain
        rungs = ", ".join(map(str, chain.ladder))
        return "\n".join(
            (
                f"{chain.name}: {chain.architecture} of width {chain.teacher}, mode oskt, widths {rungs}",
                f"read: {self.clusters} label lists, {self.matched} tensors",
                *(f"left out: {why} ({count})" for why, count in self.ignored.items()),
                *(f"note: {note}" for note in self.notes),
                NOT_CALIBRATED,
            )
        )


def import_files(state: Path, matcher: Path, wanted: Wanted) -> Imported:
    """As `import_chain`, from files. Nothing is unpickled."""
    digests = {"state": _sha256(state), "matcher": _sha256(matcher)}
    return import_chain(_read_state(state), read_matcher(matcher), wanted, {"sha256": digests})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_state(path: Path) -> State:
    """Raises `WeightsRefused` naming the file: of the two, it is not always the one that was meant."""
    try:
        kind = sniff(path)
        if kind == "onnx":
            raise WeightsRefused("this is an ONNX graph; a chain's is the authors' .pth file, or safetensors")
        return read_safetensors(path)[0] if kind == "safetensors" else read_torch(path)
    except WeightsRefused as error:
        raise WeightsRefused(f"{path}: {error}") from error


def import_chain(
    state: State, matcher: Matcher, wanted: Wanted, made_from: Mapping[str, Any] | None = None
) -> Imported:
    """The authors' chain in our form. made_from: words for its provenance.

    Raises `WeightsRefused` where labels, tensors and each other do not fit, with the first mismatch; `WidthError` or
    `CutError` for a width on the ladder that the chain cannot give."""
    tensors = without_wrapping(state)
    read = next((read for mark, read in READERS if mark in tensors), None)
    if read is None:
        raise WeightsRefused(
            f"the file has neither {READERS[0][0]} nor {READERS[1][0]}, so it is no weight chain of the OSKT authors'; "
            "a teacher alone is read by `widthwise refine`"
        )
    found = read(tensors, matcher, wanted)
    chain = Refined("oskt", found.tensors, found.partitions).chain(
        name=wanted.name,
        architecture=found.table.name,
        ladder=tuple(Width.parse(text, found.teacher.multipliers) for text in wanted.ladder),
        teacher=found.teacher,
        input=InputSpec(wanted.height, wanted.width, *found.pixels),
        license=wanted.license,
        provenance=_provenance(wanted, made_from or {}),
    )
    files = found.files
    return Imported(chain, len(files.read), len(files.reader.taken), _left_out(files), tuple(files.reader.notes))


def read_matcher(path: Path) -> Matcher:
    """The JSON object in `path`. Raises `WeightsRefused` for anything else, and for more than 8 MiB."""
    size = path.stat().st_size
    if size > MAX_MATCHER_BYTES:
        raise WeightsRefused(f"the matcher has {size:,} bytes; those of the largest networks have a million")
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise WeightsRefused(f"the matcher is no JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise WeightsRefused(f"the matcher holds a {type(found).__name__}, and must hold an object of label lists")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0][:80]!r} is in it twice")
    return dict(pairs)


def _provenance(wanted: Wanted, made_from: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "made_by": "widthwise import-chain",
        "from": "a weight chain refined by the authors of OSKT",
        "projection_bias": wanted.projection_bias,
        **made_from,
    }


# --- both kinds


class _Files:
    """State dict and matcher of a chain, and what was read of either."""

    def __init__(self, tensors: State, matcher: Matcher) -> None:
        self.tensors, self.matcher = tensors, matcher
        self.reader = Reader(tensors, "this chain")
        self.read: dict[str, Labels] = {}

    def labels(self, key: str, channels: int) -> Labels:
        """One label per teacher row, int64 (channels,), from 0 on and none left out. Raises `WeightsRefused`."""
        found = self.matcher.get(key)
        if not isinstance(found, list):
            what = "is missing" if found is None else f"holds a {type(found).__name__}"
            raise WeightsRefused(f"the matcher's '{key}' {what}; it must be a list of {channels} labels")
        if len(found) != channels:
            raise WeightsRefused(f"the matcher's '{key}' has {len(found)} labels; the layer has {channels} rows")
        for row, label in enumerate(found):
            if type(label) is not int or not 0 <= label < channels:
                raise WeightsRefused(
                    f"the matcher's '{key}'[{row}] is {str(label)[:40]}; labels are whole numbers below {channels}"
                )
        labels = np.array(found, dtype=np.int64)
        unused = np.flatnonzero(np.bincount(labels) == 0)
        if len(unused):
            raise WeightsRefused(f"the matcher's '{key}' has labels up to {labels.max()}, but no row has {unused[0]}")
        self.read[key] = labels
        return labels

    def require_same(self, key: str, other: str) -> None:
        """Raises `WeightsRefused` for layers that write one channel group and are clustered differently."""
        one, another = self.read[key], self.read[other]
        if not np.array_equal(one, another):
            row = int(np.flatnonzero(one != another)[0])
            raise WeightsRefused(
                f"the matcher's '{key}' and '{other}' write the same channels, and row {row} has label {one[row]} in "
                f"the one and {another[row]} in the other"
            )

    def require_no_more(self, known: Mapping[str, Any], where: Matcher) -> None:
        """Raises `WeightsRefused` for a key of a layer that the network has not."""
        strange = next((key for key in where if key not in known), None)
        if strange is not None:
            raise WeightsRefused(f"the matcher has '{strange[:80]}', which no layer of this network is")


@dataclass(frozen=True, eq=False)
class _Found:
    """A chain as it was read: `tensors` in leaf order."""

    files: _Files
    table: Architecture
    teacher: Width
    partitions: Clusters
    tensors: Arrays
    pixels: Pixels


def _clusters(labels: Labels) -> SharedClusters:
    return SharedClusters(np.argsort(labels, kind="stable").astype(np.int64), np.bincount(labels).astype(np.int64))


def _stored_shapes(table: Architecture, teacher: Width, clusters: Clusters) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the authors' file, but for the neck: vectors as the teacher's, weights with a row per label."""
    shapes = {name: shape for name, shape in table.tensor_shapes(teacher).items() if not name.startswith("neck.")}
    rows = {name: sum(clusters[group].stored_rows for group in table.axes[name].rows) for name in shapes}
    return {name: (rows[name], *shape[1:]) if len(shape) > 1 else shape for name, shape in shapes.items()}


def _in_leaf_order(table: Architecture, arrays: Arrays, clusters: Clusters) -> Arrays:
    """Channels where they stand in the chain: rows of weights are labels already, so columns and vectors move."""
    orders = {group: each.order for group, each in clusters.items()}
    moved = {}
    for name, values in arrays.items():
        axes = table.axes[name]
        if values.ndim == 1:
            moved[name] = values[joined_order([orders[group] for group in axes.rows])]
        elif axes.columns is None:
            moved[name] = values
        else:
            moved[name] = values[:, joined_order([orders[group] for group in axes.columns])]
    return moved


def _repeated(narrow: list[dict[str, Floats]], clusters: SharedClusters) -> Arrays:
    """A neck at teacher resolution, in leaf order, from those of the narrowest student, one behind another."""
    return {
        f"neck.{kind}": np.concatenate([np.repeat(neck[kind], clusters.sizes) for neck in narrow]) for kind in AFFINE
    }


def _left_out(files: _Files) -> dict[str, int]:
    """Why tensors were left out, and how many."""
    names = (name for name in files.tensors if name not in files.reader.taken)
    return dict(Counter(next((why for pattern, why in LEFT_OUT if re.search(pattern, n)), UNKNOWN) for n in names))


# --- ResNets


def _read_resnet(tensors: State, matcher: Matcher, _: Wanted) -> _Found:
    files = _Files(tensors, matcher)
    table, teacher = architecture(RESNET), _resnet_width(files)
    _require_twins(tensors)
    clusters = _resnet_clusters(files, table, teacher)
    files.reader.wants = f"a chain of {RESNET} {teacher} with these labels"
    arrays = {
        name: files.reader.take(f"{GENE_CHAIN if len(shape) > 1 else 'base.'}{name}", shape)
        for name, shape in _stored_shapes(table, teacher, clusters).items()
    }
    (group,) = table.embedding_channels
    neck = {kind: _narrow(files, "GeneNet_bottleneck", kind, clusters[group]) for kind in AFFINE}
    arrays = _in_leaf_order(table, arrays, clusters) | _repeated([neck], clusters[group])
    return _Found(files, table, teacher, clusters, arrays, IMAGENET)


def _resnet_width(files: _Files) -> Width:
    """From the lengths of the label lists. Raises `WeightsRefused`."""
    keys = ("base.conv1", *(f"base.layer{stage}.0.conv1" for stage in (2, 3, 4)))
    found = [files.matcher.get(key) for key in keys]
    lengths = [len(labels) if isinstance(labels, list) else 0 for labels in found]
    stem, *others = lengths
    if not all(lengths) or any(length % stem for length in others):
        listed = ", ".join(f"'{key}' {length}" for key, length in zip(keys, lengths, strict=True))
        raise WeightsRefused(f"the matcher's label lists are no ResNet's; their lengths are {listed}")
    try:
        return Width(stem, tuple(length // stem for length in others))
    except WidthError as error:
        raise WeightsRefused(f"this teacher's width is outside what a chain can have: {error}") from error


def _resnet_clusters(files: _Files, table: Architecture, teacher: Width) -> Clusters:
    """The clusters of every group: all layers that write one have the same labels."""
    sizes, first = table.group_sizes(teacher), dict[str, str]()
    for conv in (node for node in table.nodes if isinstance(node, Conv)):
        (group,) = conv.rows
        key = f"base.{conv.name.removesuffix('.0')}"
        files.labels(key, sizes[group])
        files.require_same(key, first.setdefault(group, key))
    files.require_no_more(files.read, files.matcher)
    return {group: _clusters(files.read[key]) for group, key in first.items()}


def _require_twins(tensors: State) -> None:
    """Raises `WeightsRefused` where the blocks that are in the file twice differ."""
    for name in tensors:
        if TWICE in name:
            twin = name.replace("base.", GENE_CHAIN, 1).replace(TWICE, ".")
            if twin not in tensors or not tensors[name].equal(tensors[twin]):
                raise WeightsRefused(
                    f"{name} and {twin} are one tensor in the authors' chains, and differ in this file"
                )


def _narrow(files: _Files, place: str, kind: str, clusters: SharedClusters) -> Floats:
    """A vector of the narrowest student's neck, one number per label."""
    return files.reader.take(f"{place}.{kind}", (clusters.stored_rows,))


# --- ViTs


def _read_vit(tensors: State, matcher: Matcher, wanted: Wanted) -> _Found:
    if not isinstance(matcher.get("o2g"), dict):
        raise WeightsRefused("the matcher has no object 'o2g', which holds the labels of a ViT's rows")
    files = _Files(tensors, matcher["o2g"])
    settings = _vit_settings(files.reader, wanted)
    table, teacher = architecture(settings.name), Width(settings.size.width, ())
    clusters = _vit_clusters(files, settings, teacher)
    files.reader.wants = f"a chain of {table.name} {teacher} with these labels"
    arrays = dict(_vit_arrays(files, table, teacher, clusters, wanted))
    necks = _repeated(_vit_necks(files, clusters[RESIDUAL]), clusters[RESIDUAL])
    return _Found(files, table, teacher, clusters, _in_leaf_order(table, arrays, clusters) | necks, HALF)


def _vit_settings(reader: Reader, wanted: Wanted) -> Settings:
    """The architecture whose grid, in images of the wanted size, has as many patches as the file has positions."""
    image = (wanted.height, wanted.width)
    bare = Settings(size_of(reader, "base."), image, has_parts=True, has_projection=True)
    patches = reader.length("base.pos_embed", (1, -1, 0))
    return placed(strides(bare), patches + bare.extra_tokens, "base.pos_embed")


def _vit_clusters(files: _Files, settings: Settings, teacher: Width) -> Clusters:
    """The clusters of every group; those of a head are the labels of its own rows, from 0 on."""
    dim, heads = teacher.stem, settings.size.heads
    stream = files.labels(STREAM, dim)
    clusters = {FRONT: _clusters(np.arange(dim)), RESIDUAL: _clusters(stream)}
    for index in range(settings.size.depth):
        block = f"blocks.{index}"
        for key in (f"{block}.attn.proj", f"{block}.mlp.fc2"):
            files.labels(key, dim)
            files.require_same(key, STREAM)
        for head, labels in enumerate(_head_labels(files, f"{block}.attn", dim, heads)):
            clusters[f"{block}.attn.{head}"] = _clusters(labels)
        clusters[f"{block}.mlp"] = _clusters(files.labels(f"{block}.mlp.fc1", MLP_RATIO * dim))
    files.require_no_more(files.read, files.matcher)
    return clusters


def _head_labels(files: _Files, place: str, dim: int, heads: int) -> NDArray[np.int64]:
    """The labels of every head's rows, each from 0 on: (heads, channels of a head). Raises `WeightsRefused` where
    queries, keys and values differ, or a head has not its own range of labels, as long as that of every other."""
    query, key, value, joined = (f"{place}.{kind}" for kind in ("q", "k", "v", "qkv"))
    labels = files.labels(query, dim)
    count = int(labels.max()) + 1
    for other in (key, value):
        files.labels(other, dim)
        files.require_same(other, query)
    if not np.array_equal(
        files.labels(joined, 3 * dim), np.concatenate([labels + count * third for third in range(3)])
    ):
        raise WeightsRefused(f"the matcher's '{joined}' is not '{query}' three times, each {count} labels further on")
    each, rest = divmod(count, heads)
    by_head = labels.reshape(heads, -1) - each * np.arange(heads)[:, None]
    for head, found in enumerate(by_head):
        if rest or not np.array_equal(np.unique(found), np.arange(each)):
            raise WeightsRefused(
                f"the matcher's '{query}' has {count} labels for {heads} heads, and those of head {head} are not "
                f"{each * head} to {each * (head + 1) - 1}"
            )
    return by_head


def _vit_arrays(
    files: _Files, table: Architecture, teacher: Width, clusters: Clusters, wanted: Wanted
) -> Iterator[tuple[str, Floats]]:
    """Every tensor of the table but the neck's; patch embedding and positions are the teacher's."""
    of_teacher = r"^patch_embed\." + (r"|\.attn\.proj\.bias$" if wanted.projection_bias == "teacher" else "")
    for name, shape in _stored_shapes(table, teacher, clusters).items():
        letter = re.search(r"\.attn\.([qkv])\.", name)
        if name == "positions":
            yield name, np.ascontiguousarray(folded_positions(files.reader, "base.", "parts").T, dtype=np.float32)
        elif letter is not None:
            joined = name.replace(f".{letter[1]}.", ".qkv.")
            thirds = files.reader.take(_gene(joined), (3 * shape[0], *shape[1:]))
            yield name, thirds["qkv".index(letter[1]) * shape[0] :][: shape[0]]
        else:
            yield name, files.reader.take(f"base.{name}" if re.search(of_teacher, name) else _gene(name), shape)


def _gene(name: str) -> str:
    """Where a tensor of the chain is: norms as `norm1_gene.weight`, layers as `fc1_weight_gene`."""
    place, kind = name.rsplit(".", 1)
    is_norm = place.rsplit(".", 1)[-1].startswith("norm")
    return f"base.{place}_gene.{kind}" if is_norm else f"base.{place}_{kind}_gene"


def _vit_necks(files: _Files, clusters: SharedClusters) -> list[dict[str, Floats]]:
    """The neck of the class token's half and, of the part tokens', the mean of their three."""
    necks = [
        {kind: _narrow(files, f"bottleneck{suffix}s.{NARROWEST}", kind, clusters) for kind in AFFINE}
        for suffix in ("", "_1", "_2", "_3")
    ]
    files.reader.notes.append(
        "the neck's weights of the part tokens' half are the mean of three necks: the authors normalise each token, "
        "and test the feature in front of the necks"
    )
    parts: dict[str, Floats] = {kind: np.stack([neck[kind] for neck in necks[1:]]).mean(axis=0) for kind in AFFINE}
    return [necks[0], parts]


READERS = ((f"{GENE_CHAIN}conv1.weight", _read_resnet), ("base.dw_weight_gene", _read_vit))
