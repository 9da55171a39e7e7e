"""Small chains for tests, docs and benchmarks: random weights, made-up statistics, real structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from chains.arch import Architecture
from chains.architectures import architecture, architecture_names
from chains.architectures.vit import VITS
from chains.chain import (
    AFFINE,
    FALSE_ACCEPT_RATES,
    STATISTICS,
    Chain,
    Floats,
    Frontier,
    InputSpec,
    Mode,
    Threshold,
    Thresholds,
    WidthAccuracy,
)
from chains.cut import NestedTree, Partition
from chains.tree import group_rows, grow_trees, in_leaf_order, shared_clusters
from chains.width import Width, even_ladder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def random_tensors(table: Architecture, width: Width, seed: int = 0) -> dict[str, Floats]:
    """He-scaled random conv weights and norm vectors near one and zero: a network whose activations stay finite."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in table.tensor_shapes(width).items():
        noise = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            tensors[name] = noise * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        else:
            tensors[name] = noise * np.float32(0.1) + np.float32(name.endswith("weight"))
    return tensors


def random_statistics(table: Architecture, width: Width, seed: int = 0) -> dict[str, Floats]:
    """Means near zero and variances near one for every norm at `width`."""
    generator = np.random.default_rng([seed, width.stem])
    statistics: dict[str, Floats] = {}
    for norm, size in table.statistic_sizes(width).items():
        mean, variance = generator.standard_normal((2, size), dtype=np.float32) * np.float32(0.1)
        statistics |= {
            f"{norm}.{kind}": values for kind, values in zip(STATISTICS, (mean, 1 + variance**2), strict=True)
        }
    return statistics


@dataclass(frozen=True)
class Pico:
    """Toy widths of an architecture: stems, narrow to wide, the last one the teacher's."""

    stems: tuple[int, ...] = (2, 4, 6, 8)


PICO: Mapping[str, Pico] = {name: Pico() for name in architecture_names()} | {
    **dict.fromkeys(VITS, Pico((12, 24, 36, 48))),
    "mobilenetv2": Pico((8, 12, 16, 24)),
    "msinet": Pico((8, 12, 16, 32)),  # stems at which parts of one size exist, and one more
    **dict.fromkeys(("osnet", "osnet_ibn", "osnet_ain"), Pico((4, 8, 12, 24))),  # gates of 1 to 3 inside
}


def pico_chain(
    *,
    architecture_name: str = "resnet18",
    mode: Mode = "nested",
    stem: int = 8,
    narrowest: int = 2,
    rungs: int = 4,
    height: int = 64,
    width: int = 32,
    seed: int = 0,
    name: str = "pico",
    merged_share: float = 1,
) -> Chain:
    """A calibrated chain of random weights with a made-up frontier: everything but accuracy is real. merged_share:
    as in `grow_trees`."""
    table = architecture(architecture_name)
    full = Width(stem, table.multipliers)
    ladder = even_ladder(Width(narrowest, table.multipliers), full, rungs, alignment=1)
    return chain_of_random_weights(
        table, ladder, mode=mode, height=height, width=width, seed=seed, name=name, merged_share=merged_share
    )


def pico_terminal(*, stem: int = 8, inner: int = 4, seed: int = 0, name: str = "pico-terminal") -> Chain:
    """A terminal chain of random weights with a made-up frontier, for the images of `pico_chain`: a ResNet-18 whose
    inner layers have up to `inner` channels."""
    width = Width(stem)
    sizes = architecture("resnet18").group_sizes(width)
    sizes = {group: min(size, inner) if group.endswith(".a") else size for group, size in sizes.items()}
    table = architecture("resnet18").fixed(sizes)
    return Chain(
        name=name,
        architecture=table.name,
        mode="nested",
        teacher=width,
        ladder=(width,),
        input=InputSpec(64, 32, IMAGENET_MEAN, IMAGENET_STD),
        embedding_space=f"{name}-{seed}",
        license="Apache-2.0",
        tensors=random_tensors(table, width, seed),
        partitions={group: even_tree(size) for group, size in sizes.items()},
        statistics={width: random_statistics(table, width, seed)},
        frontier=made_up_frontier((width,)),
        provenance={"made_by": "chains.testing.pico_terminal", "seed": seed},
        sizes=sizes,
    )


def contract_chain(architecture_name: str, mode: Mode = "nested", merged_share: float = 1, seed: int = 0) -> Chain:
    """The chain of random weights on which the contract suite tests an architecture: its toy widths of `PICO`, images
    of 64×32 or of the size it is made for."""
    table = architecture(architecture_name)
    height, width = table.input_size or (64, 32)
    ladder = tuple(Width(stem, table.multipliers) for stem in PICO[architecture_name].stems)
    return chain_of_random_weights(
        table, ladder, mode=mode, height=height, width=width, seed=seed, name="pico", merged_share=merged_share
    )


