"""How views are cut out of images and feature maps.

The one surprise: an image and a feature map are cut by the same function, so that rows correspond. Output pixel i of
`n` stands for the span `(bottom - top) H / n` rows around `top H + (i + ½) (bottom - top) H / n`. Its value is the mean
of the rows around that centre, weighted by a triangle that is as wide as the span, and never narrower than one row:
bilinear interpolation where the cut enlarges, and where it shrinks the same with every row taking part, as image
libraries resize. (Four taps alone would skip rows: they alias in images, and leave rows of a map without gradient.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from chains.fuse.views import View


def crop_view(images: Tensor, view: View) -> Tensor:
    """What `view` shows of images: (n, channels, H, W) → float32 (n, channels, `height`, `width`)."""
    return crop(images, view.top, view.bottom, view.height, view.width)


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
