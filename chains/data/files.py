"""Crops on disk, decoded and resized when asked for: what the readers of data sets return. Needs Pillow, and only here.

What is decided about a file:

- Formats: JPEG, PNG, BMP and WebP. Others are refused, because Pillow would run far more code for them.
- Colour: RGB. Grey and palette images are expanded, transparency is dropped; 16-bit and float images are refused.
- Orientation: an EXIF orientation tag is obeyed, so that a person stands upright as in every viewer. The public data
  sets carry none.
- Resizing: bilinear with antialiasing, aspect ratio not kept, as everywhere in ReID. A JPEG of more than twice the
  wanted size is decoded at a half, a quarter or an eighth (libjpeg's draft mode), and still resized from there.
- Size: more than 33.5 million pixels (an 8K video frame) or 64 MB is no crop; refused before it is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chains.data.images import Labels, Pixels, check_labels, positions
from chains.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
MAX_PIXELS = 2**25
MAX_BYTES = 64_000_000
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Crops that stay on disk until `pixels` asks for them.

    paths: n files; pids, camids: int64 (n,); size: (height, width) every crop is resized to. The files are not touched
    before; a file that cannot be decoded raises `DataError` that names it.
    """

    paths: tuple[Path, ...]
    pids: Labels
    camids: Labels
    size: tuple[int, int] = (256, 128)

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise DataError(f"the size of crops must be (height, width), both at least 1; got {self.size}")
        for name in ("pids", "camids"):
            check_labels(name, getattr(self, name), len(self.paths))

    @classmethod
    def of(cls, paths: Sequence[Path], pids: Sequence[int], camids: Sequence[int], size: tuple[int, int]) -> ImageFiles:
        """From plain sequences."""
        return cls(tuple(paths), np.array(pids, np.int64), np.array(camids, np.int64), size)

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, indices: npt.ArrayLike) -> Pixels:
        """Decode these files: RGB uint8 (len(indices), height, width, 3); -1 is the last. Raises `DataError` for a
        position outside the set and for a file that is broken, too large or of an unknown kind."""
        chosen = positions(indices, len(self))
        out = np.empty((len(chosen), *self.size, 3), np.uint8)
        for place, index in enumerate(chosen):
            out[place] = decode(self.paths[index], self.size)
        return out

    def take(self, indices: npt.ArrayLike) -> ImageFiles:
        """The files at these positions, in this order; -1 is the last. Raises `DataError` for a position outside."""
        chosen = positions(indices, len(self))
        paths = tuple(self.paths[index] for index in chosen)
        return ImageFiles(paths, self.pids[chosen], self.camids[chosen], self.size)


def decode(path: Path, size: tuple[int, int]) -> Pixels:
    """One file as RGB uint8 (height, width, 3). Raises `DataError` that names the file."""
    height, width = size
    with _opened(path, _contents(path)) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5 if "exif" in image.info else False
        image.draft(None, (2 * height, 2 * width) if turned else (2 * width, 2 * height))
        rgb = _upright_rgb(image)
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), _pillow().Resampling.BILINEAR)
        return np.asarray(rgb)


@dataclass(frozen=True)
class Inspection:
    """What a file turned out to be: a digest of its bytes and the size of the image as it lies there, in pixels."""

    digest: bytes
    height: int
    width: int


def inspect(path: Path, should_decode: bool = True) -> Inspection:
    """Read a whole file, and decode it at full size if asked. Raises `DataError` as `decode` does; without decoding
    only the header is checked."""
    contents = _contents(path)
    with _opened(path, contents) as image:
        width, height = image.size
        if should_decode:
            _upright_rgb(image)
    return Inspection(blake2b(contents, digest_size=16).digest(), height, width)


def _contents(path: Path) -> bytes:
    """The bytes of a file, at most `MAX_BYTES`."""
    try:
        with path.open("rb") as file:
            contents = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(contents) > MAX_BYTES:
        raise DataError(f"{path}: more than {MAX_BYTES:,} bytes; a crop of a person is far smaller")
    return contents


@contextmanager
def _opened(path: Path, contents: bytes) -> Iterator[Image]:
    """The image in `contents`; whatever goes wrong inside the block is raised as `DataError` naming `path`."""
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(contents), formats=FORMATS) as image:
            _check_header(image)
            yield image
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except pillow.UnidentifiedImageError as error:  # its text names the buffer in memory, not the file
        what = "an empty file" if not contents else f"not an image in one of {', '.join(FORMATS)}"
        raise DataError(f"{path}: {what}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise whatever a broken file leads them to
        raise DataError(f"{path}: broken image: {error}") from error


def _check_header(image: Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels are no crop of a person; at most {MAX_PIXELS:,} pixels are decoded")
    if image.mode not in MODES:
        raise DataError(f"pixels of mode {image.mode!r} are not read; save the image with 8 bits per channel")


def _upright_rgb(image: Image) -> Image:
    """`image` decoded, turned as its EXIF tag says, in RGB."""
    from PIL import ImageOps

    image.load()
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:  # a palette with alpha cannot become RGB in one step
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pillow() -> ModuleType:
    """Pillow, found at the first file: the serving install has none."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise DataError("reading image files needs Pillow: pip install 'widthwise[train]'") from error
    return Image
