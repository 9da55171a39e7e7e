"""Factorized Distillation as an objective of the training engine, and a student trained by it.

With F the student's feature map, r its embedding, and for partial teacher k its map F_k, embedding r_k and view:

    L     = L_CE + L_triplet + L_map + L_ret
    L_map = (1/K) Σ_k mean over images and locations of ‖ n(φ_k(crop_k F)) - n(F_k) ‖²     n: channels at unit length
    L_ret = (1/K) Σ_k mean over images of 1 - cos(ψ_k r, r_k)

φ_k is a 1×1 convolution, ψ_k a linear layer; both are trained and thrown away. That feature maps and retrieval features
are factorized into those of partial models is the paper's (Ren and Li, arXiv 1811.08073); losses, weights and schedule
are our choice. A teacher that shows no map has no part in L_map, and a student that pools by itself has no L_map; K
counts all teachers all the same, so that each one weighs as much whichever others there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from chains.chain import InputSpec
from chains.data.batches import BatchRecipe
from chains.data.images import Images
from chains.errors import DataError, WidthError
from chains.fuse.crops import crop
from chains.fuse.partials import Answer, Partial, perceive
from chains.fuse.views import View
from chains.losses import LossRecipe, ReIDLoss
from chains.model import ReIDModel
from chains.train import Objective, Run, Trained, TrainRecipe, begun_with, epoch_steps, fit, new_classifier
from chains.width import Width


@dataclass(frozen=True)
class FusionLoss:
    """map, retrieval: weights of L_map and L_ret; 0 is without. grid: (height, width) to which maps are cut for L_map,
    `None`: the size of the teacher's own. reid: of the rest."""

    map: float = 1.0
    retrieval: float = 1.0
    grid: tuple[int, int] | None = (7, 7)
    reid: LossRecipe = field(default_factory=LossRecipe)

    def __post_init__(self) -> None:
        if not (self.map >= 0 and self.retrieval >= 0):
            raise DataError(f"losses have no negative weights, not map={self.map}, retrieval={self.retrieval}")
        if self.grid is not None and not all(1 <= side <= 64 for side in self.grid):
            raise DataError(f"a grid of {self.grid[0]} × {self.grid[1]} is outside 1..64 either way")


def usual_recipe(images: Images) -> TrainRecipe:
    """Our schedule, on a training set of any size: Adam 3.5e-4 with 10 epochs of warm-up, 120 epochs, × 0.1 after 40
    and 70, 16 identities × 4 images."""
    batch = BatchRecipe(16, 4, pad=10, erasing=0.5)
    epoch = epoch_steps(images, batch)
    return TrainRecipe(
        steps=120 * epoch,
        lr=3.5e-4,
        warmup_steps=10 * epoch,
        batch=batch,
        schedule="steps",
        milestones=(40 * epoch, 70 * epoch),
        epoch=epoch,
    )


def map_loss(answered: Tensor, wanted: Tensor) -> Tensor:
    """mean ‖ n(answered) - n(wanted) ‖² of maps (n, C, h, w), over images and locations: 0 to 4. `wanted` gets no
    gradient."""
    difference = functional.normalize(answered, dim=1) - functional.normalize(wanted.detach(), dim=1)
    return difference.square().sum(dim=1).mean()


def retrieval_loss(answered: Tensor, wanted: Tensor) -> Tensor:
    """mean (1 - cos) of embeddings (n, D): 0 to 2. `wanted` gets no gradient."""
    return (1 - functional.cosine_similarity(answered, wanted.detach(), dim=1)).mean()


