"""Which channels go: those whose pruners came to nothing, and then the least important per MAC until the limits hold.

DEAP ends where its group LASSO ends. That a budget is met is our choice: while enough has vanished the LASSO rests, so
that no more goes than has to; and what is still too much after it goes by rank. A pruner has a norm behind it, so
its overall length means nothing and lengths of two pruners do not compare: importance is the norm divided by the
largest of the same pruner, divided by the MACs that a channel costs. Every group keeps its most important channel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from chains.arch import Architecture
from chains.artifact import StoredChain
from chains.budget import COST_OF_LIMIT, Limits, exceeded
from chains.chain import Chain, InputSpec
from chains.compress.blocks import prunable
from chains.compress.terminal import draft
from chains.cost import FLOAT_BYTES, Costs, count_macs, count_params, peak_activation_bytes
from chains.errors import BudgetTooSmall
from chains.onnxfile import EmitOptions, lay_out
from chains.width import Width

Norms = Mapping[str, NDArray[np.float32]]  # group -> norm of each channel's pruner
CostsOf = Callable[[Mapping[str, int]], Costs]
THRESHOLD = 1e-3  # a norm below it is zero (the authors')
RESERVED_BYTES = 4096  # for what a file says of itself once it is measured: cut-offs and their names


def cost_model(draft: Chain) -> CostsOf:
    """Sizes of all groups -> the costs of a terminal chain like `draft` with them. `artifact_bytes` is a bound a few
    kilobytes above the file's: its graph is no longer than the draft's, and its metadata are not known yet."""
    table, width = draft.table, draft.teacher
    # Not `plan`: its cache goes by digests, which drafts have not.
    file_bytes = lay_out(StoredChain(draft, "0" * 64, 0), width, EmitOptions()).offsets[-1]
    around_bytes = file_bytes - FLOAT_BYTES * count_params(table, width) + RESERVED_BYTES

    def costs_of(sizes: Mapping[str, int]) -> Costs:
        fixed = table.fixed(sizes)
        params = count_params(fixed, width)
        peak = peak_activation_bytes(fixed, width, draft.input)
        return Costs(count_macs(fixed, width, draft.input), params, peak, FLOAT_BYTES * params + around_bytes)

    return costs_of


@dataclass(frozen=True, eq=False)
class Budget:
    """What a compression has to reach. full: channels of every group before it. limits: `None`: no more than what
    vanishes goes."""

    limits: Limits | None
    costs_of: CostsOf
    full: Mapping[str, int]

    def is_met(self, sizes: Mapping[str, int]) -> bool:
        """Whether the limits hold with `sizes` in the groups they name, and all channels in the others."""
        return self.limits is None or not exceeded(self.limits, self.costs_of({**self.full, **sizes}))

    def rests(self, norms: Norms) -> bool:
        """Whether enough has vanished for limits that there are."""
        return self.limits is not None and self.is_met({group: int(mask.sum()) for group, mask in alive(norms).items()})

    def require_reachable(self, groups: Sequence[str], whose: str) -> None:
        """Raises `BudgetTooSmall`, with the floor, where one channel in each of `groups` is too much."""
        floor = dict.fromkeys(groups, 1)
        if self.limits is None or self.is_met(floor):
            return
        costs = self.costs_of({**self.full, **floor})
        needs = [(name, allowed, getattr(costs, COST_OF_LIMIT[name])) for name, allowed in self.limits.stated()]
        binding, allowed, needed = max(needs, key=lambda each: each[2] / each[1])
        advice = "start from a narrower student"
        raise BudgetTooSmall(whose, binding, allowed, needed, what="compression of", advice=advice)

    def settings(self) -> dict[str, int]:
        return {} if self.limits is None else dict(self.limits.stated())


def budget_of(whose: str, table: Architecture, width: Width, input: InputSpec, limits: Limits | None) -> Budget:
    """What a compression of a network has to reach. whose: the network's name. Raises `BudgetTooSmall` where nothing
    that can be pruned from it fits, and `ArchitectureError` for a network that is no ResNet."""
    groups = prunable(table)
    budget = Budget(limits, cost_model(draft(table, width, input, whose)), table.group_sizes(width))
    budget.require_reachable(groups, whose)
    return budget


def alive(norms: Norms) -> dict[str, NDArray[np.bool_]]:
    """Group -> which of its channels have not vanished; the largest never does."""
    found = {group: values >= THRESHOLD for group, values in norms.items()}
    for group, values in norms.items():
        found[group][int(values.argmax())] = True
    return found


def kept_channels(norms: Norms, macs: Mapping[str, int], budget: Budget) -> dict[str, NDArray[np.int64]]:
    """Group -> the channels that stay, ascending, of every group with norms. macs: of one channel, by group. Call
    `Budget.require_reachable` before: a budget that cannot be met ends at the floor."""
    left = alive(norms)
    order = _removal_order(norms, left, macs)

    def sizes_after(count: int) -> dict[str, int]:
        gone = Counter(group for group, _ in order[:count])
        return {group: int(mask.sum()) - gone[group] for group, mask in left.items()}

    # The fewest that have to go: costs only fall with them.
    count = bisect_left(range(len(order)), True, key=lambda n: budget.is_met(sizes_after(n)))
    for group, channel in order[:count]:
        left[group][channel] = False
    return {group: np.flatnonzero(mask).astype(np.int64) for group, mask in left.items()}


def channel_macs(table: Architecture, width: Width, input: InputSpec, groups: Sequence[str]) -> dict[str, int]:
    """Group -> MACs that the network saves with one channel less in it, the others as they are; a group of one, which
    it cannot lose, saves 1."""
    full, whole = table.group_sizes(width), count_macs(table, width, input)

    def saved(group: str) -> int:
        return whole - count_macs(table.fixed({**full, group: full[group] - 1}), width, input) if full[group] > 1 else 1

    return {group: saved(group) for group in groups}


def _removal_order(
    norms: Norms, left: Mapping[str, NDArray[np.bool_]], macs: Mapping[str, int]
) -> list[tuple[str, int]]:
    """(group, channel), least important first; the most important one of a group is not among them."""
    ranked = []
    for group, values in norms.items():
        largest, best = float(values.max()) or 1.0, int(values.argmax())
        ranked += [
            (float(values[channel]) / largest / macs[group], group, int(channel))
            for channel in np.flatnonzero(left[group])
            if channel != best
        ]
    return [(group, channel) for _, group, channel in sorted(ranked, key=itemgetter(0, 1, 2))]
