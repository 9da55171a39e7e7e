"""Limits of a device and the one rule that picks a width within them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter

from chains.chain import WidthAccuracy
from chains.cost import Costs
from chains.errors import BudgetTooSmall, LimitsError
from chains.width import Width

COST_OF_LIMIT = {
    "max_macs": "macs",
    "max_flops": "flops",
    "max_params": "params",
    "max_artifact_bytes": "artifact_bytes",
    "max_peak_activation_bytes": "peak_activation_bytes",
    "max_memory_bytes": "memory_bytes_bound",
}


@dataclass(frozen=True)
class Limits:
    """What a device can bear, for one image. `None`: no limit. `max_memory_bytes` is held against
    `Costs.memory_bytes_bound`. Raises `LimitsError` when nothing is limited or a limit is not positive."""

    max_macs: int | None = None
    max_flops: int | None = None
    max_params: int | None = None
    max_artifact_bytes: int | None = None
    max_peak_activation_bytes: int | None = None
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        stated = dict(self.stated())
        if not stated:
            raise LimitsError(f"state at least one limit: {', '.join(COST_OF_LIMIT)}")
        for name, allowed in stated.items():
            if allowed < 1:
                raise LimitsError(f"{name} is {allowed}; a limit is a whole number of at least 1")

    def stated(self) -> Iterator[tuple[str, int]]:
        """(limit name, allowed) of every limit that is set."""
        for limit in fields(self):
            allowed = getattr(self, limit.name)
            if allowed is not None:
                yield limit.name, allowed


@dataclass(frozen=True)
class Candidate:
    """A width on offer, what it costs, and how well it was measured to retrieve (`None`: not measured)."""

    width: Width
    costs: Costs
    accuracy: WidthAccuracy | None = None


def exceeded(limits: Limits, costs: Costs) -> list[str]:
    """Names of the limits that `costs` breaks."""
    return [name for name, allowed in limits.stated() if getattr(costs, COST_OF_LIMIT[name]) > allowed]


def widest_that_fits(limits: Limits, candidates: Sequence[Candidate], chain: str) -> Candidate:
    """The candidate to serve: of those that fit, the widest whose accuracy is not measurably below the best one's.

    A width counts as measurably worse when its mAP lies below the confidence interval of the best that fits; where the
    widest is also the best, or nothing was measured, this is plainly the widest. On a ladder whose costs all rise with
    its rungs, a larger limit never gives a narrower model. Raises `BudgetTooSmall`, naming the limit that binds at the
    width that comes closest, which on such a ladder is the narrowest.
    """
    fitting = [candidate for candidate in candidates if not exceeded(limits, candidate.costs)]
    if not fitting:
        raise _too_small(limits, candidates, chain)
    measured = [candidate.accuracy for candidate in fitting if candidate.accuracy is not None]
    best = max(measured, key=lambda accuracy: accuracy.map, default=None)
    floor = min(best.map, best.map_ci95[0]) if best else 0.0
    as_good = [candidate for candidate in fitting if candidate.accuracy is None or candidate.accuracy.map >= floor]
    return max(as_good, key=lambda candidate: (candidate.costs.macs, candidate.width))


def _too_small(limits: Limits, candidates: Sequence[Candidate], chain: str) -> BudgetTooSmall:
    """At the width that breaks its worst limit by the smallest factor, that limit."""

    def worst(costs: Costs) -> tuple[float, str, int, int]:
        needs = ((name, allowed, getattr(costs, COST_OF_LIMIT[name])) for name, allowed in limits.stated())
        return max(((needed / allowed, name, allowed, needed) for name, allowed, needed in needs), key=itemgetter(0))

    _, binding, allowed, needed = min((worst(candidate.costs) for candidate in candidates), key=itemgetter(0))
    return BudgetTooSmall(chain, binding, allowed, needed)