def unclustered_chain(table: Architecture, ladder: tuple[Width, ...], input: InputSpec, seed: int = 0) -> Chain:
    """A chain of random weights at any real width, in trees that nobody clustered, which would take long: `even_tree`.
    The last of `ladder` is the teacher's width."""
    full = ladder[-1]
    return Chain(
        name="random",
        architecture=table.name,
        mode="nested",
        teacher=full,
        ladder=ladder,
        input=input,
        embedding_space=f"random-{seed}",
        license="Apache-2.0",
        tensors=random_tensors(table, full, seed),
        partitions={group: even_tree(size) for group, size in table.group_sizes(full).items()},
        statistics={width: random_statistics(table, width, seed) for width in ladder},
    )


def even_tree(size: int) -> NestedTree:
    """A tree whose cuts at size / 2, size / 4, … have parts of one size, as far as that goes: the boundary that the
    highest power of two divides appears first."""
    boundaries = sorted(range(1, size), key=lambda boundary: -(boundary & -boundary))
    return NestedTree(np.arange(size), np.array(boundaries, dtype=np.int64))


def chain_of_random_weights(
    table: Architecture,
    ladder: tuple[Width, ...],
    *,
    mode: Mode,
    height: int,
    width: int,
    seed: int,
    name: str,
    merged_share: float,
) -> Chain:
    """See `pico_chain`. The last of `ladder` is the teacher's width."""
    full = ladder[-1]
    tensors = random_tensors(table, full, seed)
    partitions: dict[str, Partition] = dict(grow_trees(table, tensors, merged_share))
    if mode == "oskt":
        tensors, partitions = _shared(table, tensors, table.group_sizes(ladder[0]))
    else:
        tensors = in_leaf_order(table, tensors, {group: tree.order for group, tree in partitions.items()})
    return Chain(
        name=name,
        architecture=table.name,
        mode=mode,
        teacher=full,
        ladder=ladder,
        input=InputSpec(height, width, IMAGENET_MEAN, IMAGENET_STD),
        embedding_space=f"{name}-{seed}",
        license="Apache-2.0",
        tensors=tensors,
        partitions=partitions,
        statistics={rung: random_statistics(table, rung, seed) for rung in ladder},
        frontier=made_up_frontier(ladder),
        provenance={"made_by": "chains.testing.pico_chain", "seed": seed},
    )


def with_own_norms(chain: Chain, seed: int = 0) -> Chain:
    """`chain` with random norms of their own for its two narrowest rungs; the others keep the merged ones."""
    generator = np.random.default_rng(seed)
    own = {
        rung: {
            f"{norm}.{kind}": generator.uniform(0.5, 1.5, size).astype(np.float32)
            for norm, size in chain.table.norm_sizes(rung).items()
            for kind in AFFINE
        }
        for rung in chain.ladder[:2]
    }
    return replace(chain, own_norms=own)


def made_up_frontier(ladder: tuple[Width, ...]) -> Frontier:
    """A frontier that rises by a point per rung; for tests only, it says so in its data set's name."""
    widths = tuple(
        WidthAccuracy(w, 50.0 + i, (49.5 + i, 50.5 + i), 60.0 + i, 70.0 + i, 80.0 + i, 40.0 + i)
        for i, w in enumerate(ladder)
    )
    cross = tuple(tuple(50.0 + min(q, g) for g in range(len(ladder))) for q in range(len(ladder)))
    thresholds = tuple(_made_up_thresholds(rate, len(ladder)) for rate in FALSE_ACCEPT_RATES)
    return Frontier("made up for tests", "none", 0, 1, 1, False, widths, cross, thresholds)


def _made_up_thresholds(rate: float, count: int) -> Thresholds:
    """Higher for the rarer accept, lower for wider pairs, and unknown for the narrowest against itself."""

    def made_up(q: int, g: int) -> Threshold | None:
        return Threshold(round(0.5 - rate - 0.01 * (q + g), 4), 60.0 + q + g) if q + g else None

    return Thresholds(rate, tuple(tuple(made_up(q, g) for g in range(count)) for q in range(count)))


def as_first_measured(frontier: Frontier) -> Frontier:
    """`frontier` as it was measured before there were mINP and thresholds: what a chain file of version 1 holds."""
    return replace(frontier, widths=tuple(replace(w, minp=None) for w in frontier.widths), thresholds=())


def _shared(
    table: Architecture, tensors: dict[str, Floats], sizes: dict[str, int]
) -> tuple[dict[str, Floats], dict[str, Partition]]:
    """The paper's chain of `tensors`: cluster means as rows, everything else at teacher resolution."""
    clusters = {g: shared_clusters(group_rows(table, tensors, g), sizes[g]) for g in table.groups}
    ordered = in_leaf_order(table, tensors, {group: cluster.order for group, cluster in clusters.items()})
    for name, axes in table.axes.items():
        if ordered[name].ndim > 1:
            counts = np.concatenate([clusters[group].sizes for group in axes.rows])
            sums = np.add.reduceat(ordered[name], np.concatenate(([0], np.cumsum(counts)[:-1])), axis=0)
            ordered[name] = (sums / counts.reshape(-1, *(1,) * (sums.ndim - 1))).astype(np.float32)
    return ordered, dict(clusters)
