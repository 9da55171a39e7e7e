"""Aliases: promotion, rollback, history, and chains that are deleted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.actor import Actor
from app.db.repositories import Aliases, Chains
from app.db.session import Database
from app.db.tables import AuditRow, JobRow
from app.errors import (
    AliasMoved,
    AppError,
    ChainInUse,
    NothingToRollBack,
    PromotionRefused,
    UnknownAlias,
    UnknownChain,
    UnknownModel,
)
from app.services.promotion import Expected, Promotion
from app.services.provision import ModelRequest, Provision
from app.services.registry import Registry
from app.storage import open_store
from app.terms import Rights
from chains import artifact
from chains.budget import Limits
from chains.onnxfile import EmitOptions
from chains.testing import pico_chain

ME, YOU = Actor("me"), Actor("you")
KNOWN = Rights("Apache-2.0", "any", "synthetic")
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name: artifact.dump(pico_chain(name=name, seed=seed, rungs=2)) for seed, name in enumerate(NAMES)}


@pytest.fixture
def registry(database: Database, tmp_path: Path, files: dict[str, bytes]) -> Registry:
    """Three chains that may be promoted; the first is `stable`."""
    store = open_store((tmp_path / "objects").as_uri())
    store.prepare()
    registry = Registry(database, store, 10**9)
    for content in files.values():
        registry.publish(content, rights=KNOWN)
    return registry


@pytest.fixture
def promotion(database: Database, registry: Registry) -> Promotion:
    return Promotion(database)


def moves(promotion: Promotion, alias: str = "stable") -> list[tuple[str | None, str | None, str | None]]:
    found = promotion.history(alias, None, 100)
    return [(row.previous, row.chain, row.changed_by) for row in reversed(found)]


def audited(database: Database, action: str) -> list[AuditRow]:
    with database.transaction() as session:
        return list(session.scalars(select(AuditRow).where(AuditRow.action == action).order_by(AuditRow.id)))


def test_a_promotion_moves_the_alias_and_remembers_who(promotion: Promotion, registry: Registry) -> None:
    moved = promotion.promote("stable", "b", ME)
    assert (moved.chain, moved.previous, moved.changed_by) == ("b", "a", "me")
    assert registry.find("stable").name == "b"
    assert moves(promotion) == [(None, "a", "command-line"), ("a", "b", "me")]


def test_promoting_what_is_promoted_changes_nothing(promotion: Promotion, database: Database) -> None:
    first = promotion.promote("canary", "b", ME)
    assert promotion.promote("canary", "b", YOU).changed_at == first.changed_at
    assert moves(promotion, "canary") == [(None, "b", "me")]
    assert len(audited(database, "alias.move")) == 1


def test_what_canary_points_at_can_become_stable(promotion: Promotion) -> None:
    promotion.promote("canary", "c", ME)
    assert promotion.promote("stable", "canary", ME).chain == "c"


def test_an_alias_that_is_elsewhere_than_expected_stays(promotion: Promotion, registry: Registry) -> None:
    promotion.promote("stable", "b", YOU, expected=Expected("a"))
    with pytest.raises(AliasMoved, match=r"points at 'b', since \d{4}-.* by you") as caught:
        promotion.promote("stable", "c", ME, expected=Expected("a"))
    assert (caught.value.chain, caught.value.changed_by) == ("b", "you")
    assert registry.find("stable").name == "b"
    with pytest.raises(AliasMoved):
        promotion.promote("stable", "c", ME, expected=Expected(None))
    with pytest.raises(AliasMoved, match="points at no chain"):
        promotion.promote("canary", "c", ME, expected=Expected("a"))
    assert promotion.promote("canary", "c", ME, expected=Expected(None)).previous is None


def test_of_admins_who_promote_at_once_on_what_they_saw_one_succeeds(promotion: Promotion) -> None:
    start = threading.Barrier(8)

    def promote(number: int) -> str:
        start.wait()
        try:
            chain = promotion.promote(
                "stable", "bc"[number % 2], Actor(f"admin-{number}"), expected=Expected("a")
            ).chain
        except AliasMoved:
            return "refused"
        return str(chain)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(promote, range(8)))
    winner = moves(promotion)[-1][1]
    # whoever asks for the chain that won after it had won sees that it points elsewhere than expected
    assert sorted(outcomes) == sorted([str(winner), *["refused"] * 7])
    assert len(moves(promotion)) == 2


@pytest.mark.parametrize("alias", ["stable", "canary"])
def test_of_promotions_at_once_each_is_remembered_in_one_line(promotion: Promotion, alias: str) -> None:
    """The first to set canary race for a row that is not there yet."""
    start = threading.Barrier(8)

    def promote(number: int) -> None:
        start.wait()
        for turn in range(3):
            promotion.promote(alias, "abc"[(number + turn) % 3], Actor(f"admin-{number}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(promote, range(8)))
    line = moves(promotion, alias)
    assert line[0][0] is None
    assert all(before[1] == after[0] for before, after in pairwise(line))
    assert [row.chain for row in promotion.aliases() if row.alias == alias] == [line[-1][1]]


@pytest.mark.parametrize(
    ("rights", "frontier", "unknown"),
    [
        (Rights("l", "unknown", "public"), True, ["terms"]),
        (Rights("l", "research", "unknown"), True, ["consent_basis"]),
        (None, True, ["terms", "consent_basis"]),
        (KNOWN, False, ["accuracy"]),
        (None, False, ["terms", "consent_basis", "accuracy"]),
    ],
)
@pytest.mark.parametrize("alias", ["stable", "canary"])
def test_what_nobody_knows_must_be_accepted(
    promotion: Promotion,
    registry: Registry,
    database: Database,
    rights: Rights | None,
    frontier: bool,
    unknown: list[str],
    alias: str,
) -> None:
    chain = pico_chain(name="new", seed=9, rungs=2)
    registry.publish(artifact.dump(chain if frontier else replace(chain, frontier=None)), rights=rights)
    with pytest.raises(PromotionRefused, match=f"nobody knows its {unknown[0]}") as caught:
        promotion.promote(alias, "new", ME)
    assert caught.value.unknown == unknown
    assert registry.find("stable").name == "a"
    assert promotion.promote(alias, "new", ME, accept_unknown=True).chain == "new"
    (entry,) = audited(database, "alias.move")
    assert (entry.actor, entry.detail["accepted_unknown"]) == ("me", unknown)


def test_rolling_back_goes_back_and_never_forth(promotion: Promotion) -> None:
    promotion.promote("stable", "b", ME)
    promotion.promote("stable", "c", ME)
    assert promotion.roll_back("stable", YOU).chain == "b"
    assert promotion.roll_back("stable", YOU).chain == "a"
    with pytest.raises(NothingToRollBack, match="came there first"):
        promotion.roll_back("stable", YOU)
    assert moves(promotion)[-2:] == [("c", "b", "you"), ("b", "a", "you")]
    promotion.promote("stable", "c", ME)
    assert promotion.roll_back("stable", ME).chain == "a"


def test_a_rollback_sent_twice_goes_back_once_when_it_says_from_where(promotion: Promotion) -> None:
    promotion.promote("stable", "b", ME)
    promotion.promote("stable", "c", ME)
    promotion.roll_back("stable", ME, expected=Expected("c"))
    with pytest.raises(AliasMoved):
        promotion.roll_back("stable", ME, expected=Expected("c"))


def test_rolling_back_needs_no_second_consent(promotion: Promotion, registry: Registry) -> None:
    registry.publish(artifact.dump(pico_chain(name="new", seed=9, rungs=2)))
    promotion.promote("stable", "new", ME, accept_unknown=True)
    promotion.promote("stable", "b", ME)
    assert promotion.roll_back("stable", ME).chain == "new"


def test_there_is_no_way_back_to_a_chain_that_is_gone(promotion: Promotion, registry: Registry) -> None:
    promotion.promote("stable", "b", ME)
    registry.delete("a", ME)
    with pytest.raises(NothingToRollBack, match="'a', which was deleted"):
        promotion.roll_back("stable", ME)


def test_another_chain_under_the_name_of_the_one_before_is_not_the_one_before(
    promotion: Promotion, registry: Registry
) -> None:
    promotion.promote("stable", "b", ME)
    registry.delete("a", ME)
    registry.publish(artifact.dump(pico_chain(name="a", seed=77, rungs=2)), rights=KNOWN)
    with pytest.raises(NothingToRollBack, match="deleted since"):
        promotion.roll_back("stable", ME)


def test_a_removed_alias_leaves_its_history_and_begins_anew(promotion: Promotion) -> None:
    promotion.promote("canary", "b", ME)
    promotion.remove("canary", YOU)
    assert [row.alias for row in promotion.aliases()] == ["stable"]
    with pytest.raises(UnknownAlias):
        promotion.remove("canary", YOU)
    with pytest.raises(UnknownAlias):
        promotion.roll_back("canary", YOU)
    promotion.promote("canary", "c", ME)
    assert moves(promotion, "canary") == [(None, "b", "me"), ("b", None, "you"), (None, "c", "me")]
    with pytest.raises(NothingToRollBack):
        promotion.roll_back("canary", ME)


def test_deleting_a_chain_takes_widths_and_models_along(
    promotion: Promotion, registry: Registry, database: Database, make_app: Callable[..., FastAPI]
) -> None:
    provision = Provision(database, registry, make_app().state.services.metrics)
    wanted = ModelRequest(Limits(max_macs=10**9), EmitOptions(), "b")
    model = provision.provide(wanted)
    registry.delete("b", ME)
    with pytest.raises(UnknownModel):
        provision.recorded(model.id)
    with pytest.raises(UnknownChain):
        provision.provide(wanted)
    assert [row.name for row in registry.page("", 10).chains] == ["a", "c"]
    (entry,) = audited(database, "chain.delete")
    assert (entry.actor, entry.target) == ("me", "b")


def test_a_chain_deleted_while_a_model_of_it_is_asked_for_is_unknown(
    registry: Registry, database: Database, make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    provision = Provision(database, registry, make_app().state.services.metrics)
    load = registry.load_offered

    def load_and_lose(name: str, *, any_space: bool) -> object:
        found = load(name, any_space=any_space)
        registry.delete(name, ME)
        return found

    monkeypatch.setattr(registry, "load_offered", load_and_lose)
    with pytest.raises(UnknownChain):
        provision.provide(ModelRequest(Limits(max_macs=10**9), EmitOptions(), "b"))


def test_a_chain_an_alias_points_at_is_not_deleted(promotion: Promotion, registry: Registry) -> None:
    for name in ("a", "stable"):
        with pytest.raises(ChainInUse, match="'stable' points at it"):
            registry.delete(name, ME)


@pytest.mark.parametrize("name", ["nobody", "", "a\0b", "..", "x" * 500])
def test_names_of_nothing_are_neither_promoted_nor_deleted(promotion: Promotion, registry: Registry, name: str) -> None:
    with pytest.raises(UnknownChain):
        registry.delete(name, ME)
    with pytest.raises(UnknownChain):
        promotion.promote("canary", name, ME)


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "failed", "cancelled"])
def test_a_chain_a_job_still_needs_is_not_deleted(registry: Registry, database: Database, state: str) -> None:
    with database.transaction() as session:
        session.add(job("1", state, {"data": {"set": "d"}, "compatible_with": [{"chain": "b"}]}))
    registry.delete("c", ME)
    if state in ("queued", "running"):
        with pytest.raises(ChainInUse, match=f"job 1 is {state}"):
            registry.delete("b", ME)
    else:
        registry.delete("b", ME)


def job(job_id: str, state: str, request: dict[str, object]) -> JobRow:
    now = datetime.now(UTC)
    return JobRow(
        id=job_id,
        kind="refine",
        state=state,
        priority=0,
        request=request,
        request_sha256="0" * 64,
        attempts=1,
        cancel_requested=False,
        created_at=now,
        finished_at=None if state in ("queued", "running") else now,
        updated_at=now,
    )


def test_deleting_and_promoting_at_once_never_leaves_an_alias_without_its_chain(
    promotion: Promotion, registry: Registry, database: Database, files: dict[str, bytes]
) -> None:
    def outcome(do: Callable[[], object], start: threading.Barrier) -> str:
        start.wait()
        try:
            do()
        except AppError as error:
            return type(error).__name__
        return "done"

    for _ in range(10):
        start = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            deleted = pool.submit(outcome, lambda: registry.delete("b", ME), start)
            promoted = pool.submit(outcome, lambda: promotion.promote("canary", "b", YOU), start)
            found = (deleted.result(), promoted.result())
        assert found in {("done", "UnknownChain"), ("ChainInUse", "done")}
        if found[1] == "done":
            promotion.remove("canary", ME)
        else:
            registry.publish(files["b"], rights=KNOWN)


def test_the_row_of_an_alias_cannot_outlive_its_chain(registry: Registry, database: Database) -> None:
    from sqlalchemy.exc import IntegrityError

    with pytest.raises(IntegrityError), database.transaction() as session:
        Chains(session).delete("a")
    with pytest.raises(IntegrityError), database.transaction() as session:
        Aliases(session).point("canary", "nobody", None, datetime.now(UTC), "me")


# Over HTTP


@pytest.fixture
def three(app: FastAPI, files: dict[str, bytes]) -> Iterator[TestClient]:
    for content in files.values():
        app.state.services.registry.publish(content, rights=KNOWN)
    with TestClient(app) as client:
        yield client


def test_devices_get_the_promoted_chain_from_the_next_request_on(three: TestClient) -> None:
    body = {"limits": {"max_macs": 10**9}}
    assert three.post("/models", json=body).headers["widthwise-chain"] == "pico"
    moved = three.put("/chains/a/aliases/stable", json={"expected": "pico"})
    assert (moved.status_code, moved.json()["chain"], moved.json()["previous"]) == (200, "a", "pico")
    assert three.post("/models", json=body).headers["widthwise-chain"] == "a"
    assert three.get("/chains/a").json()["aliases"] == ["stable"]
    assert three.post("/aliases/stable/rollback", json={}).json()["chain"] == "pico"
    assert three.post("/models", json=body).headers["widthwise-chain"] == "pico"


def test_a_stale_promotion_is_told_what_is_there(three: TestClient) -> None:
    three.put("/chains/a/aliases/canary", json={})
    answer = three.put("/chains/b/aliases/canary", json={"expected": None})
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["chain"]) == (409, "alias-moved", "a")
    assert problem["changed_by"]
    assert problem["changed_at"].startswith("20")


def test_a_refused_promotion_says_what_is_unknown(three: TestClient) -> None:
    answer = three.put("/chains/pico/aliases/canary", json={})
    assert (answer.status_code, answer.json()["code"]) == (409, "promotion-refused")
    assert answer.json()["unknown"] == ["terms", "consent_basis"]
    assert three.put("/chains/pico/aliases/canary", json={"accept_unknown": True}).status_code == 200


def test_history_comes_in_pages_newest_first(three: TestClient) -> None:
    for name in ("a", "b", "c", "a", "b"):
        three.put(f"/chains/{name}/aliases/canary", json={})
    names, token = [], None
    while True:
        params = {"page_size": 2} | ({"page_token": token} if token else {})
        page = three.get("/aliases/canary/history", params=params).json()
        names += [move["chain"] for move in page["moves"]]
        token = page["next_page_token"]
        if token is None:
            break
    assert names == ["b", "a", "c", "b", "a"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("PUT", "/chains/a/aliases/beta", {}, 404, "alias-unknown"),
        ("PUT", "/chains/nobody/aliases/stable", {}, 404, "chain-unknown"),
        ("PUT", "/chains/a/aliases/stable", {"force": True}, 422, "request-invalid"),
        ("PUT", "/chains/a/aliases/stable", {"accept_unknown": "yes"}, 422, "request-invalid"),
        ("PUT", "/chains/%00/aliases/stable", {}, 404, "chain-unknown"),
        ("POST", "/aliases/canary/rollback", {}, 404, "alias-unknown"),
        ("POST", "/aliases/stable/rollback", {}, 409, "nothing-to-roll-back"),
        ("GET", "/aliases/beta/history", None, 404, "alias-unknown"),
        ("GET", "/aliases/stable/history?page_token=eA", None, 422, "page-token-invalid"),
        ("DELETE", "/aliases/stable", None, 409, "alias-not-removable"),
        ("DELETE", "/aliases/canary", None, 404, "alias-unknown"),
        ("DELETE", "/chains/pico", None, 409, "chain-in-use"),
        ("DELETE", "/chains/nobody", None, 404, "chain-unknown"),
    ],
)
def test_refusals_have_codes(three: TestClient, method: str, path: str, body: object, status: int, code: str) -> None:
    answer = three.request(method, path, **({} if body is None else {"json": body}))
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_a_deleted_chain_and_its_models_are_gone(three: TestClient) -> None:
    made = three.post("/models", json={"chain": "a", "limits": {"max_macs": 10**9}})
    assert three.delete("/chains/a").status_code == 204
    for path, code in {
        made.headers["location"]: "model-unknown",
        made.headers["content-location"]: "model-unknown",
        "/chains/a": "chain-unknown",
    }.items():
        answer = three.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, code)


def test_a_chain_shows_its_rights(three: TestClient) -> None:
    chain = three.get("/chains/a").json()
    assert (chain["terms"], chain["consent_basis"], chain["job"]) == ("any", "synthetic", None)
    assert {chain["name"]: chain["terms"] for chain in three.get("/chains").json()["chains"]}["pico"] == "unknown"
    assert three.get("/aliases").json()["aliases"][0]["chain"] == "pico"
