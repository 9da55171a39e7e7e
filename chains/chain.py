"""Chain: a refined teacher as a value, from which a student of every width on its ladder can be made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chains.arch import Architecture, Axes
from chains.architectures import architecture
from chains.cut import Cuts, Indices, NestedTree, Partition, SharedClusters, joined_order
from chains.errors import ChainMismatch, CutError, NotCalibrated
from chains.width import Width

Mode = Literal["nested", "oskt"]
Floats = NDArray[np.float32]
FAMILIES: Mapping[Mode, type[Partition]] = {"nested": NestedTree, "oskt": SharedClusters}
FALSE_ACCEPT_RATES = (1e-2, 1e-3)  # of the cut-offs that a frontier holds


@dataclass(frozen=True)
class InputSpec:
    """What a model of this chain wants to see: RGB, `height` × `width` pixels, `(pixel / 255 - mean) / std`."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class WidthAccuracy:
    """Measured retrieval accuracy of one width, in percent. `map_ci95`: bootstrap interval over queries. `minp` is
    `None` in frontiers that were measured before there was one."""

    width: Width
    map: float
    map_ci95: tuple[float, float]
    rank1: float
    rank5: float
    rank10: float
    minp: float | None = None


@dataclass(frozen=True)
class Threshold:
    """Same person or not: two embeddings count as one person when their cosine is at least `cosine`. `true_accept`:
    percent of the pairs of one identity from different cameras that do."""

    cosine: float
    true_accept: float


@dataclass(frozen=True)
class Thresholds:
    """Cut-offs at one false-accept rate: of the pairs of different identities, at most this share counts as one person.

    `matrix[q][g]`: for a query embedded at the q-th width and a gallery embedded at the g-th, in the common space;
    `None` where the images were too few to tell, or no cosine keeps the rate.
    """

    false_accept_rate: float
    matrix: tuple[tuple[Threshold | None, ...], ...]

    @property
    def rate_name(self) -> str:
        """`1e-2` for one in a hundred."""
        return f"{self.false_accept_rate:.0e}".replace("e-0", "e-")


@dataclass(frozen=True)
class Frontier:
    """Accuracy per width and how it was measured. `cross_map[q][g]`: mAP in percent of queries embedded at the q-th
    width against a gallery embedded at the g-th, in the common space. `thresholds`: one per rate of
    `FALSE_ACCEPT_RATES`; empty in frontiers that were measured before there were any."""

    dataset: str
    protocol: str
    seed: int
    queries: int
    gallery: int
    trained_after_expansion: bool
    widths: tuple[WidthAccuracy, ...]
    cross_map: tuple[tuple[float, ...], ...]
    thresholds: tuple[Thresholds, ...] = ()

    def of(self, width: Width) -> WidthAccuracy | None:
        return next((measured for measured in self.widths if measured.width == width), None)

    def thresholds_of(self, query: Width) -> Iterator[tuple[Thresholds, Width, Threshold]]:
        """(of which rate, gallery width, cut-off) for queries embedded at `query`: those that are known."""
        ladder = [measured.width for measured in self.widths]
        if query not in ladder:
            return
        for at_rate in self.thresholds:
            for gallery, threshold in zip(ladder, at_rate.matrix[ladder.index(query)], strict=True):
                if threshold is not None:
                    yield at_rate, gallery, threshold


