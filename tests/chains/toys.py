"""What tests share: a tiny net, a few images of one colour per identity, and how a command ended."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from chains.chain import InputSpec
from chains.data.batches import BatchRecipe
from chains.data.images import ImageSet
from chains.train import Trained, TrainRecipe, train_alone
from chains.width import Width, even_ladder

INPUT = InputSpec(32, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
LADDER = even_ladder(Width(2), Width(4), 3)
RECIPE = TrainRecipe(3, warmup_steps=1, batch=BatchRecipe(identities=4, images_per_identity=2))


def flat_people(identities: int = 8, each: int = 4, seed: int = 0) -> ImageSet:
    """An image of one colour per identity, with noise: enough to learn from."""
    generator = np.random.default_rng(seed)
    pids = np.repeat(np.arange(identities), each)
    colours = generator.integers(30, 226, (identities, 1, 1, 3))[pids]
    noise = generator.integers(-25, 26, (len(pids), INPUT.height, INPUT.width, 3))
    return ImageSet((colours + noise).astype(np.uint8), pids, np.tile(np.arange(each) % 2, identities))


def a_teacher(seed: int = 0) -> Trained:
    return train_alone("resnet18", Width(4), flat_people(), INPUT, RECIPE, seed)


@dataclass(frozen=True)
class Done:
    """How a command ended: status, and what it printed."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]
