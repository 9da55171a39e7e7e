"""Finetuning: a student trained downstream from its expansion, the OSKT paper's protocol (ICCV 2025, §4).

The student of a width is expanded, gets a new classifier for the identities of the new images, and is trained like any
network. It leaves the chain's embedding space: its embeddings compare with no other model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from chains.chain import Chain
from chains.data.images import Images
from chains.expand import student_weights
from chains.losses import PAPER_LOSS, LossRecipe
from chains.model import ReIDModel, model_of, network_of
from chains.train import Distillation, Run, Trained, TrainRecipe, train_alone
from chains.width import Width


def finetune(
    chain: Chain,
    width: Width,
    images: Images,
    recipe: TrainRecipe,
    seed: int,
    run: Run = Run(),  # noqa: B008 - frozen
    *,
    validate: Callable[[Trained], Mapping[str, float]] | None = None,
    loss: LossRecipe = PAPER_LOSS,
    distillation: Distillation | None = None,
) -> Trained:
    """The student of `chain` at `width`, trained on `images`; native embedding, leaf order.

    recipe: `chains.train.paper_recipe(images, "finetune")` is the paper's schedule. Any other start, a pruned teacher
    say, goes to `chains.train.train_alone(start=...)`, which this is. Raises `WidthError` or `CutError` when the chain
    cannot give the width, and what `chains.train.fit` raises.
    """
    return train_alone(
        chain.architecture,
        width,
        images,
        chain.input,
        recipe,
        seed,
        run,
        validate=validate,
        loss=loss,
        start=expanded(chain, width),
        distillation=distillation,
    )


def expanded(chain: Chain, width: Width) -> ReIDModel:
    """The student as expansion makes it, with its calibrated statistics where the chain has them. Without them it is
    fit for training, not for use."""
    return model_of(network_of(chain), width, {**student_weights(chain, width), **chain.statistics.get(width, {})})
