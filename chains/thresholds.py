"""Same person or not: cosine cut-offs at given false-accept rates, and how many true pairs they accept.

Impostor pairs are all pairs of a query and a gallery image of different identities, those of one camera included: a
tracker decides within one camera too. Distractors are impostors, junk images (pid -1) are in no pair. Genuine pairs are
the correct matches of the ranking protocol: same identity, another camera or an unknown one.

A cut-off is the smallest multiple of 0.0001 that at most the given share of impostor pairs reaches. On that grid a
histogram of cosines is exact: a float32 cosine times 10,000 fits a float64 without rounding. So memory does not grow
with the number of pairs. Fewer impostor pairs than 1 / rate cannot show the rate, and give no cut-off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from chains.chain import Threshold
from chains.ranking import Block, Floats, Indices, Truth

STEPS = 10_000  # cut-offs are multiples of 1 / STEPS
Counts = NDArray[np.int64]


class PairCounts:
    """Histograms of the cosines of impostor and of genuine pairs, int64 (2 · STEPS + 1,): bin i counts the cosines from
    i / STEPS - 1 up to the next multiple."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self.impostor: Counts = np.zeros(2 * STEPS + 1, dtype=np.int64)
        self.genuine: Counts = np.zeros(2 * STEPS + 1, dtype=np.int64)

    def watch(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same blocks of cosines, counted as they pass."""
        for first, cosines in blocks:
            self._add(first, cosines)
            yield first, cosines

    def threshold(self, false_accept_rate: float) -> Threshold | None:
        """The cut-off at that rate; `None` when the impostor pairs are fewer than 1 / rate, when there is no genuine
        pair, or when too many impostors have a cosine of one."""
        allowed = self.impostor.sum() // round(1 / false_accept_rate)
        step = int(np.count_nonzero(_at_least(self.impostor) > allowed))  # counts fall, so this is the first that fits
        if allowed == 0 or not self.genuine.any() or step > 2 * STEPS:
            return None
        accepted = self.genuine[step:].sum() / self.genuine.sum()
        return Threshold((step - STEPS) / STEPS, 100 * float(accepted))

    def _add(self, first: int, cosines: Floats) -> None:
        bins = _bins(cosines)
        queries = range(first, first + len(bins))
        genuine = _histogram(row[self._truth.correct(query)] for query, row in zip(queries, bins, strict=True))
        left_out = _histogram(row[self._truth.left_out(query)] for query, row in zip(queries, bins, strict=True))
        self.genuine += genuine
        self.impostor += np.bincount(bins.ravel(), minlength=2 * STEPS + 1) - genuine - left_out


def _bins(cosines: Floats) -> Indices:
    """The bin of each cosine; rounding may carry one a little beyond ±1."""
    steps = np.multiply(cosines, STEPS, dtype=np.float64)
    np.floor(steps, out=steps)
    np.clip(steps, -STEPS, STEPS, out=steps)
    steps += STEPS
    return steps.astype(np.int64)


def _histogram(bins: Iterable[Indices]) -> Counts:
    return np.bincount(np.concatenate(list(bins)), minlength=2 * STEPS + 1)


def _at_least(histogram: Counts) -> Counts:
    """How many cosines reach the lower end of each bin."""
    return np.cumsum(histogram[::-1])[::-1]
