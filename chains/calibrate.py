"""Calibration: the normalisation statistics of every width of a ladder, measured once on unlabelled training images.

Expansion makes weights, not running statistics: a merged channel's mean and variance cannot be composed from those of
its parts. A width without statistics is never served.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from chains.chain import STATISTICS, Chain, Floats, InputSpec
from chains.data.images import Images
from chains.errors import DataError
from chains.expand import student_weights
from chains.model import ReIDModel, model_of, module_name, network_of, normalise
from chains.processes import local_device
from chains.width import Width

BATCH = 256


def calibrate(chain: Chain, images: Images, device: str = "cpu") -> Chain:
    """`chain` with statistics for its whole ladder, averaged over whole batches of 256 of `images`; the rest is left
    out. No labels are used, and a few hundred images suffice. device: "cpu" or "cuda". Raises `DataError` with fewer
    than one batch (variances of the neck would be noise), and for a device that is not there."""
    if len(images) < BATCH:
        raise DataError(f"{len(images)} images are too few to calibrate with; give at least {BATCH}")
    statistics = {width: measure_statistics(chain, width, images, device) for width in chain.ladder}
    # a frontier holds for the statistics it was measured with
    return replace(chain, statistics=statistics, frontier=None)


def measure_statistics(chain: Chain, width: Width, images: Images, device: str = "cpu") -> dict[str, Floats]:
    """`<norm>.running_mean` and `.running_var` of the student at `width`: float32 (channels,). Raises `DataError` for a
    device that is not there."""
    model = model_of(network_of(chain), width, student_weights(chain, width)).to(local_device(device))
    recalibrate(model, images, chain.input)
    state = model.state_dict()
    names = (f"{norm}.{kind}" for norm in chain.table.batch_norms for kind in STATISTICS)
    return {name: state[module_name(name)].cpu().numpy().astype(np.float32, copy=True) for name in names}


@torch.no_grad()
def recalibrate(model: ReIDModel, images: Images, input: InputSpec) -> None:
    """Replace the running statistics of `model`, in place and on its own device, by their cumulative mean over batches
    of `images`."""
    device = next(model.parameters()).device
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to say: cumulative average
    model.train()
    for start in range(0, len(images) - BATCH + 1, BATCH):
        model(normalise(images.pixels(np.arange(start, start + BATCH)), input, device))
    model.eval()
