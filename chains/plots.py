"""Plots of runs and chains as PNG bytes: the frontier, the cross-width matrix, the training curves.

Drawn by matplotlib's object interface on the Agg canvas: no window system, no global state, and no date or version in
the file, so the same numbers give the same bytes on one installation.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chains.chain import Chain, Frontier
from chains.cost import count_macs
from chains.errors import DataError

DPI = 120
SIZE_INCHES = (6.4, 4.4)
CELL_INCHES = 0.55  # of the heat map: a number of four characters fits
MIDDLE = 0.6  # of the colour scale: numbers are dark on what is lighter, and light on what is darker


@dataclass(frozen=True)
class Curve:
    """One chain's frontier as a curve, narrow to wide: MACs, mAP in percent and its 95 % interval per width."""

    name: str
    macs: tuple[int, ...]
    map: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def curve_of(chain: Chain, frontier: Frontier) -> Curve:
    """The curve of `chain` as `frontier` measured it."""
    measured = frontier.widths
    return Curve(
        chain.name,
        macs=tuple(count_macs(chain.table, accuracy.width, chain.input) for accuracy in measured),
        map=tuple(accuracy.map for accuracy in measured),
        low=tuple(accuracy.map_ci95[0] for accuracy in measured),
        high=tuple(accuracy.map_ci95[1] for accuracy in measured),
    )


def frontier_png(curves: Sequence[Curve], dataset: str) -> bytes:
    """mAP over MACs, a line per chain and its interval as a band. Raises `DataError` without a curve."""
    if not curves:
        raise DataError("a frontier plot needs at least one chain")
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        (line,) = axes.plot(curve.macs, curve.map, marker="o", markersize=4, label=curve.name)
        axes.fill_between(curve.macs, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)
    _label(axes, f"{dataset}, no training after expansion", "MACs per image", "mAP, % (band: 95 % interval)")
    axes.set_xscale("log")
    axes.legend()
    return _png(figure)


def cross_width_png(frontier: Frontier) -> bytes:
    """mAP of every query width (rows) against every gallery width (columns), numbers in the cells."""
    names = [str(accuracy.width) for accuracy in frontier.widths]
    side = CELL_INCHES * len(names) + 1.8
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    lowest, highest = (pick(value for row in frontier.cross_map for value in row) for pick in (min, max))
    image = axes.imshow(frontier.cross_map, cmap="viridis", vmin=lowest, vmax=highest)
    for row, values in enumerate(frontier.cross_map):
        for column, value in enumerate(values):
            ink = "black" if value - lowest > MIDDLE * (highest - lowest) else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    _label(axes, frontier.dataset, "gallery width", "query width")
    figure.colorbar(image, ax=axes, label="mAP, %")
    return _png(figure)


def training_curves_png(events: Sequence[Mapping[str, object]]) -> bytes:
    """Losses above, and validation metrics below where there are any, over the steps of each stage in turn.

    events: lines of `metrics.jsonl`, see `chains.runlog`. Raises `DataError` when none of them is of a training step.
    """
    losses, metrics = series(events, "losses"), series(events, "validation")
    if not losses:
        raise DataError("the log holds no training step; there are no curves to draw")
    figure = Figure(figsize=(SIZE_INCHES[0], SIZE_INCHES[1] * (1 + bool(metrics))), layout="constrained")
    for row, (table, label) in enumerate([(losses, "loss"), (metrics, "%")][: 1 + bool(metrics)]):
        axes = figure.add_subplot(1 + bool(metrics), 1, row + 1)
        for name, (steps, values) in table.items():
            axes.plot(steps, values, label=name, marker="o" if label == "%" else "", linewidth=1.2)
        _label(axes, "", "step", label)
        axes.legend(fontsize=8)
    return _png(figure)


def series(events: Sequence[Mapping[str, object]], kind: str) -> dict[str, tuple[list[int], list[float]]]:
    """`<stage> <name>` -> steps and values, of the numbers that stand under `kind` in the events.

    >>> series([{"stage": "teacher", "step": 2, "losses": {"loss": 1.5}}], "losses")
    {'teacher loss': ([2], [1.5])}
    """
    table: dict[str, tuple[list[int], list[float]]] = {}
    for event in events:
        values, step = event.get(kind), event.get("step")
        if isinstance(values, dict) and isinstance(step, int):
            for name, value in values.items():
                steps, numbers = table.setdefault(f"{event['stage']} {name}", ([], []))
                steps.append(step)
                numbers.append(float(value))
    return table


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
