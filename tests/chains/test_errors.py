"""Errors reach another process whole."""

import pickle

from chains.errors import BudgetTooSmall


def test_a_budget_that_is_too_small_comes_out_of_a_worker_process_as_it_went_in() -> None:
    error = BudgetTooSmall("site", "max_macs", 10, 20, what="compression of", advice="start from a narrower student")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, BudgetTooSmall)
    assert str(copy) == str(error)
    assert (copy.chain, copy.limit, copy.requested, copy.smallest_available) == ("site", "max_macs", 10, 20)
