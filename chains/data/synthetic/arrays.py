"""The array types of the renderer, and how a colour travels in one word.

The one surprise: geometry is int16, for speed, so its products must stay below 32768. Where a square of a distance does
not, the point lies outside the part that is being painted, and what comes out is thrown away.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Small: TypeAlias = npt.NDArray[np.int16]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Words: TypeAlias = npt.NDArray[np.uint32]
Mask: TypeAlias = npt.NDArray[np.bool_]


def each(values: npt.ArrayLike) -> Small:
    """One number per image, shaped to meet that image's pixels; below 32768. (n,) -> (n, 1, 1)"""
    return np.asarray(values).astype(np.int16).reshape(-1, 1, 1)


def pack(colours: Ints) -> Words:
    """RGB 0..255 in one word, 0x00BBGGRR. (..., 3) -> (...)"""
    words = colours.astype(np.uint32)
    return np.asarray(words[..., 0] | words[..., 1] << np.uint32(8) | words[..., 2] << np.uint32(16))


def unpack(packed: Words, byte: int) -> Small:
    """One byte of each word: 0, 1, 2 for red, green, blue; 3 for whatever shares the word with them."""
    return ((packed >> np.uint32(8 * byte)) & np.uint32(255)).astype(np.int16)
