"""Partial teachers trained by this library: a data set seen through a view, and a network trained on it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from chains.chain import InputSpec
from chains.data.images import Images, Labels
from chains.data.images import Pixels as Crops
from chains.fuse.crops import crop_view
from chains.fuse.partials import IMAGENET
from chains.fuse.views import View
from chains.importers.frozen import Pixels
from chains.train import Run, Trained, TrainRecipe, train_alone
from chains.width import Width


@dataclass(frozen=True, eq=False)
class Viewed:
    """`images` as a network sees them that looks at one view: the same labels, other pixels. A port of `Images`."""

    images: Images
    view: View

    @property
    def pids(self) -> Labels:
        return self.images.pids

    @property
    def camids(self) -> Labels:
        return self.images.camids

    @property
    def size(self) -> tuple[int, int]:
        return self.view.height, self.view.width

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, indices: npt.ArrayLike) -> Crops:
        full = torch.from_numpy(self.images.pixels(indices)).permute(0, 3, 1, 2)
        cut: Crops = crop_view(full, self.view).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return np.ascontiguousarray(cut)

    def take(self, indices: npt.ArrayLike) -> Self:
        return type(self)(self.images.take(indices), self.view)


def train_partial(
    architecture_name: str,
    width: Width,
    images: Images,
    view: View,
    recipe: TrainRecipe,
    seed: int,
    run: Run = Run(),  # noqa: B008 - frozen
    pixels: Pixels = IMAGENET,
) -> tuple[Trained, InputSpec]:
    """A partial teacher, trained by `train_alone` on a view of `images`, and the input it wants; both go into its file
    (`chains.export.save_trained`). As in the paper it knows identities (cross-entropy and triplet)."""
    spec = InputSpec(view.height, view.width, *pixels)
    return train_alone(architecture_name, width, Viewed(images, view), spec, recipe, seed, run), spec
