"""What every backbone is."""

from __future__ import annotations

from torch import nn


class Backbone(nn.Module):
    """Turns images (batch, 3, H, W) into a feature map (batch, `channels`, h, w) or, where the network pools by itself,
    into a feature (batch, `channels`)."""

    channels: int
