"""Limits of a device and the rules that pick a model within them: a width of a chain, or a terminal chain beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

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


@dataclass(frozen=True)
class Contender:
    """A chain that takes part in a choice, by its models. A terminal chain has one."""

    chain: str
    embedding_space: str
    candidates: tuple[Candidate, ...]

    @property
    def model(self) -> Candidate:
        """Of a terminal chain."""
        (model,) = self.candidates
        return model


@dataclass(frozen=True)
class Excess:
    """A model needs `factor` times what a limit allows."""

    factor: float
    limit: str
    allowed: int
    needed: int


Reason = Literal["other-embedding-space", "cannot-be-loaded", "does-not-fit", "not-better"]


@dataclass(frozen=True)
class Declined:
    """A terminal chain that was not taken. map: measured, in percent; `None`: not measured. excess: over the limit that
    it breaks most, where it does not fit."""

    chain: str
    embedding_space: str
    map: float | None
    reason: Reason
    excess: Excess | None = None


@dataclass(frozen=True)
class Choice:
    """What `choose` chose. terminal: what is served in place of `student`, if anything. student: the one of `asked`;
    `None`: none fits. declined: by name."""

    asked: Contender
    student: Candidate | None
    terminal: Contender | None
    declined: tuple[Declined, ...]

    @property
    def chain(self) -> str:
        """Name of the chain that the model comes from."""
        return (self.terminal or self.asked).chain

    @property
    def model(self) -> Candidate:
        chosen = self.student if self.terminal is None else self.terminal.model
        assert chosen is not None  # noqa: S101 - something was chosen
        return chosen


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
    widest = _widest(limits, candidates)
    if widest is None:
        raise _too_small(limits, candidates, chain)
    return widest


def choose(
    limits: Limits, asked: Contender, terminals: Sequence[Contender], left_out: Sequence[Declined] = ()
) -> Choice:
    """The student of `asked` by `widest_that_fits`, or in its place a terminal chain offered with it.

    Of the terminals that fit, the one with the highest measured mAP (then the fewest MACs, then by name) is taken where
    that is above the student's, or where no student fits. left_out: terminals that take no part, and why. All must have
    been measured on one evaluation set. Raises `BudgetTooSmall` as `widest_that_fits` does, over students and
    terminals that take part.
    """
    student = _widest(limits, asked.candidates)
    fitting = [terminal for terminal in terminals if not exceeded(limits, terminal.model.costs)]
    best = min(fitting, key=_rank, default=None)
    if student is None and best is None:
        raise _too_small(limits, [*asked.candidates, *(one.model for one in terminals)], asked.chain, bool(terminals))
    taken = best if best and (student is None or _is_better(best.model, student)) else None
    declined = [*left_out, *(_declined(limits, terminal) for terminal in terminals if terminal is not taken)]
    return Choice(asked, student, taken, tuple(sorted(declined, key=lambda one: one.chain)))


def _widest(limits: Limits, candidates: Sequence[Candidate]) -> Candidate | None:
    """See `widest_that_fits`. `None` when nothing fits."""
    fitting = [candidate for candidate in candidates if not exceeded(limits, candidate.costs)]
    measured = [candidate.accuracy for candidate in fitting if candidate.accuracy is not None]
    best = max(measured, key=lambda accuracy: accuracy.map, default=None)
    floor = min(best.map, best.map_ci95[0]) if best else 0.0
    as_good = [candidate for candidate in fitting if candidate.accuracy is None or candidate.accuracy.map >= floor]
    return max(as_good, key=lambda candidate: (candidate.costs.macs, candidate.width), default=None)


def _rank(terminal: Contender) -> tuple[float, int, str]:
    """Smallest for the best; what was not measured comes last."""
    model = terminal.model
    return (-model.accuracy.map if model.accuracy else 1.0), model.costs.macs, terminal.chain


def _is_better(model: Candidate, student: Candidate) -> bool:
    """Whether it was measured to be. A student that nobody measured may be as good as anything."""
    return bool(model.accuracy and student.accuracy and model.accuracy.map > student.accuracy.map)


def _declined(limits: Limits, terminal: Contender) -> Declined:
    model = terminal.model
    excess = _worst(limits, model.costs) if exceeded(limits, model.costs) else None
    reason: Reason = "does-not-fit" if excess else "not-better"
    return Declined(
        terminal.chain, terminal.embedding_space, model.accuracy.map if model.accuracy else None, reason, excess
    )


def _worst(limits: Limits, costs: Costs) -> Excess:
    """The largest."""
    needs = ((name, allowed, getattr(costs, COST_OF_LIMIT[name])) for name, allowed in limits.stated())
    excesses = (Excess(needed / allowed, name, allowed, needed) for name, allowed, needed in needs)
    return max(excesses, key=lambda excess: excess.factor)


def _too_small(
    limits: Limits, candidates: Sequence[Candidate], chain: str, has_terminals: bool = False
) -> BudgetTooSmall:
    """At the model that breaks its worst limit by the smallest factor, that limit."""
    worst = min((_worst(limits, candidate.costs) for candidate in candidates), key=lambda excess: excess.factor)
    what = "student of, or terminal chain offered with, chain" if has_terminals else "student of chain"
    return BudgetTooSmall(chain, worst.limit, worst.allowed, worst.needed, what=what)
