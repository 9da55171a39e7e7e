"""Views and the cut that images and feature maps share."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chains.errors import DataError
from chains.fuse.config import InputConfig
from chains.fuse.crops import crop
from chains.fuse.viewed import Viewed
from chains.fuse.views import PAPER_VIEWS, View, whole
from tests.chains.toys import INPUT, flat_people


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "rows", "of"),
    [
        ("up1", (0, 2), 4),
        ("mid1", (1, 3), 4),
        ("dn1", (2, 4), 4),
        ("up2", (0, 3), 7),
        ("mid2", (2, 5), 7),
        ("dn2", (4, 7), 7),
        ("holistic", (0, 1), 1),
    ],
)
@pytest.mark.parametrize("rows_per_stripe", [1, 2, 3])
def test_rows_are_cut_exactly_where_the_map_can_be_divided(
    name: str, rows: tuple[int, int], of: int, rows_per_stripe: int
) -> None:
    view, (start, end) = PAPER_VIEWS[name], rows
    found = noise(2, 5, of * rows_per_stripe, 4)
    wanted = found[:, :, start * rows_per_stripe : end * rows_per_stripe]
    torch.testing.assert_close(crop(found, view.top, view.bottom, wanted.shape[2], 4), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 7), (16, 8), (40, 20), (5, 20)])
def test_the_cut_of_the_whole_is_torch_s_antialiased_bilinear_resize(size: tuple[int, int]) -> None:
    x = noise(2, 3, 16, 8)
    expected = functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(crop(x, 0, 1, *size), expected, rtol=1e-5, atol=1e-5)


def test_an_enlarging_cut_interpolates_between_the_two_nearest_rows() -> None:
    """Row y of the map holds its centre, y + ½; then a cut reads off where each of its rows lies."""
    ramp = (torch.arange(14) + 0.5).view(1, 1, 14, 1).expand(1, 1, 14, 3)
    cut = crop(ramp, 2 / 7, 5 / 7, 24, 3)[0, 0, :, 0]
    torch.testing.assert_close(cut, 4 + (torch.arange(24) + 0.5) / 4)


def test_every_row_of_a_shrunk_view_takes_part_and_no_row_far_from_it() -> None:
    found = noise(1, 2, 16, 8).requires_grad_(True)
    (gradient,) = torch.autograd.grad(crop(found, 1 / 4, 3 / 4, 3, 3).sum(), found)
    by_row = gradient.abs().sum(dim=(0, 1, 3))
    assert bool((by_row[4:12] > 0).all())
    assert bool((by_row[:2] == 0).all() and (by_row[14:] == 0).all())


@given(st.floats(0, 0.99), st.floats(0.01, 1), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_flat_map_stays_flat_whatever_is_cut(top: float, share: float, rows: int, height: int, width: int) -> None:
    bottom = min(1.0, top + share)
    cut = crop(torch.full((1, 1, rows, 3), 2.5), top, bottom, height, width)
    torch.testing.assert_close(cut, torch.full((1, 1, height, width), 2.5))


def test_a_cut_is_float32_under_autocast() -> None:
    x = noise(1, 3, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crop(x, 0, 0.5, 7, 7), crop(x.float(), 0, 0.5, 7, 7))
        assert crop(x.bfloat16(), 0, 1, 7, 7).dtype == torch.float32


@pytest.mark.parametrize(
    ("top", "bottom", "height", "width", "words"),
    [
        (0.5, 0.5, 32, 16, "from 0.5 to 0.5"),
        (-0.1, 0.5, 32, 16, "from -0.1 to 0.5"),
        (0.5, 1.1, 32, 16, "from 0.5 to 1.1"),
        (0, 1, 8, 16, "8 × 16"),
        (0, 1, 32, 2048, "32 × 2048"),
    ],
)
def test_a_view_that_is_none_is_refused_with_the_numbers(
    top: float, bottom: float, height: int, width: int, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        View(top, bottom, height, width)


@pytest.mark.parametrize(
    ("written", "view"),
    [
        ("dn2", View(4 / 7, 1, 224, 224)),
        ({"top": "1/3", "bottom": "2/3", "height": 64, "width": 48}, View(1 / 3, 2 / 3, 64, 48)),
        ({"top": 0, "bottom": 0.25, "height": 64, "width": 48}, View(0, 0.25, 64, 48)),
    ],
)
def test_a_configuration_names_a_view_or_spells_it_out(written: object, view: View) -> None:
    assert InputConfig.model_validate({"file": "a.onnx", "view": written}).view == view


@pytest.mark.parametrize("written", ["up3", {"top": "a third", "bottom": 1, "height": 64, "width": 64}, 3])
def test_a_configuration_s_view_that_cannot_be_read_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="view"):
        InputConfig.model_validate({"file": "a.onnx", "view": written})


def test_images_seen_through_a_view_keep_their_people_and_cameras() -> None:
    images = flat_people()
    seen = Viewed(images, View(0.5, 1, 16, 16))
    assert len(seen) == len(images)
    assert seen.size == (16, 16)
    assert np.array_equal(seen.pixels([3, 1]), images.pixels([3, 1])[:, 16:])
    some = seen.take([5, 2])
    assert np.array_equal(some.pids, images.pids[[5, 2]])
    assert np.array_equal(some.camids, images.camids[[5, 2]])
    assert np.array_equal(some.pixels([0]), seen.pixels([5]))


def test_the_whole_view_at_its_own_size_changes_nothing() -> None:
    images = flat_people(identities=2)
    assert np.array_equal(Viewed(images, whole(INPUT.height, INPUT.width)).pixels([0, 7]), images.pixels([0, 7]))
