"""Sets of crops: in memory and on disk they behave alike, and a bad file is named with what is wrong with it."""

import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chains.data import files
from chains.data.batches import BatchRecipe, Sampler
from chains.data.files import ImageFiles, decode, inspect
from chains.data.images import ImageSet, chunks, load
from chains.errors import DataError

SIZE = (12, 6)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def on_disk(tmp_path: Path) -> ImageFiles:
    """Five PNG files of the wanted size: lossless, so that pixels can be compared."""
    paths = [save(tmp_path / f"{i}.png", noise(*SIZE, seed=i)) for i in range(5)]
    return ImageFiles.of(paths, [3, 3, 8, 8, 9], [1, 2, 1, -1, 2], SIZE)


@pytest.fixture(params=["in memory", "on disk"])
def images(request: pytest.FixtureRequest, on_disk: ImageFiles) -> ImageSet | ImageFiles:
    return load(on_disk) if request.param == "in memory" else on_disk


def test_pixels_come_in_the_order_asked_for(images):
    got = images.pixels([4, 0, 0, -2])
    assert (got.shape, got.dtype) == ((4, *SIZE, 3), np.uint8)
    assert all(np.array_equal(pixels, noise(*SIZE, seed=seed)) for pixels, seed in zip(got, (4, 0, 0, 3), strict=True))
    assert images.pixels([]).shape == (0, *SIZE, 3)


def test_pixels_are_the_caller_s_to_change(images):
    images.pixels([1])[:] = 0
    assert np.array_equal(images.pixels([1])[0], noise(*SIZE, seed=1))


def test_taking_gives_the_same_kind_of_set(images):
    taken = images.take([2, 0])
    assert type(taken) is type(images)
    assert (taken.pids.tolist(), taken.camids.tolist(), taken.size, len(taken)) == ([8, 3], [1, 1], SIZE, 2)
    assert np.array_equal(taken.pixels([0])[0], noise(*SIZE, seed=2))


@pytest.mark.parametrize("position", [5, -6])
def test_a_position_outside_is_refused(images, position):
    for ask in (images.pixels, images.take):
        with pytest.raises(DataError, match=f"position {position} is outside a set of 5 images"):
            ask([0, position])


def test_batches_do_not_depend_on_where_the_images_are(on_disk):
    recipe = BatchRecipe(2, 2, erasing=0.5, colour_jitter=0.3)
    from_disk, from_memory = (Sampler(images, recipe, seed=1).batch(7) for images in (on_disk, load(on_disk)))
    assert np.array_equal(from_disk.images, from_memory.images)
    assert np.array_equal(from_disk.labels, from_memory.labels)


def test_chunks_are_all_images_in_order(images):
    pieces = list(chunks(images, 2))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert np.array_equal(np.concatenate(pieces), images.pixels(range(5)))


def test_labels_that_do_not_fit_the_files_are_refused(on_disk):
    with pytest.raises(DataError, match=r"camids must be int64 of shape \(5,\).*got int64 of shape \(2,\)"):
        ImageFiles(on_disk.paths, on_disk.pids, on_disk.camids[:2], SIZE)
    with pytest.raises(DataError, match=r"size of crops must be \(height, width\).*got \(0, 6\)"):
        ImageFiles(on_disk.paths, on_disk.pids, on_disk.camids, (0, 6))


# --- decoding


