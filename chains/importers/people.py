"""What a network makes of people it has never seen: a few synthetic ones, rendered for the purpose.

The score is a report and no judgement: a good teacher of one site may do badly on rendered people. Only an answer no
teacher can give is refused: not finite, or the same for everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chains.chain import Floats, InputSpec
from chains.data.images import ImageSet
from chains.data.synthetic import PeopleSettings, gallery_images, query_images
from chains.errors import WeightsRefused
from chains.ranking import rank_sets

IDENTITIES = 8
SHUFFLES = 20
SMALLEST_SPREAD = 1e-6  # of embeddings around their mean, relative to the mean: below, everybody looks the same
Embed = Callable[[NDArray[np.uint8]], Floats]


@dataclass(frozen=True, eq=False)
class People:
    """Queries and gallery of a few synthetic identities."""

    queries: ImageSet
    gallery: ImageSet

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """All images, queries first: uint8 (n, H, W, 3)."""
        return np.concatenate([self.queries.images, self.gallery.images])


@lru_cache(maxsize=4)
def people(input: InputSpec) -> People:
    """The same people at the size that a network wants to see."""
    settings = PeopleSettings(
        test_identities=IDENTITIES,
        queries_per_identity=1,
        gallery_images_per_identity=3,
        height=input.height,
        width=input.width,
    )
    return People(query_images(settings), gallery_images(settings))


def require_sane(embeddings: Floats) -> None:
    """Raises `WeightsRefused` for embeddings (n, D) that are not finite or do not depend on the image."""
    if not np.isfinite(embeddings).all():
        share = 100 * float((~np.isfinite(embeddings).all(axis=1)).mean())
        raise WeightsRefused(
            f"the embeddings of {share:.0f} % of {len(embeddings)} synthetic people hold NaN or infinity: weights or "
            "the normalisation statistics are broken"
        )
    wide = embeddings.astype(np.float64)
    centre = wide.mean(axis=0)
    spread = float(np.abs(wide - centre).max())
    if spread <= SMALLEST_SPREAD * max(float(np.abs(centre).max()), 1e-30):
        raise WeightsRefused(
            f"the embedding is the same for {len(embeddings)} images of {IDENTITIES} synthetic people: the network "
            "does not look at the image"
        )


def score(embeddings: Floats, shown: People) -> dict[str, Any]:
    """mAP in percent on the synthetic people, and what embeddings dealt at random would reach on average."""
    count = len(shown.queries)
    found = rank_sets(embeddings[:count], embeddings[count:], shown.queries, shown.gallery).map
    generator = np.random.default_rng(0)
    noise = (generator.standard_normal((len(embeddings), 32)).astype(np.float32) for _ in range(SHUFFLES))
    chance = [rank_sets(some[:count], some[count:], shown.queries, shown.gallery).map for some in noise]
    return {
        "map": round(found, 2),
        "chance_map": round(float(np.mean(chance)), 2),
        "identities": IDENTITIES,
        "images": len(embeddings),
    }
