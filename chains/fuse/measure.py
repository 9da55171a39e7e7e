"""What a fusion is worth: the student, each input alone on its view, and all inputs together, on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chains.chain import Floats, InputSpec
from chains.data.images import Images, chunks
from chains.evaluate import evaluate_model
from chains.fuse.partials import Partial
from chains.model import ReIDModel, normalise
from chains.processes import local_device
from chains.ranking import Ranking, rank_sets

BATCH = 64  # images at once


@dataclass(frozen=True, eq=False)
class Measured:
    """student: the fused network; inputs: in the order they were given; ensemble: their embeddings, each at unit
    length, one behind the other, which costs all of them at inference: the reference above, not a rival."""

    student: Ranking
    inputs: tuple[Ranking, ...]
    ensemble: Ranking

    @property
    def best_input(self) -> int:
        """Position of the input with the highest mAP; of equals the first."""
        return int(np.argmax([ranking.map for ranking in self.inputs]))

    @property
    def is_worse(self) -> bool:
        """Whether the student ranks worse than the best of what it was made from."""
        return self.student.map < self.inputs[self.best_input].map


def measure(
    model: ReIDModel, partials: Sequence[Partial], query: Images, gallery: Images, input: InputSpec, device: str = "cpu"
) -> Measured:
    """input: what `model` wants to see. Raises as `rank_sets`."""
    queries, found = (embed_partials(partials, images, input, device) for images in (query, gallery))
    ranked = [rank_sets(q, g, query, gallery) for q, g in zip(queries, found, strict=True)]
    ensemble = rank_sets(joined_features(queries), joined_features(found), query, gallery)
    return Measured(evaluate_model(model.to(local_device(device)), query, gallery, input), tuple(ranked), ensemble)


def embed_partials(partials: Sequence[Partial], images: Images, input: InputSpec, device: str = "cpu") -> list[Floats]:
    """Embeddings (n, D) by every teacher of its view of `images`, which are full ones."""
    place, parts = local_device(device), []
    for crops in chunks(images, BATCH):
        pixels = normalise(crops, input, place)
        parts.append([partial.answer(pixels, input).embedding.float().cpu() for partial in partials])
    return [torch.cat(of_one).numpy() for of_one in zip(*parts, strict=True)]


def joined_features(embeddings: Sequence[Floats]) -> Floats:
    """Embeddings (n, D_k) of several networks as one (n, Σ D_k) whose cosine is the mean of theirs."""
    unit = [torch.nn.functional.normalize(torch.from_numpy(one), dim=1) for one in embeddings]
    joined: Floats = torch.cat(unit, dim=1).numpy()
    return joined
