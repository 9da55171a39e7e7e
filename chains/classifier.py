"""A classifier for a teacher that has none for these people: made from the centroids of their embeddings.

Refinement trains on identities, so it needs a row of logits per identity of the images. A teacher from somewhere else
comes without one, or with one of other people; its embeddings, though, already tell these people apart. The row of an
identity is the direction of the mean of its embeddings, each at unit length (a nearest-centroid classifier under the
cosine). One number is fitted: by how much all rows are scaled, which is how sure the logits are.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from chains.chain import InputSpec
from chains.data.images import Images
from chains.errors import DataError
from chains.evaluate import embed
from chains.export import Exported
from chains.processes import local_device
from chains.train import Trained

Choice = Literal["centroids", "auto"]
MIN_RIGHT = 0.5  # share of the training images that a classifier of these people gets right; chance is far below
SCALES = np.geomspace(1, 1024, 41)  # a grid, so that rounding on another machine gives the same rows


def with_classifier(
    exported: Exported, choice: Choice, images: Images, input: InputSpec, device: str = "cpu"
) -> tuple[Trained, Literal["own", "centroids"]]:
    """The network of `exported` with a classifier for the people of `images`, and which one that is.

    choice: "centroids": a new one. "auto": the file's if it has a row per identity and puts at least half of the images
    to theirs, else a new one: as many rows may still be of other people, or in another order. Raises as `embed` and
    `centroid_classifier`.
    """
    own = exported.classifier
    embeddings = torch.from_numpy(embed(exported.model.to(local_device(device)), images, input))
    exported.model.cpu()
    labels = labels_of(images)
    if choice == "auto" and own is not None and share_right(own, embeddings, labels) >= MIN_RIGHT:
        return Trained(exported.model, own), "own"
    return Trained(exported.model, centroid_classifier(embeddings, labels)), "centroids"


def labels_of(images: Images) -> Tensor:
    """int64 (n,): the position of each image's identity in the sorted list of pids."""
    labels: NDArray[np.int64] = np.unique(images.pids, return_inverse=True)[1].astype(np.int64)
    return torch.from_numpy(labels)


def share_right(classifier: Tensor, embeddings: Tensor, labels: Tensor) -> float:
    """Which part of the embeddings (n, D) `classifier` (pids, D) puts to their identity; 0 if it knows another number
    of identities."""
    if len(classifier) != int(labels.max()) + 1:
        return 0.0
    return float((_logits(classifier, embeddings).argmax(dim=1) == labels).double().mean())


def centroid_classifier(embeddings: Tensor, labels: Tensor) -> Tensor:
    """float32 (pids, D): unit centroids of the unit embeddings (n, D), scaled so that the mean cross-entropy of the
    embeddings as they are is smallest. Raises `DataError` for an identity whose embeddings cancel out, or are zero."""
    identities = int(labels.max()) + 1
    unit = functional.normalize(embeddings.double(), dim=1)
    centroids = torch.zeros(identities, unit.shape[1], dtype=torch.float64).index_add_(0, labels, unit)
    lengths = centroids.norm(dim=1, keepdim=True)
    if not bool((lengths > 1e-6).all()):
        raise DataError(
            f"the teacher's embeddings of identity number {int(lengths.argmin())} have no direction in common; it is "
            "not fit to be refined"
        )
    length = float(embeddings.norm(dim=1).double().mean())
    rows = (centroids / lengths).float() / length
    losses = [float(functional.cross_entropy(_logits(rows, embeddings) * scale, labels)) for scale in SCALES]
    scaled: Tensor = rows * float(SCALES[int(np.argmin(losses))])
    return scaled


def _logits(classifier: Tensor, embeddings: Tensor) -> Tensor:
    logits: Tensor = embeddings.float() @ classifier.float().T
    return logits
