"""Compatibility over time: a new chain that is trained into the embedding space of an old one.

The old chain's full-width student embeds the new training images; each identity's mean is its *centroid* in the old
space. The new networks then learn, besides everything else, to classify their own embeddings by the cosine with those
frozen centroids (Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020: the influence of the
old classifier, here synthesised for the new identities from the old embeddings, so that no old training data is
needed). Galleries that the old chain embedded can then be searched with queries of the new one.

The one surprise: whether that worked is measured, not assumed. The new chain only takes over the id of the old space
when its queries find at least as much in the old gallery as the old queries did (their criterion, eq. 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chains.artifact import StoredChain
from chains.chain import Chain, Floats
from chains.cost import count_macs
from chains.cut import Indices
from chains.data.images import Images
from chains.errors import ChainMismatch, DataError
from chains.evaluate import embed
from chains.losses import backward_compatible_loss
from chains.model import load_student
from chains.ranking import l2_normalised, rank_sets
from chains.width import Width


@dataclass(frozen=True, eq=False)
class Anchor:
    """An old embedding space, as new networks learn to meet it.

    centroids: float32 (pids, D), of length one, in the old teacher's channel order, a row per identity in the order of
    its labels. chain, digest, embedding_space: of the old chain. weight: of the loss in every network's objective.
    scale: what cosines are multiplied by to become logits. Cosines span no more than 2, so unscaled they leave the
    softmax over hundreds of identities flat however right they are; at 30 (the value of additive-margin softmax, Wang
    et al., 2018) a lead of 0.3 over 700 others is already a probability of 0.92, and learning goes on up to there.
    """

    centroids: Floats
    chain: str
    digest: str
    embedding_space: str
    weight: float = 1.0
    scale: float = 30.0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and self.scale > 0):
            raise DataError(f"weight {self.weight} and scale {self.scale} of an anchor must be above 0")

    def settings(self) -> dict[str, Any]:
        """What decides a run, as JSON values. The centroids are a function of the digest and the images."""
        return {"digest": self.digest, "weight": self.weight, "scale": self.scale}


def anchor_in(old: StoredChain, images: Images, embedding_dim: int, weight: float = 1.0, scale: float = 30.0) -> Anchor:
    """The anchor for training a network whose embeddings are `embedding_dim` long on `images`, in the space of `old`.
    Raises as `require_fit`."""
    chain = old.chain
    require_fit(chain, images, embedding_dim)
    centroids = centroids_of(common_embeddings(chain, chain.teacher, images), images.pids)
    return Anchor(centroids, chain.name, old.digest, chain.embedding_space, weight, scale)


def require_fit(old: Chain, images: Images, embedding_dim: int) -> None:
    """Raises `ChainMismatch` when the old chain's embeddings are not `embedding_dim` long, `NotCalibrated` when it has
    no statistics at full width, `DataError` when it wants to see images of another size."""
    old.require_calibrated(old.teacher)
    if old.embedding_dim != embedding_dim:
        raise ChainMismatch(
            f"chain '{old.name}' embeds into {old.embedding_dim} numbers, the new teacher into {embedding_dim}; "
            "a compatible teacher has embeddings as long: choose its architecture and width accordingly"
        )
    height, width = images.size
    if (height, width) != (old.input.height, old.input.width):
        raise DataError(
            f"chain '{old.name}' sees images of {old.input.height}x{old.input.width} pixels (height x width), "
            f"these are {height}x{width}; a compatible teacher sees what the old one saw: read them at its size"
        )


def common_embeddings(chain: Chain, width: Width, images: Images) -> Floats:
    """Embeddings in the common space, the teacher's own channel order: float32 (n, D). Raises as `embed` does, and
    `NotCalibrated`."""
    embedded: Floats = embed(load_student(chain, width), images, chain.input)[:, chain.lift(width)]
    return embedded


def centroids_of(embeddings: Floats, pids: Indices) -> Floats:
    """The mean of the L2-normalised `embeddings` (n, D) of each identity, scaled to length one: float32 (pids, D), by
    rising pid."""
    _, labels = np.unique(pids, return_inverse=True)
    sums = np.zeros((labels.max() + 1, embeddings.shape[1]), np.float32)
    np.add.at(sums, labels, l2_normalised(embeddings))
    return l2_normalised(sums)


class AnchorLoss(nn.Module):
    """`backward_compatible_loss` against an anchor, weighted.

    The centroids are no buffer: they are frozen, so neither the engine's running statistics nor a checkpoint has any
    business with them. order: of the channels of the embeddings that come in, int64 (D,), teacher channel of each;
    `None`: the teacher's own. shape: (pids, D) of the classifier of the network it is added to. Raises `ChainMismatch`
    where the centroids are of another.
    """

    def __init__(self, anchor: Anchor, shape: tuple[int, ...], order: Indices | None = None) -> None:
        super().__init__()
        if anchor.centroids.shape != tuple(shape):
            raise ChainMismatch(
                f"the centroids of chain '{anchor.chain}' are {anchor.centroids.shape} (identities, embedding length), "
                f"the classifier to be trained {tuple(shape)}; make the anchor with the images that are trained on"
            )
        self.anchor = anchor
        self.centroids = torch.from_numpy(anchor.centroids if order is None else anchor.centroids[:, order])

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """A scalar. embedding: float32 (batch, D); labels: int64 (batch,), row of the centroids."""
        self.centroids = self.centroids.to(embedding.device)
        return self.anchor.weight * backward_compatible_loss(embedding, self.centroids, labels, self.anchor.scale)


@dataclass(frozen=True)
class Compatibility:
    """mAP in percent across an old and a new chain, in the common space, by the protocol of `chains.ranking`.

    old_map: old queries, old gallery. old_gallery_new_query_map: new queries, old gallery. new_map: both new. All three
    at full width. old_gallery_narrowest_query_map: queries of the new chain's narrowest width in the same old gallery.
    old_width: of the queries of `old_map`, where that is a narrower one; the gallery stays at full width.
    """

    old_map: float
    old_gallery_new_query_map: float
    new_map: float
    old_gallery_narrowest_query_map: float
    old_width: Width | None = None

    @property
    def is_met(self) -> bool:
        """Whether changing the queries' model, and nothing else, loses nothing (Shen et al., eq. 2)."""
        return self.old_gallery_new_query_map >= self.old_map


