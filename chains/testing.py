"""Small chains for tests, docs and benchmarks: random weights, made-up statistics, real structure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from chains.arch import Architecture, architecture
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
from chains.cut import Partition
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
    sizes = table.group_sizes(width)
    statistics: dict[str, Floats] = {}
    for norm, group in table.norms.items():
        mean, variance = generator.standard_normal((2, sizes[group]), dtype=np.float32) * np.float32(0.1)
        statistics |= {
            f"{norm}.{kind}": values for kind, values in zip(STATISTICS, (mean, 1 + variance**2), strict=True)
        }
    return statistics


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
) -> Chain:
    """A calibrated chain of random weights with a made-up frontier: everything but accuracy is real."""
    table = architecture(architecture_name)
    full = Width(stem)
    ladder = even_ladder(Width(narrowest), full, rungs, alignment=1)
    tensors = random_tensors(table, full, seed)
    partitions: dict[str, Partition] = dict(grow_trees(table, tensors))
    if mode == "oskt":
        tensors, partitions = _shared(table, tensors, table.group_sizes(ladder[0]))
    else:
        tensors = in_leaf_order(table, tensors, {group: tree.order for group, tree in partitions.items()})
    return Chain(
        name=name,
        architecture=architecture_name,
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
            f"{norm}.{kind}": generator.uniform(0.5, 1.5, chain.table.group_sizes(rung)[group]).astype(np.float32)
            for norm, group in chain.table.norms.items()
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
    clusters = {g: shared_clusters(group_rows(tensors, table.writers(g)), sizes[g]) for g in table.groups}
    ordered = in_leaf_order(table, tensors, {group: cluster.order for group, cluster in clusters.items()})
    for name, axes in table.axes.items():
        if ordered[name].ndim > 1:
            starts = np.concatenate(([0], np.cumsum(clusters[axes.rows].sizes)[:-1]))
            sums = np.add.reduceat(ordered[name], starts, axis=0)
            counts = clusters[axes.rows].sizes.reshape(-1, 1, 1, 1)
            ordered[name] = (sums / counts).astype(np.float32)
    return ordered, dict(clusters)
