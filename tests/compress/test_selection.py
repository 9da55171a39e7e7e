"""Which channels go: zeros, then the least important per MAC, until every limit holds."""

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import pytest

from chains.architectures import architecture
from chains.artifact import StoredChain
from chains.budget import COST_OF_LIMIT, Limits, exceeded
from chains.compress.blocks import prunable
from chains.compress.run import terminal_chain
from chains.compress.selection import Budget, budget_of, channel_macs, cost_model, kept_channels
from chains.compress.units import with_channels
from chains.cost import count_macs
from chains.errors import BudgetTooSmall
from chains.onnxfile import plan
from tests.chains.toys import INPUT
from tests.compress.pruned import WIDTH, a_network

TABLE = architecture("resnet50")
FULL = TABLE.group_sizes(WIDTH)
GROUPS = prunable(TABLE)
DRAFT = terminal_chain(a_network("resnet50"), INPUT, name="draft", license="none", provenance={})
COSTS = cost_model(DRAFT)
MACS = channel_macs(TABLE, WIDTH, INPUT, GROUPS)


def random_norms(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {group: generator.uniform(0.1, 1, FULL[group]).astype(np.float32) for group in GROUPS}


def choose(norms: Mapping[str, np.ndarray], limits: Limits | None) -> dict[str, np.ndarray]:
    return kept_channels(norms, MACS, Budget(limits, COSTS, FULL))


def sizes_of(kept: Mapping[str, np.ndarray]) -> dict[str, int]:
    return FULL | {group: len(channels) for group, channels in kept.items()}


def test_without_limits_what_vanished_goes_and_nothing_else() -> None:
    norms = random_norms()
    norms["layer2.1.a"][[0, 3]] = 0
    norms["layer3.0.b"][5] = 9e-4
    kept = choose(norms, None)
    assert sizes_of(kept) == FULL | {"layer2.1.a": FULL["layer2.1.a"] - 2, "layer3.0.b": FULL["layer3.0.b"] - 1}
    assert 5 not in kept["layer3.0.b"]


def test_of_a_group_that_vanished_the_largest_stays() -> None:
    vanished = {"layer1.0.a": [0, 1e-5, 1e-4, 0], "layer1.1.b": [0, 0, 0, 0]}
    norms = random_norms() | {group: np.array(values, np.float32) for group, values in vanished.items()}
    kept = choose(norms, None)
    assert kept["layer1.0.a"].tolist() == [2]
    assert kept["layer1.1.b"].tolist() == [0]


@pytest.mark.parametrize("limit", [field.name for field in fields(Limits)])
def test_every_limit_is_met_and_no_channel_too_many_is_removed(limit: str) -> None:
    cost = COST_OF_LIMIT[limit]
    floor, most = (getattr(COSTS(sizes), cost) for sizes in (FULL | dict.fromkeys(GROUPS, 1), FULL))
    allowed = (floor + most) // 2
    kept = choose(random_norms(), Limits(**{limit: allowed}))
    reached = getattr(COSTS(sizes_of(kept)), cost)
    assert reached <= allowed
    assert sum(map(len, kept.values())) < sum(FULL[group] for group in GROUPS) or floor == most
    looser = choose(random_norms(), Limits(**{limit: allowed + (most - allowed) // 2}))
    assert all(set(kept[group]) <= set(looser[group]) for group in GROUPS)
    if limit == "max_macs":
        largest_step = max(MACS.values())
        assert reached > allowed - largest_step


def test_limits_that_hold_anyway_remove_nothing() -> None:
    assert sizes_of(choose(random_norms(), Limits(max_macs=10**12))) == FULL


def test_importance_is_the_norm_within_its_pruner_per_mac() -> None:
    """All pruners alike but for their scale: then the channels that cost most go first, whatever the scale."""
    scales = np.random.default_rng(1).uniform(0.1, 10, len(GROUPS)).astype(np.float32)
    norms = {g: np.linspace(0.5, 1, FULL[g], dtype=np.float32) * s for g, s in zip(GROUPS, scales, strict=True)}
    limit = Limits(max_macs=COSTS(FULL).macs * 9 // 10)
    scaled = choose(norms, limit)
    plain = choose({group: values / values.max() for group, values in norms.items()}, limit)
    assert all(np.array_equal(scaled[group], plain[group]) for group in GROUPS)
    gone = {group: 1 - len(scaled[group]) / FULL[group] for group in GROUPS}
    dearest, cheapest = max(GROUPS, key=MACS.__getitem__), min(GROUPS, key=MACS.__getitem__)
    assert gone[dearest] > gone[cheapest]


def test_the_macs_of_a_channel_are_what_the_network_saves_without_it() -> None:
    group = "layer3.0.a"
    saved = MACS[group]
    narrower = TABLE.fixed(FULL | {group: FULL[group] - 1})
    assert saved == count_macs(TABLE, WIDTH, INPUT) - count_macs(narrower, WIDTH, INPUT)


def test_the_predicted_costs_are_those_of_the_file() -> None:
    kept = choose(random_norms(), Limits(max_macs=COSTS(FULL).macs * 3 // 4))
    narrow = with_channels(a_network("resnet50"), kept)
    chain = terminal_chain(narrow, INPUT, name="draft", license="none", provenance={})
    exact, predicted = plan(StoredChain(chain, "1" * 64, 0), WIDTH).costs, COSTS(sizes_of(kept))
    assert (exact.macs, exact.params, exact.peak_activation_bytes) == (
        predicted.macs,
        predicted.params,
        predicted.peak_activation_bytes,
    )
    assert exact.artifact_bytes <= predicted.artifact_bytes <= exact.artifact_bytes + 5000


def test_drafts_of_two_networks_are_not_mixed_up() -> None:
    other = terminal_chain(a_network("resnet18"), INPUT, name="draft", license="none", provenance={})
    assert cost_model(other)(other.table.group_sizes(WIDTH)).artifact_bytes < COSTS(FULL).artifact_bytes / 1.5


def test_costs_are_known_without_the_network_s_weights() -> None:
    whole = terminal_chain(a_network("resnet50"), INPUT, name="draft", license="unknown", provenance={})
    for sizes in (FULL, FULL | dict.fromkeys(GROUPS, 2)):
        assert budget_of("draft", TABLE, WIDTH, INPUT, None).costs_of(sizes) == cost_model(whole)(sizes)


def test_a_budget_below_the_floor_is_refused_with_the_floor() -> None:
    floor = COSTS(FULL | dict.fromkeys(GROUPS, 1))
    Budget(Limits(max_macs=floor.macs), COSTS, FULL).require_reachable(GROUPS, "market")
    with pytest.raises(
        BudgetTooSmall, match=r"no compression of 'market' fits.*start from a narrower student"
    ) as refused:
        Budget(Limits(max_macs=floor.macs - 1, max_params=10**9), COSTS, FULL).require_reachable(GROUPS, "market")
    assert (refused.value.limit, refused.value.smallest_available) == ("max_macs", floor.macs)
    assert exceeded(Limits(max_macs=floor.macs - 1), floor) == ["max_macs"]