def measure_compatibility(
    old: Chain, new: Chain, query_set: Images, gallery_set: Images, old_width: Width | None = None
) -> Compatibility:
    """old_width: of the old queries that are to be matched, see `Compatibility`; default the full one. Values are
    rounded to 2 decimals. Raises as `chains.evaluate.embed` and `chains.ranking.rank_sets`."""
    old_queries = common_embeddings(old, old_width or old.teacher, query_set)
    old_gallery = common_embeddings(old, old.teacher, gallery_set)
    new_queries, new_gallery = (common_embeddings(new, new.teacher, images) for images in (query_set, gallery_set))
    narrowest = common_embeddings(new, new.ladder[0], query_set)

    def mean_ap(queries: Floats, gallery: Floats) -> float:
        return round(rank_sets(queries, gallery, query_set, gallery_set).map, 2)

    return Compatibility(
        old_map=mean_ap(old_queries, old_gallery),
        old_gallery_new_query_map=mean_ap(new_queries, old_gallery),
        new_map=mean_ap(new_queries, new_gallery),
        old_gallery_narrowest_query_map=mean_ap(narrowest, old_gallery),
        old_width=old_width,
    )


def rival_width(old: Chain, macs: int) -> Width:
    """The width of `old` that a device of `macs` multiply-adds would else get: the widest that costs no more, or the
    narrowest of all. A model for that device may join the space when its queries find no less than those of it."""
    fitting = [width for width in old.ladder if count_macs(old.table, width, old.input) <= macs]
    return fitting[-1] if fitting else old.ladder[0]


def joined_space(new: Chain, anchor: Anchor, measured: Compatibility) -> Chain:
    """`new`, in the old chain's embedding space where the criterion is met and else in its own; its provenance says
    what was measured either way. Native embeddings always stay in a space of their own: see `Chain.native_space`."""
    record = {
        "chain": anchor.chain,
        "chain_digest": anchor.digest,
        "embedding_space": anchor.embedding_space,
        "own_space": new.embedding_space,
        "weight": anchor.weight,
        "scale": anchor.scale,
        "is_met": measured.is_met,
        **{name: value for name, value in vars(measured).items() if name != "old_width"},
        **({} if measured.old_width is None else {"old_width": str(measured.old_width)}),
    }
    space = anchor.embedding_space if measured.is_met else new.embedding_space
    return replace(new, embedding_space=space, provenance={**new.provenance, "compatible_with": record})


def compatibility_of(chain: Chain) -> Mapping[str, Any] | None:
    """What `joined_space` noted; `None` for a chain that was not trained to be compatible."""
    record = chain.provenance.get("compatible_with")
    return record if isinstance(record, Mapping) else None