class Fusion(Objective):
    """A student with its classifier and, for training only, the heads that answer for each partial teacher."""

    def __init__(
        self,
        model: ReIDModel,
        classifier: nn.Parameter,
        reid: ReIDLoss,
        partials: Sequence[Partial],
        input: InputSpec,
        loss: FusionLoss,
    ) -> None:
        super().__init__()
        if not partials:
            raise DataError("a fusion has at least one input")
        self.model, self.classifier, self.reid = model, classifier, reid
        self.partials, self.input, self.loss = tuple(partials), input, loss  # no submodules: neither trained nor saved
        channels = model.backbone.channels
        with_map = loss.map > 0 and shows_map(model, input)
        self.map_heads = nn.ModuleDict(
            {str(k): nn.Conv2d(channels, p.map_shape[0], 1) for k, p in enumerate(partials) if with_map and p.map_shape}
        )
        self.retrieval_heads = nn.ModuleDict(
            {str(k): nn.Linear(channels, p.embedding_dim) for k, p in enumerate(partials) if loss.retrieval > 0}
        )

    def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:  # noqa: ARG002
        with self.autocast(pixels.device):
            own = perceive(self.model, pixels)
            taught = bool(self.map_heads or self.retrieval_heads)
            answers = [partial.answer(pixels, self.input) for partial in self.partials] if taught else []
        embedding = own.embedding.float()
        losses = {"loss": self.reid(own.feature.float(), embedding @ self.classifier.T, labels)}
        if self.map_heads and own.map is not None:
            losses["map"] = self.loss.map * self._mean(self.map_heads, own.map.float(), answers, self._map_loss)
        if self.retrieval_heads:
            losses["retrieval"] = self.loss.retrieval * self._mean(
                self.retrieval_heads, embedding, answers, self._retrieval_loss
            )
        return losses

    def _mean(
        self,
        heads: nn.ModuleDict,
        own: Tensor,
        answers: Sequence[Answer],
        loss: Callable[[nn.Module, Tensor, Answer, View], Tensor],
    ) -> Tensor:
        """(1/K) of the sum of `loss` over the teachers that have a head."""
        terms = [loss(head, own, answers[int(k)], self.partials[int(k)].view) for k, head in heads.items()]
        return torch.stack(terms).sum() / len(self.partials)

    def _map_loss(self, head: nn.Module, own: Tensor, answer: Answer, view: View) -> Tensor:
        assert answer.map is not None  # noqa: S101 - `Partial.answer`: as when it was opened, and so it got this head
        wanted = answer.map.float()
        if self.loss.grid is not None:
            wanted = crop(wanted, 0, 1, *self.loss.grid)
        return map_loss(head(crop(own, view.top, view.bottom, *wanted.shape[2:])), wanted)

    def _retrieval_loss(self, head: nn.Module, own: Tensor, answer: Answer, view: View) -> Tensor:  # noqa: ARG002
        return retrieval_loss(head(own), answer.embedding.float())

    def settings(self) -> Mapping[str, Any]:
        return {
            "loss": asdict(self.loss),
            "inputs": [{"sha256": p.sha256, "view": asdict(p.view), "pixels": p.pixels} for p in self.partials],
        }

    def trained(self) -> Trained:
        """The student as it is now, in eval mode; not a copy."""
        return Trained(self.model.eval(), self.classifier.detach())


def fuse(
    architecture_name: str,
    width: Width,
    partials: Sequence[Partial],
    images: Images,
    input: InputSpec,
    recipe: TrainRecipe,
    seed: int,
    run: Run = Run(),  # noqa: B008 - frozen
    *,
    validate: Callable[[Trained], Mapping[str, float]] | None = None,
    loss: FusionLoss = FusionLoss(),
    start: ReIDModel | None = None,
) -> Trained:
    """A student of `width` that learns the identities of `images` and from `partials`. It is an ordinary network: the
    heads are gone, and it starts and sees its batches as `train_alone` with the same seed would have them, so that with
    both weights 0 the two are the same network.

    start: the weights to begin with instead of random ones (left as they are). Raises `WidthError` where they are of
    another architecture or width. The result is on the CPU. See `fit` for the rest.
    """
    torch.manual_seed(seed)
    model = ReIDModel(architecture_name, width)
    if start is not None:
        _require_even(start, model)
        model = begun_with(start, model)
    classifier = new_classifier(images, model.backbone.channels)
    reid = ReIDLoss(len(classifier), model.backbone.channels, loss.reid, torch.Generator().manual_seed(seed))
    fusion = Fusion(model, classifier, reid, partials, input, loss)
    fit(fusion, images, input, recipe, seed, run, validate and (lambda: validate(fusion.trained())))
    return fusion.cpu().trained()


@torch.no_grad()
def shows_map(model: ReIDModel, input: InputSpec) -> bool:
    """Whether the network has a feature map in front of its pooling."""
    was_training, device = model.training, next(model.parameters()).device
    answer = perceive(model.eval(), torch.zeros(1, 3, input.height, input.width, device=device))
    model.train(was_training)
    return answer.map is not None


def _require_even(start: ReIDModel, model: ReIDModel) -> None:
    """Raises `WidthError` for a terminal model, which has sizes of its own at the width that it states."""
    same = (start.table.name, start.width) == (model.table.name, model.width)
    if same and _shapes(start) != _shapes(model):
        raise WidthError(
            f"the start is a pruned {start.table.name} with sizes of its own; a whole one of width {model.width} was "
            "to be trained"
        )


def _shapes(model: ReIDModel) -> Mapping[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
