"""Plots: real PNG files, the same every time, with what they are meant to show in them."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from chains.chain import Chain, Frontier
from chains.cost import count_macs
from chains.errors import DataError
from chains.plots import Curve, cross_width_png, curve_of, frontier_png, series, training_curves_png
from chains.testing import pico_chain

EVENTS = [
    {"stage": "teacher", "step": 10, "losses": {"loss": 3.0}, "lr": 0.1},
    {"stage": "teacher", "step": 20, "losses": {"loss": 2.0}, "lr": 0.1},
    {"stage": "teacher", "step": 20, "validation": {"mAP": 41.0}},
    {"stage": "refinement", "step": 10, "losses": {"full": 1.0, "narrowest": 4.0}},
]


def measured() -> tuple[Chain, Frontier]:
    chain = pico_chain(rungs=4)
    assert chain.frontier is not None
    return chain, chain.frontier


def pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def test_a_curve_is_the_frontier_over_macs() -> None:
    chain, frontier = measured()
    curve = curve_of(chain, frontier)
    assert curve.macs == tuple(count_macs(chain.table, width, chain.input) for width in chain.ladder)
    assert curve.map == (50.0, 51.0, 52.0, 53.0)
    assert (curve.low[0], curve.high[0]) == (49.5, 50.5)


def test_every_chain_gets_a_line_of_its_own_colour() -> None:
    one = Curve("a", (10, 20), (40.0, 50.0), (39.0, 49.0), (41.0, 51.0))
    other = Curve("b", (10, 20), (20.0, 30.0), (19.0, 29.0), (21.0, 31.0))
    colours = [set(map(tuple, pixels(frontier_png(c, "d")).reshape(-1, 3).tolist())) for c in ([one], [one, other])]
    assert (31, 119, 180) in colours[0]  # matplotlib's first and second colour
    assert (255, 127, 14) not in colours[0]
    assert {(31, 119, 180), (255, 127, 14)} <= colours[1]


def test_the_heat_map_has_a_cell_for_every_pair_of_widths() -> None:
    """A made-up matrix of 16 different values: their 16 colours cover much of the picture."""
    _, frontier = measured()
    cells = tuple(tuple(float(4 * q + g) for g in range(4)) for q in range(4))
    image = pixels(cross_width_png(Frontier(**{**vars(frontier), "cross_map": cells})))
    _, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    assert (counts > 0.005 * image.shape[0] * image.shape[1]).sum() >= 17  # and the background


def test_training_curves_show_validation_below_the_losses_where_there_is_any() -> None:
    plain, validated = (pixels(training_curves_png(events)) for events in (EVENTS[:2], EVENTS))
    assert validated.shape[0] == 2 * plain.shape[0]


def test_a_series_is_named_by_its_stage() -> None:
    assert series(EVENTS, "losses") == {
        "teacher loss": ([10, 20], [3.0, 2.0]),
        "refinement full": ([10], [1.0]),
        "refinement narrowest": ([10], [4.0]),
    }


def test_the_same_numbers_are_the_same_bytes() -> None:
    chain, frontier = measured()
    for draw in (
        lambda: frontier_png([curve_of(chain, frontier)], "x"),
        lambda: cross_width_png(frontier),
        lambda: training_curves_png(EVENTS),
    ):
        assert draw() == draw()


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(DataError, match="no training step"):
        training_curves_png([{"stage": "frontier", "map": {"4": 1.0}}])
    with pytest.raises(DataError, match="at least one chain"):
        frontier_png([], "x")


def test_drawing_needs_no_window_system_and_no_global_state() -> None:
    code = "import sys, chains.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
