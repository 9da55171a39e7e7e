"""The training loop, and a network trained alone: the teacher of a chain, and what its students are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from chains.chain import InputSpec
from chains.data.batches import BatchRecipe, batches
from chains.data.images import ImageSet
from chains.errors import DataError
from chains.losses import reid_loss
from chains.model import ReIDModel, normalise
from chains.width import Width

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainRecipe:
    """How long and how fast: Adam, linear warm-up, then a cosine to zero. `precision` is that of the forward pass."""

    steps: int
    lr: float = 1e-3
    weight_decay: float = 5e-4
    warmup_steps: int = 100
    clip_norm: float = 5.0
    precision: Literal["float32", "bfloat16"] = "float32"
    batch: BatchRecipe = field(default_factory=BatchRecipe)

    def rate(self, step: int) -> float:
        """Learning rate at `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def images(self) -> int:
        """Images seen, counting repeats."""
        return self.steps * self.batch.size


@dataclass(frozen=True, eq=False)
class Trained:
    """A model and the classifier it was trained with; classifier weight (pids, D)."""

    model: ReIDModel
    classifier: Tensor


def fit(
    parameters: list[Tensor],
    backward: Callable[[Tensor, Tensor], dict[str, float]],
    images: ImageSet,
    input: InputSpec,
    recipe: TrainRecipe,
    seed: int,
    report: Report | None = None,
) -> None:
    """Optimise `parameters` in place. `backward(images, labels)` adds gradients for one batch and returns its losses.

    Raises `DataError` as soon as a loss is not finite: a NaN would otherwise be trained into every width.
    """
    optimizer = torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    stream = batches(images, recipe.batch, seed)
    for step in range(recipe.steps):
        batch = next(stream)
        pixels = normalise(batch.images, input).contiguous(memory_format=torch.channels_last)
        _set_rate(optimizer, recipe.rate(step))
        optimizer.zero_grad(set_to_none=True)
        losses = backward(pixels, torch.from_numpy(batch.labels))
        _require_finite(step, losses)
        nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.step()
        if report is not None:
            report(step, losses)


def train_alone(
    architecture_name: str,
    width: Width,
    images: ImageSet,
    input: InputSpec,
    recipe: TrainRecipe,
    seed: int,
    report: Report | None = None,
) -> Trained:
    """A network of `width` trained from scratch on `images`, its initialisation and batches a function of the seed."""
    torch.manual_seed(seed)
    model = ReIDModel(architecture_name, width).train()
    classifier = new_classifier(images, model.backbone.channels)

    def backward(pixels: Tensor, labels: Tensor) -> dict[str, float]:
        with autocast(recipe):
            feature, embedding = model(pixels)
        loss = reid_loss(feature.float(), embedding.float() @ classifier.T, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())}

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit([*trainable, classifier], backward, images, input, recipe, seed, report)
    return Trained(model.eval(), classifier.detach())


def new_classifier(images: ImageSet, embedding_dim: int) -> Tensor:
    """A trainable weight (pids, D) near zero, one row per identity of `images`."""
    identities = len(set(images.pids.tolist()))
    return nn.Parameter(torch.randn(identities, embedding_dim) * 1e-3)


def autocast(recipe: TrainRecipe) -> torch.autocast | nullcontext[None]:
    """What runs inside is computed in bfloat16 where the recipe says so; weights and updates stay float32. A loss is as
    precise as what goes into it: the classifier runs outside in `train_alone` and inside in `chains.refine`."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext()


def every(steps: int, sink: Callable[[str], None]) -> Report:
    """A report that writes one line every `steps` steps."""

    def report(step: int, losses: dict[str, float]) -> None:
        if step % steps == steps - 1:
            sink(f"step {step + 1}: " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))

    return report


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _require_finite(step: int, losses: dict[str, float]) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise DataError(f"step {step}: {name} is {value}; lower the learning rate or check the images")