def test_a_file_is_resized_bilinearly_with_antialiasing(tmp_path):
    """A checkerboard of single pixels becomes even grey: without antialiasing it would alias to black or white."""
    board = np.indices((64, 32)).sum(axis=0)[..., None] % 2 * np.full(3, 255)
    got = decode(save(tmp_path / "board.png", board.astype(np.uint8)), (16, 8))
    assert np.abs(got[2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_height_and_width_are_not_mistaken_for_each_other(tmp_path):
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:20] = (250, 0, 0)
    got = decode(save(tmp_path / "a.png", pixels), (10, 30))
    assert got.shape == (10, 30, 3)
    assert got[0, 0].tolist() == [250, 0, 0]
    assert got[9, 29].tolist() == [0, 0, 0]


def test_a_large_jpeg_decoded_at_a_fraction_looks_like_one_decoded_whole(tmp_path):
    smooth = np.asarray(Image.fromarray(noise(16, 8)).resize((512, 1024), Image.Resampling.BICUBIC))
    path = save(tmp_path / "large.jpg", smooth, quality=95)
    with Image.open(path) as image:
        whole = np.asarray(image.convert("RGB").resize((64, 128), Image.Resampling.BILINEAR))
    got = decode(path, (128, 64)).astype(int)
    assert np.abs(got - whole).mean() < 2


def test_a_large_jpeg_is_not_decoded_at_full_size(tmp_path, monkeypatch):
    path = save(tmp_path / "large.jpg", noise(1024, 512))
    sizes = []
    monkeypatch.setattr(files, "_upright_rgb", lambda image: sizes.append(image.size) or Image.new("RGB", (64, 128)))
    decode(path, (128, 64))
    assert sizes == [(128, 256)], "twice the wanted size is left for the resizing"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_obeyed(tmp_path, orientation):
    """The tag says how to turn what is stored; Pillow's table of the eight cases is the reference."""
    pixels = np.asarray(Image.fromarray(noise(4, 3)).resize((30, 60), Image.Resampling.NEAREST))
    stored_as = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    image = Image.fromarray(pixels)
    stored = image.transpose(stored_as[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[files.ORIENTATION] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    got = decode(tmp_path / "a.jpg", (60, 30)).astype(int)
    assert np.abs(got - pixels).mean() < 6


def palette_with_alpha(path: Path) -> None:
    image = Image.fromarray(noise(8, 8)).quantize(8)
    image.save(path, transparency=bytes(range(8)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "CMYK", "P"])
def test_other_kinds_of_pixels_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(np.full((12, 6, 3), 255, np.uint8)).convert(mode).save(path)
    got = decode(path, (12, 6))
    assert (got.shape, got.dtype) == ((12, 6, 3), np.uint8)
    assert got.min() > 250


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    palette_with_alpha(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "a.png", (8, 8)).shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["a.bmp", "a.webp", "a.jpeg", "picture.of.another.kind"])
def test_what_counts_is_the_content_not_the_name(tmp_path, name):
    pixels = np.full((12, 6, 3), (200, 100, 50), np.uint8)
    Image.fromarray(pixels).save(
        tmp_path / name, format={".bmp": "BMP", ".webp": "WEBP"}.get(Path(name).suffix, "JPEG")
    )
    assert np.abs(decode(tmp_path / name, (12, 6)).astype(int) - pixels).max() < 12


# --- files that are refused: each error names the file


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    pieces = (struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def truncated(path: Path) -> None:
    save(path, noise(64, 32), format="JPEG")
    path.write_bytes(path.read_bytes()[:900])


BROKEN = {
    "an empty file": lambda path: path.write_bytes(b""),
    "not an image in one of JPEG, PNG": lambda path: path.write_text("hello"),
    "broken image: .*truncated": truncated,
    "5000 x 9000 pixels are no crop of a person; at most 33,554,432": lambda path: path.write_bytes(
        png_header(5000, 9000)
    ),
    "pixels of mode 'I;16' are not read; save the image with 8 bits": lambda path: Image.fromarray(
        np.zeros((8, 8), np.uint16)
    ).save(path, format="PNG"),
    "cannot be read: Is a directory": lambda path: path.mkdir(),
    "cannot be read: No such file": lambda path: None,
    "not an image in one of": lambda path: save(path, noise(8, 8), format="GIF"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_bad_file_is_refused_by_its_name_and_with_the_reason(tmp_path, message):
    path = tmp_path / "people" / "0007_c1.jpg"
    path.parent.mkdir()
    BROKEN[message](path)
    crops = ImageFiles.of([path], [7], [1], SIZE)
    for ask in (lambda: crops.pixels([0]), lambda: inspect(path)):
        with pytest.raises(DataError, match=rf"people/0007_c1\.jpg: {message}"):
            ask()


@pytest.mark.parametrize(
    "size", [(30_000, 30_000), (10_000, 10_000)], ids=["an error of Pillow", "a warning of Pillow"]
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, size):
    """Pillow warns of 100 million pixels and raises at 900; in the tests its warning is an exception as well."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(DataError, match=r"bomb\.png"):
        decode(path, SIZE)


def test_a_file_too_large_for_a_crop_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    path = save(tmp_path / "a.png", noise(64, 64))
    with pytest.raises(DataError, match=r"a\.png: more than 1,000 bytes"):
        decode(path, SIZE)


def test_a_header_is_all_that_is_looked_at_without_decoding(tmp_path):
    truncated(tmp_path / "a.jpg")
    found = inspect(tmp_path / "a.jpg", should_decode=False)
    assert (found.height, found.width) == (64, 32)


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", noise(8, 8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="needs Pillow: pip install"):
        decode(path, SIZE)


def test_reading_data_sets_loads_neither_torch_nor_scipy_nor_pillow():
    code = "import sys, chains.data.batches, chains.data.readers, chains.data.validation; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "chains.data.validation" in run.stdout.split()
    assert not {"torch", "scipy", "PIL"} & set(run.stdout.split())