@dataclass(frozen=True, eq=False)
class Chain:
    """A weight chain.

    tensors: tensor name -> float32, rows and columns in the leaf order of their group.
    partitions: group -> the family of its cuts.
    ladder: the widths on offer, narrow to wide. statistics: width -> `<norm>.running_mean` / `.running_var` -> float32.
    own_norms: width -> `<norm>.weight` / `.bias` -> float32, for rungs that keep normalisation weights of their own in
        place of the merged ones; statistics are per width anyway, so they cost a student nothing.
    embedding_space: id of the space that embeddings of every width share; it changes with every training, unless that
        was measured to be compatible (`chains.compatible`).
    sizes: group -> channels, of a *terminal* chain: one model whose layers were pruned unevenly (`chains.compress`), on
        a ladder of one width, that of the network it was pruned from. `None`: as the width says.
    provenance: how the chain came to be, as JSON values; no clock, host or duration, so that the same run gives the
    same file. Raises `ChainMismatch` when tensors, partitions or statistics do not fit the architecture or the mode,
    `WidthError` or `CutError` for a rung that the chain cannot give.
    """

    name: str
    architecture: str
    mode: Mode
    teacher: Width
    ladder: tuple[Width, ...]
    input: InputSpec
    embedding_space: str
    license: str
    tensors: Mapping[str, Floats]
    partitions: Mapping[str, Partition]
    statistics: Mapping[Width, Mapping[str, Floats]] = field(default_factory=dict)
    own_norms: Mapping[Width, Mapping[str, Floats]] = field(default_factory=dict)
    frontier: Frontier | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_input(self)
        _check_partitions(self)
        _check_tensors(self)
        _check_ladder(self)
        for width, statistics in self.statistics.items():
            sizes = self.table.statistic_sizes(width)
            _check_vectors(width, statistics, "statistics", sizes, STATISTICS)
        for width, norms in self.own_norms.items():
            _check_vectors(width, norms, "own norms", self.table.norm_sizes(width), AFFINE)

    @cached_property
    def table(self) -> Architecture:
        table = architecture(self.architecture)
        return table if self.sizes is None else table.fixed(self.sizes)

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Tensor name -> how it is merged in this chain's mode."""
        return self.table.axes if self.mode == "nested" else self.table.averaged_axes

    @property
    def embedding_dim(self) -> int:
        """Length of embeddings in the common space: the teacher's."""
        return self.table.embedding_dim(self.teacher)

    def cuts(self, width: Width) -> Cuts:
        """One cut per channel group. Raises `WidthError` or `CutError` when the chain cannot give `width`."""
        self.table.require_within(width, self.teacher)
        return cuts_of(self.table, self.partitions, width)

    def lift(self, width: Width) -> Indices:
        """Teacher embedding channel, in the teacher's own order -> the student coordinate that stands for it: int64
        (embedding_dim,). `native[lift]` answers in the common space (oskt.md §4)."""
        groups, sizes = self.table.embedding_channels, self.table.group_sizes(width)
        order = joined_order([self.partitions[group].order for group in groups])
        lift = np.empty(len(order), dtype=np.int64)
        lift[order] = Cuts({group: self.partitions[group].cut(sizes[group]) for group in groups}).of(groups).part_of()
        return lift

    def native_space(self, width: Width) -> str:
        """Id of the space of native embeddings of `width`: they compare with those of the same width alone, and only
        within one training, also where the chain was trained into an older chain's common space."""
        record = self.provenance.get("compatible_with")
        own = record.get("own_space") if isinstance(record, Mapping) else None
        return f"{own if isinstance(own, str) else self.embedding_space}/native-{width}"

    def require_calibrated(self, width: Width) -> Mapping[str, Floats]:
        """The normalisation statistics of `width`. Raises `NotCalibrated` when it has none."""
        if width not in self.statistics:
            offered = ", ".join(str(known) for known in self.statistics) or "none yet"
            raise NotCalibrated(
                f"width {width} of chain '{self.name}' has no normalisation statistics; calibrated: {offered}"
            )
        return self.statistics[width]


def cuts_of(table: Architecture, partitions: Mapping[str, Partition], width: Width) -> Cuts:
    """One cut per channel group. Raises `WidthError` or `CutError` where the partitions cannot give `width`."""
    return Cuts({group: partitions[group].cut(size) for group, size in table.group_sizes(width).items()})


def _check_sizes(chain: Chain) -> None:
    if chain.sizes is None:
        return
    if chain.mode != "nested" or chain.ladder != (chain.teacher,):
        raise ChainMismatch(
            f"chain '{chain.name}' has sizes of its own in every layer, so it is one model: mode 'nested', and "
            f"{chain.teacher} alone on its ladder"
        )
    full = architecture(chain.architecture).group_sizes(chain.teacher)
    for group, size in chain.sizes.items():
        if size > full.get(group, size):
            raise ChainMismatch(f"group '{group}' has {size} channels; {chain.teacher} has {full[group]} to prune from")


