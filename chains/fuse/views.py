"""Views: the rows of a person's image that one network sees, and how they are cut out of images and feature maps.

The one surprise: an image and a feature map are cut by the same function, so that rows correspond. Output pixel i of
`n` stands for the span `(bottom - top) H / n` rows around `top H + (i + ½) (bottom - top) H / n`. Its value is the mean
of the rows around that centre, weighted by a triangle that is as wide as the span, and never narrower than one row:
bilinear interpolation where the cut enlarges, and where it shrinks the same with every row taking part, as image
libraries resize. (Four taps alone would skip rows: they alias in images, and leave rows of a map without gradient.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chains.errors import DataError

SIZES = range(16, 1025)  # pixels either way, as for every importer


@dataclass(frozen=True)
class View:
    """The rows from `top` to `bottom`, fractions of the image's height, as an image of `height` × `width` pixels.
    Raises `DataError` for rows outside the image and for sizes outside 16..1024."""

    top: float
    bottom: float
    height: int
    width: int

    def __post_init__(self) -> None:
        if not 0 <= self.top < self.bottom <= 1:
            raise DataError(f"a view runs from top to bottom within 0..1, not from {self.top:.4g} to {self.bottom:.4g}")
        if self.height not in SIZES or self.width not in SIZES:
            raise DataError(f"a view of {self.height} × {self.width} pixels is outside 16..1024 either way")

    def of(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) → float32 (n, channels, `height`, `width`)."""
        return crop(images, self.top, self.bottom, self.height, self.width)


PAPER_VIEWS: Mapping[str, View] = {
    "holistic": View(0, 1, 256, 128),
    "up1": View(0, 1 / 2, 224, 224),
    "mid1": View(1 / 4, 3 / 4, 224, 224),
    "dn1": View(1 / 2, 1, 224, 224),
    "up2": View(0, 3 / 7, 224, 224),
    "mid2": View(2 / 7, 5 / 7, 224, 224),
    "dn2": View(4 / 7, 1, 224, 224),
}
"""The paper's: the whole image, stripes 1–2, 2–3 and 3–4 of four, stripes 1–3, 3–5 and 5–7 of seven."""


def whole(height: int, width: int) -> View:
    """The full view at a size."""
    return View(0, 1, height, width)


def crop(x: Tensor, top: float, bottom: float, height: int, width: int) -> Tensor:
    """The rows from `top` to `bottom` of images or maps (n, channels, H, W) → float32 (n, channels, height, width),
    also under autocast. Differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        rows = _weights(x.shape[2], top, bottom, height).to(x.device)
        columns = _weights(x.shape[3], 0, 1, width).to(x.device)
        cut: Tensor = rows @ x.float() @ columns.T
    return cut


def _weights(inputs: int, start: float, end: float, outputs: int) -> Tensor:
    """float32 (outputs, inputs), rows that add up to one: see the module."""
    span = (end - start) * inputs / outputs
    centres = start * inputs + (torch.arange(outputs, dtype=torch.float64) + 0.5) * span
    distances = (torch.arange(inputs, dtype=torch.float64) + 0.5 - centres[:, None]).abs()
    triangles = (1 - distances / max(1.0, span)).clamp(min=0)
    return (triangles / triangles.sum(dim=1, keepdim=True)).float()
