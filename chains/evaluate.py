"""Evaluation: the accuracy of every width of a chain as it is served, with no training after expansion.

Images are embedded a batch at a time, so a set on disk may be larger than memory; what is kept are native embeddings of
every width, (query + gallery images) × (sum of the widths' embedding lengths) floats. They are lifted into the common
space a pair of widths at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from chains.chain import FALSE_ACCEPT_RATES, Chain, Floats, Frontier, InputSpec, Threshold, Thresholds, WidthAccuracy
from chains.data.images import UNKNOWN_CAMERA, Images, Pixels
from chains.model import ReIDModel, load_student, normalise
from chains.processes import local_device
from chains.ranking import Ranking, Truth, rank_blocks, score_blocks
from chains.rerank import Reranking, reranked_blocks
from chains.thresholds import PairCounts
from chains.width import Width

BATCH = 256
PROTOCOL = (
    "single query, cosine similarity in the common embedding space, gallery images of the query's identity and camera "
    "left out; mAP: mean over queries of the mean precision at each correct match; mINP: mean over queries of correct "
    "matches / rank of the last one; 95 % bootstrap interval over queries; thresholds: the smallest multiple of 0.0001 "
    "that at most the stated share of all pairs of different identities reaches, with the share of pairs of one "
    "identity, those left out aside, that reaches it"
)


@torch.no_grad()
def embed(model: ReIDModel, images: Images, input: InputSpec) -> Floats:
    """Native embeddings behind the neck: float32 (n, D). The model is in evaluation mode meanwhile, on its own
    device. Raises `DataError` for images of another size than `input`."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        embedded = [model.embed(normalise(pixels, input, device)).cpu() for pixels in _batches(images)]
    finally:
        model.train(was_training)
    return torch.cat(embedded).numpy()


def _batches(images: Images) -> Iterator[Pixels]:
    for start in range(0, len(images), BATCH):
        yield images.pixels(np.arange(start, min(start + BATCH, len(images))))


def evaluate_model(
    model: ReIDModel, query_set: Images, gallery_set: Images, input: InputSpec, reranking: Reranking | None = None
) -> Ranking:
    """Native-space accuracy of one model, on request of re-ranked lists. Raises as `embed` and `rank_sets`."""
    queries, gallery = embed(model, query_set, input), embed(model, gallery_set, input)
    truth = Truth.of(query_set, gallery_set)
    score = score_blocks(queries, gallery, truth)
    return rank_blocks(score if reranking is None else reranked_blocks(queries, gallery, truth, reranking), truth)


def measure_frontier(
    chain: Chain,
    query_set: Images,
    gallery_set: Images,
    dataset: str,
    seed: int,
    reranking: Reranking | None = None,
    device: str = "cpu",
) -> Frontier:
    """mAP, its interval, mINP and CMC of every width of the ladder; mAP and same-or-different cut-offs of every query
    width against every gallery width.

    dataset: how to name the images; seed: of the bootstrap; device: "cpu" or "cuda", of the networks. With `reranking`,
    which the protocol then names, accuracies are those of re-ranked lists; cut-offs are always cosines. Values are
    rounded to 2 decimals, so that a re-measurement on another processor gives the same file unless something really
    changed. Raises `DataError` when nothing can be measured, and for a device that is not there."""
    truth, ladder, place = Truth.of(query_set, gallery_set), chain.ladder, local_device(device)
    native = {width: _embedded(load_student(chain, width).to(place), chain, query_set, gallery_set) for width in ladder}

    def lifted(width: Width, side: int) -> Floats:
        return np.ascontiguousarray(native[width][side][:, chain.lift(width)])

    measured = [[_measured(lifted(q, 0), lifted(g, 1), truth, reranking) for g in ladder] for q in ladder]
    return Frontier(
        dataset=dataset,
        protocol=protocol(query_set, gallery_set, reranking),
        seed=seed,
        queries=len(query_set),
        gallery=len(gallery_set),
        trained_after_expansion=False,
        widths=tuple(_accuracy(width, measured[i][i][0], seed) for i, width in enumerate(ladder)),
        cross_map=tuple(tuple(round(ranking.map, 2) for ranking, _ in row) for row in measured),
        thresholds=tuple(
            Thresholds(rate, tuple(tuple(found[i] for _, found in row) for row in measured))
            for i, rate in enumerate(FALSE_ACCEPT_RATES)
        ),
    )


def protocol(query_set: Images, gallery_set: Images, reranking: Reranking | None = None) -> str:
    """How a frontier of these images is measured, in words: `PROTOCOL`, and where cameras are unknown or lists are
    re-ranked, that."""
    notes = [_unknown_cameras("query", query_set), _unknown_cameras("gallery", gallery_set)]
    if reranking is not None:
        notes.append(f"k-reciprocal re-ranking, k1 {reranking.k1}, k2 {reranking.k2}, lambda {reranking.weight}")
    return "; ".join([PROTOCOL, *filter(None, notes)])


def _unknown_cameras(what: str, images: Images) -> str:
    unknown = int((images.camids == UNKNOWN_CAMERA).sum())
    if not unknown:
        return ""
    return f"the camera of {unknown} of {len(images)} {what} images is unknown, and they are never of the same camera"


def _embedded(model: ReIDModel, chain: Chain, query_set: Images, gallery_set: Images) -> tuple[Floats, Floats]:
    return embed(model, query_set, chain.input), embed(model, gallery_set, chain.input)


def _measured(
    queries: Floats, gallery: Floats, truth: Truth, reranking: Reranking | None
) -> tuple[Ranking, tuple[Threshold | None, ...]]:
    """Ranking and cut-offs, one per rate of `FALSE_ACCEPT_RATES`, from one pass over the cosines; a second where the
    ranking is not by cosine."""
    counts = PairCounts(truth)
    cosines = counts.watch(score_blocks(queries, gallery, truth))
    ranking = rank_blocks(cosines, truth)
    if reranking is not None:
        ranking = rank_blocks(reranked_blocks(queries, gallery, truth, reranking), truth)
    return ranking, tuple(_rounded(counts.threshold(rate)) for rate in FALSE_ACCEPT_RATES)


def _rounded(threshold: Threshold | None) -> Threshold | None:
    return threshold and replace(threshold, true_accept=round(threshold.true_accept, 2))


def _accuracy(width: Width, ranking: Ranking, seed: int) -> WidthAccuracy:
    low, high = ranking.map_interval(seed)
    rank1, rank5, rank10 = (round(ranking.rank(k), 2) for k in (1, 5, 10))
    return WidthAccuracy(
        width, round(ranking.map, 2), (round(low, 2), round(high, 2)), rank1, rank5, rank10, round(ranking.minp, 2)
    )
