"""The last look at a chain file before anybody may see it: it loads, it was measured, and its students run.

The narrowest and the widest student are written as ONNX, run in onnxruntime, and must answer as torch does. Every width
between them is made by the same code from the same tensors.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chains.artifact import StoredChain
from chains.chain import Chain, Floats
from chains.data.images import Images
from chains.errors import ChainFileError, ChainMismatch
from chains.evaluate import embed
from chains.model import load_student
from chains.onnxfile import EmitOptions, require_finite
from chains.onnxfile import write as write_onnx
from chains.onnxrun import OnnxModel
from chains.width import Width

TOLERANCE = 1e-3  # of unit embeddings, per coordinate; two runtimes order sums differently


@dataclass(frozen=True)
class Verified:
    """What was found. largest_difference: between the coordinates of unit embeddings in onnxruntime and in torch, by
    width."""

    images: int
    largest_difference: dict[Width, float]


def verify(stored: StoredChain, images: Images) -> Verified:
    """Raises `ChainFileError` when a width has no accuracy or no finite one, `NotCalibrated`, and `ChainMismatch` when
    a student is not finite or onnxruntime does not answer as torch does."""
    chain = stored.chain
    require_measured(chain)
    for width in chain.ladder:
        require_finite(stored, width)
    ends = dict.fromkeys((chain.ladder[0], chain.ladder[-1]))
    return Verified(len(images), {width: _difference(stored, width, images) for width in ends})


def require_measured(chain: Chain) -> None:
    """Raises `ChainFileError` unless every width of the ladder has a finite accuracy."""
    frontier = chain.frontier
    for width in chain.ladder:
        measured = None if frontier is None else frontier.of(width)
        if measured is None or not math.isfinite(measured.map):
            raise ChainFileError(f"chain '{chain.name}' has no accuracy at {width}; evaluate it before it is published")


def _difference(stored: StoredChain, width: Width, images: Images) -> float:
    chain = stored.chain
    expected = _unit(embed(load_student(chain, width), images, chain.input)[:, chain.lift(width)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.onnx"
        file.write_bytes(write_onnx(stored, width, EmitOptions()))
        found = OnnxModel(file).embed(images)
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf
    if not difference <= TOLERANCE:  # NaN too
        raise ChainMismatch(
            f"chain '{chain.name}' at {width}: onnxruntime and torch differ by {difference:.2g} in a coordinate of an "
            f"embedding; at most {TOLERANCE:g} is rounding"
        )
    return difference


def _unit(embeddings: Floats) -> Floats:
    unit: Floats = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return unit