def _check_input(chain: Chain) -> None:
    size, wanted = (chain.input.height, chain.input.width), chain.table.input_size
    if wanted is not None and size != wanted:
        raise ChainMismatch(
            f"chain '{chain.name}' sees images of {size[0]}x{size[1]} pixels (height x width); the position embeddings "
            f"of {chain.architecture} are for {wanted[0]}x{wanted[1]}"
        )


def _check_partitions(chain: Chain) -> None:
    sizes = chain.table.group_sizes(chain.teacher)
    if chain.partitions.keys() != sizes.keys():
        raise ChainMismatch(f"groups {sorted(chain.partitions.keys() ^ sizes.keys())} are not in both table and chain")
    family = FAMILIES[chain.mode]
    for group, size in sizes.items():
        if not isinstance(chain.partitions[group], family):
            raise ChainMismatch(
                f"group '{group}' has {type(chain.partitions[group]).__name__}, "
                f"but mode '{chain.mode}' needs {family.__name__}"
            )
        if len(chain.partitions[group].order) != size:
            raise ChainMismatch(
                f"group '{group}' has {size} channels at {chain.teacher}; its order in this chain has "
                f"{len(chain.partitions[group].order)}"
            )
    for group in chain.table.embedding_channels:
        tree = chain.partitions[group]
        if isinstance(tree, NestedTree) and not tree.is_whole:
            raise ChainMismatch(
                f"the tree of group '{group}' covers {tree.leaves} of {len(tree.order)} channels; embeddings of every "
                "width share a space only where it covers all"
            )


def _check_tensors(chain: Chain) -> None:
    shapes = chain.table.tensor_shapes(chain.teacher)
    if chain.tensors.keys() != shapes.keys():
        raise ChainMismatch(
            f"tensors {sorted(chain.tensors.keys() ^ shapes.keys())[:4]} are not in both table and chain"
        )
    for name, shape in shapes.items():
        groups = chain.table.axes[name].rows
        rows = sum(chain.partitions[group].stored_rows for group in groups) if len(shape) > 1 else shape[0]
        _require_array(name, chain.tensors[name], (rows, *shape[1:]))


def _check_ladder(chain: Chain) -> None:
    if not chain.ladder or list(chain.ladder) != sorted(set(chain.ladder)):
        raise ChainMismatch(
            f"the ladder of chain '{chain.name}' must list at least one width, narrow to wide, each once"
        )
    for width in chain.ladder:
        _require_cuttable(chain, width)


def _require_cuttable(chain: Chain, width: Width) -> None:
    """Raise as `chain.cuts(width)` would, but make no cuts: a file may list many rungs of a very wide teacher."""
    chain.table.require_within(width, chain.teacher)
    for group, size in chain.table.group_sizes(width).items():
        narrowest = chain.partitions[group].narrowest
        if size < narrowest:
            raise CutError(
                f"chain '{chain.name}' cannot give width {width}: group '{group}' has no cut below {narrowest} channels"
            )


def _check_vectors(
    width: Width, vectors: Mapping[str, Floats], what: str, sizes: Mapping[str, int], kinds: tuple[str, str]
) -> None:
    """Raise `ChainMismatch` unless `vectors` are both `kinds` of every layer in `sizes`, which names its channels."""
    expected = {f"{norm}.{kind}": size for norm, size in sizes.items() for kind in kinds}
    if vectors.keys() != expected.keys():
        raise ChainMismatch(f"width {width}: {what} {sorted(vectors.keys() ^ expected.keys())[:4]} do not belong")
    for name, size in expected.items():
        _require_array(f"{name} at {width}", vectors[name], (size,))
        if name.endswith("running_var") and bool((vectors[name] < 0).any()):
            raise ChainMismatch(f"{name} at {width} has a negative variance")


def _require_array(name: str, array: Floats, shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape:
        raise ChainMismatch(f"{name} is {array.dtype} {array.shape}; this chain needs float32 {shape}")
    if not bool(np.isfinite(array).all()):
        raise ChainMismatch(f"{name} holds NaN or infinity")


STATISTICS = ("running_mean", "running_var")
AFFINE = ("weight", "bias")
