"""Evaluation: the accuracy of every width of a chain as it is served, with no training after expansion."""

from __future__ import annotations

import numpy as np
import torch

from chains.chain import Chain, Floats, Frontier, InputSpec, WidthAccuracy
from chains.data.images import ImageSet
from chains.model import ReIDModel, load_student, normalise
from chains.ranking import Ranking, rank_sets
from chains.width import Width

BATCH = 256
PROTOCOL = (
    "single query, cosine similarity in the common embedding space, gallery images of the query's identity and camera "
    "left out; mAP: mean over queries of the mean precision at each correct match; 95 % bootstrap interval over queries"
)


@torch.no_grad()
def embed(model: ReIDModel, images: ImageSet, input: InputSpec) -> Floats:
    """Native embeddings behind the neck: float32 (n, D)."""
    starts = range(0, len(images), BATCH)
    embedded = [model.embed(normalise(images.images[start : start + BATCH], input)) for start in starts]
    return torch.cat(embedded).numpy()


def evaluate_model(model: ReIDModel, query_set: ImageSet, gallery_set: ImageSet, input: InputSpec) -> Ranking:
    """Native-space accuracy of one model."""
    return rank_sets(embed(model, query_set, input), embed(model, gallery_set, input), query_set, gallery_set)


def measure_frontier(chain: Chain, query_set: ImageSet, gallery_set: ImageSet, dataset: str, seed: int) -> Frontier:
    """mAP, its interval and CMC of every width of the ladder, and mAP of every query width against every gallery width.

    dataset: how to name the images; seed: of the bootstrap. Values are rounded to 2 decimals, so that a re-measurement
    on another processor gives the same file unless something really changed."""
    lifted = {width: _lifted(chain, width, query_set, gallery_set) for width in chain.ladder}
    rankings = {
        (q, g): rank_sets(lifted[q][0], lifted[g][1], query_set, gallery_set)
        for q in chain.ladder
        for g in chain.ladder
    }
    return Frontier(
        dataset=dataset,
        protocol=PROTOCOL,
        seed=seed,
        queries=len(query_set),
        gallery=len(gallery_set),
        trained_after_expansion=False,
        widths=tuple(_accuracy(width, rankings[width, width], seed) for width in chain.ladder),
        cross_map=tuple(tuple(round(rankings[q, g].map, 2) for g in chain.ladder) for q in chain.ladder),
    )


def _lifted(chain: Chain, width: Width, query_set: ImageSet, gallery_set: ImageSet) -> tuple[Floats, Floats]:
    model, lift = load_student(chain, width), chain.lift(width)
    queries, gallery = (embed(model, images, chain.input)[:, lift] for images in (query_set, gallery_set))
    return np.ascontiguousarray(queries), np.ascontiguousarray(gallery)


def _accuracy(width: Width, ranking: Ranking, seed: int) -> WidthAccuracy:
    low, high = ranking.map_interval(seed)
    rank1, rank5, rank10 = (round(ranking.rank(k), 2) for k in (1, 5, 10))
    return WidthAccuracy(width, round(ranking.map, 2), (round(low, 2), round(high, 2)), rank1, rank5, rank10)
