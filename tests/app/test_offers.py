"""Terminal chains offered beside a chain: who may decide that, what is refused, and what devices then get."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event, insert, inspect, select
from sqlalchemy.exc import IntegrityError
from structlog.testing import capture_logs

from app.actor import Actor
from app.db.migrate import downgrade, migrate
from app.db.session import Database
from app.db.tables import AuditRow, OfferRow
from app.errors import AppError, ChainInUse, OfferRefused, PromotionRefused, UnknownChain, UnknownOffer
from app.services.offers import Offer, Offers
from app.services.promotion import Promotion
from app.services.registry import Registry
from app.storage import open_store
from app.terms import Rights
from chains import artifact
from chains.chain import Chain, InputSpec
from chains.testing import made_up_frontier, pico_chain, pico_terminal

ME = Actor("me")
KNOWN = Rights("Apache-2.0", "any", "synthetic")
AS_JSON = {"accept": "application/json"}
FLEET = pico_chain(name="fleet", seed=1)  # 50 to 53 mAP on widths of stem 2 to 8


def a_terminal(name: str, mean_ap: float, space: str = FLEET.embedding_space, **shape: int) -> Chain:
    chain = pico_terminal(name=name, **shape)
    assert chain.frontier is not None
    figures = replace(chain.frontier.widths[0], map=mean_ap, map_ci95=(mean_ap - 0.5, mean_ap + 0.5))
    return replace(chain, embedding_space=space, frontier=replace(chain.frontier, widths=(figures,)))


BETTER = a_terminal("better", 52.5, inner=8)
WORSE = a_terminal("worse", 50.5)  # and smaller
FOREIGN = a_terminal("foreign", 60.0, "es-foreign", stem=2, inner=1)  # smaller than any student


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {chain.name: artifact.dump(chain) for chain in (FLEET, BETTER, WORSE, FOREIGN)}


# Deciding


@pytest.fixture
def registry(database: Database, tmp_path: Path, files: dict[str, bytes]) -> Registry:
    """`FLEET`, which is stable, and its terminal chains, offered with nothing."""
    store = open_store((tmp_path / "objects").as_uri())
    store.prepare()
    registry = Registry(database, store, 10**9)
    for content in files.values():
        registry.publish(content, rights=KNOWN)
    return registry


@pytest.fixture
def offers(database: Database, registry: Registry) -> Offers:
    return Offers(database)


def offered_with(registry: Registry, name: str) -> list[str]:
    return [terminal.chain.name for terminal in registry.load_offered(name, any_space=True).terminals]


def audited(database: Database, action: str) -> list[AuditRow]:
    with database.transaction() as session:
        return list(session.scalars(select(AuditRow).where(AuditRow.action == action).order_by(AuditRow.id)))


def test_an_offer_is_made_remembered_and_taken_back(offers: Offers, registry: Registry, database: Database) -> None:
    assert offers.offer("worse", "fleet", ME) == Offer("worse", "fleet", None, same_embedding_space=True)
    assert offers.offer("foreign", "stable", ME) == Offer("foreign", "fleet", None, same_embedding_space=False)
    assert offered_with(registry, "fleet") == offered_with(registry, "stable") == ["foreign", "worse"]
    assert offered_with(registry, "worse") == []
    (worse, foreign) = audited(database, "offer.set")
    assert (worse.actor, worse.target, foreign.target) == ("me", "worse", "foreign")
    assert worse.detail == {"chain": "fleet", "previous": None, "accepted_unknown": []}
    offers.withdraw("foreign", Actor("you"))
    assert offered_with(registry, "fleet") == ["worse"]
    (gone,) = audited(database, "offer.remove")
    assert (gone.actor, gone.target, gone.detail) == ("you", "foreign", {"previous": "fleet"})
    with pytest.raises(UnknownOffer, match="'foreign' is offered with no other"):
        offers.withdraw("foreign", ME)


def test_what_is_offered_already_changes_nothing(offers: Offers, database: Database) -> None:
    offers.offer("worse", "fleet", ME)
    assert offers.offer("worse", "fleet", Actor("you")).previous == "fleet"
    assert len(audited(database, "offer.set")) == 1


def test_a_terminal_chain_is_offered_with_one_chain_at_a_time(offers: Offers, registry: Registry) -> None:
    registry.publish(artifact.dump(replace(FLEET, name="second")), rights=KNOWN)
    offers.offer("worse", "fleet", ME)
    assert offers.offer("worse", "second", ME).previous == "fleet"
    assert (offered_with(registry, "fleet"), offered_with(registry, "second")) == ([], ["worse"])


def test_an_offer_stays_with_its_chain_when_the_alias_moves(
    offers: Offers, registry: Registry, database: Database
) -> None:
    registry.publish(artifact.dump(replace(FLEET, name="second")), rights=KNOWN)
    offers.offer("worse", "stable", ME)
    Promotion(database).promote("stable", "second", ME)
    assert (offered_with(registry, "stable"), offered_with(registry, "fleet")) == ([], ["worse"])
    Promotion(database).roll_back("stable", ME)
    assert offered_with(registry, "stable") == ["worse"]


@pytest.mark.parametrize(
    ("rights", "unknown"),
    [
        (Rights("l", "unknown", "public"), ["terms"]),
        (Rights("l", "research", "unknown"), ["consent_basis"]),
        (None, ["terms", "consent_basis"]),
    ],
)
def test_what_nobody_knows_must_be_accepted(
    offers: Offers, registry: Registry, database: Database, rights: Rights | None, unknown: list[str]
) -> None:
    registry.publish(artifact.dump(replace(WORSE, name="new")), rights=rights)
    with pytest.raises(
        PromotionRefused, match=f"'new' is not offered with 'fleet': nobody knows its {unknown[0]}"
    ) as no:
        offers.offer("new", "fleet", ME)
    assert no.value.unknown == unknown
    assert offered_with(registry, "fleet") == []
    offers.offer("new", "fleet", ME, accept_unknown=True)
    (entry,) = audited(database, "offer.set")
    assert entry.detail["accepted_unknown"] == unknown


OTHER_SIZE = InputSpec(32, 16, FLEET.input.mean, FLEET.input.std)
OTHER_MEAN = replace(FLEET.input, mean=(0.5, 0.5, 0.5))


def measured(**fields: Any) -> dict[str, Any]:
    assert WORSE.frontier is not None
    return {"frontier": replace(WORSE.frontier, **fields)}


def made_from(digest: str) -> dict[str, Any]:
    return {"provenance": {"made_from": {"dataset_digest": digest}}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"input": OTHER_SIZE}, r"do not see the same images: height 32 and 64, width 16 and 32$"),
        ({"input": OTHER_MEAN}, r"mean \[0.5, 0.5, 0.5\] and \[0.485, 0.456, 0.406\]$"),
        ({"frontier": None}, "'new' was not measured at every width"),
        ({"frontier": made_up_frontier(FLEET.ladder[:1])}, "'new' was not measured at every width"),
        (measured(dataset="market"), "not measured on the same: dataset market and made up for tests"),
        (measured(protocol="other"), "protocol other and none"),
        (measured(seed=7), "seed 7 and 0"),
        (measured(queries=5, gallery=9), "queries 5 and 1, gallery 9 and 1"),
        (made_from("b" * 64), f"dataset_digest {'b' * 64} and {'a' * 64}"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    offers: Offers, registry: Registry, changes: dict[str, Any], why: str
) -> None:
    registry.publish(artifact.dump(replace(FLEET, name="judged", **made_from("a" * 64))), rights=KNOWN)
    registry.publish(artifact.dump(replace(WORSE, name="new", **changes)), rights=KNOWN)
    with pytest.raises(OfferRefused, match=why):
        offers.offer("new", "judged", ME, accept_unknown=True)
    assert offered_with(registry, "judged") == []


def test_a_data_set_s_digest_counts_only_where_both_state_one(offers: Offers, registry: Registry) -> None:
    registry.publish(artifact.dump(replace(FLEET, name="judged", **made_from("a" * 64))), rights=KNOWN)
    registry.publish(artifact.dump(replace(WORSE, name="same", **made_from("a" * 64))), rights=KNOWN)
    for name in ("worse", "same"):
        offers.offer(name, "judged", ME)
    assert offered_with(registry, "judged") == ["same", "worse"]


def test_only_terminal_chains_are_offered_and_only_with_others(offers: Offers, registry: Registry) -> None:
    registry.publish(
        artifact.dump(replace(FLEET, name="second", ladder=FLEET.ladder[-1:], **one_width())), rights=KNOWN
    )
    for name in ("second", "fleet"):
        with pytest.raises(OfferRefused, match=f"'{name}' is no terminal chain"):
            offers.offer(name, "fleet", ME)
    for name in ("foreign", "worse"):
        with pytest.raises(OfferRefused, match=f"'{name}' is a terminal chain itself"):
            offers.offer("worse", name, ME)


def one_width() -> dict[str, Any]:
    full = FLEET.teacher
    return {"statistics": {full: FLEET.statistics[full]}, "frontier": made_up_frontier((full,))}


def test_so_many_terminal_chains_are_offered_with_one_chain(
    offers: Offers, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.offers.MAX_TERMINALS", 2)
    registry.publish(artifact.dump(replace(FLEET, name="second")), rights=KNOWN)
    for name in ("worse", "foreign"):
        offers.offer(name, "fleet", ME)
    with pytest.raises(OfferRefused, match="with 'fleet': 2 terminal chains are, and no more than 2 can be"):
        offers.offer("better", "fleet", ME)
    assert offers.offer("worse", "fleet", ME).previous == "fleet"
    assert offers.offer("better", "second", ME).chain == "second"
    offers.withdraw("worse", ME)
    assert offers.offer("better", "fleet", ME).previous == "second"


def test_one_space_has_embeddings_of_one_length(offers: Offers, registry: Registry) -> None:
    """A file says by itself which space it belongs to."""
    registry.publish(artifact.dump(a_terminal("long", 55.0, stem=10)), rights=KNOWN)
    with pytest.raises(OfferRefused, match=r"space 'fleet-1', with embeddings of 80 and of 64 numbers"):
        offers.offer("long", "fleet", ME)


@pytest.mark.parametrize("name", ["nobody", "", "a\0b", "x" * 500])
def test_chains_that_nobody_knows_are_not_offered(offers: Offers, name: str) -> None:
    for deed in (
        lambda: offers.offer(name, "fleet", ME),
        lambda: offers.offer("worse", name, ME),
        lambda: offers.withdraw(name, ME),
    ):
        with pytest.raises(UnknownChain):
            deed()


def test_a_chain_in_an_offer_is_not_deleted(offers: Offers, registry: Registry, database: Database) -> None:
    registry.publish(artifact.dump(replace(FLEET, name="second")), rights=KNOWN)
    offers.offer("worse", "second", ME)
    take_back = "take that back first, by DELETE /chains/worse/offer$"
    with pytest.raises(ChainInUse, match=f"it is offered with chain 'second'; {take_back}"):
        registry.delete("worse", ME)
    with pytest.raises(ChainInUse, match=f"terminal chain 'worse' is offered with it; {take_back}"):
        registry.delete("second", ME)
    offers.withdraw("worse", ME)
    registry.delete("worse", ME)
    registry.delete("second", ME)
    assert [entry.target for entry in audited(database, "chain.delete")] == ["worse", "second"]


def test_the_row_of_an_offer_cannot_outlive_its_chains(registry: Registry, database: Database) -> None:
    for values in ({"terminal": "worse", "chain": "nobody"}, {"terminal": "nobody", "chain": "fleet"}):
        with pytest.raises(IntegrityError), database.transaction() as session:
            session.execute(insert(OfferRow).values(**values))


@pytest.mark.parametrize("deleted", ["worse", "second"])
def test_deleting_and_offering_at_once_never_leaves_an_offer_of_nothing(
    offers: Offers, registry: Registry, files: dict[str, bytes], deleted: str
) -> None:
    second = artifact.dump(replace(FLEET, name="second"))
    registry.publish(second, rights=KNOWN)

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
            gone = pool.submit(outcome, lambda: registry.delete(deleted, ME), start)
            made = pool.submit(outcome, lambda: offers.offer("worse", "second", ME), start)
            found = (gone.result(), made.result())
        assert found in {("done", "UnknownChain"), ("ChainInUse", "done")}
        if found[1] == "done":
            offers.withdraw("worse", ME)
        else:
            registry.publish({**files, "second": second}[deleted], rights=KNOWN)


def test_of_two_who_offer_crosswise_both_are_answered(offers: Offers, registry: Registry) -> None:
    """Each locks two chains."""
    start = threading.Barrier(8)

    def offer(number: int) -> str:
        start.wait()
        name, other = ("worse", "better")[:: 1 if number % 2 else -1]
        for _ in range(5):
            with pytest.raises(OfferRefused):
                offers.offer(name, other, ME)
        return offers.offer(name, "fleet", ME).chain

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(offer, range(8))) == {"fleet"}
    assert offered_with(registry, "fleet") == ["better", "worse"]


# What the tables keep


def test_offers_come_with_their_migration_and_go_with_it(registry: Registry, database: Database) -> None:
    Offers(database).offer("worse", "fleet", ME)
    downgrade(database, "0003")
    assert "offers" not in inspect(database.engine).get_table_names()
    assert "is_terminal" not in {column["name"] for column in inspect(database.engine).get_columns("chains")}
    migrate(database)
    found = registry.find("worse")
    assert (found.is_terminal, found.offer, len(found.widths)) == (False, None, 1)


def test_what_an_older_server_published_is_known_as_terminal_once_it_is_published_again(
    registry: Registry, database: Database, files: dict[str, bytes]
) -> None:
    downgrade(database, "0003")
    migrate(database)
    heals = "or publish its file again, if it was published by an older version$"
    with pytest.raises(OfferRefused, match=f"no terminal chain.*{heals}"):
        Offers(database).offer("worse", "fleet", ME)
    with pytest.raises(OfferRefused, match=r"no terminal chain.*by its name$"):  # it has more widths than one
        Offers(database).offer("fleet", "fleet", ME)
    registry.publish(files["worse"])
    assert Offers(database).offer("worse", "fleet", ME).chain == "fleet"


# What devices get


@pytest.fixture
def client(app: FastAPI, files: dict[str, bytes]) -> Iterator[TestClient]:
    for content in files.values():
        app.state.services.registry.publish(content, rights=KNOWN)
    with TestClient(app) as client:
        yield client


def offer(client: TestClient, terminal: str, chain: str = "fleet") -> None:
    assert client.put(f"/chains/{terminal}/offer", json={"chain": chain}).status_code == 200


def macs_of(client: TestClient, chain: str) -> list[int]:
    return [width["costs"]["macs"] for width in client.get(f"/chains/{chain}/frontier").json()["widths"]]


def ask(client: TestClient, max_macs: int, **fields: Any) -> Any:
    body = {"chain": "fleet", "limits": {"max_macs": max_macs}, **fields}
    return client.post("/models", json=body, headers=AS_JSON).json()


def test_a_terminal_chain_answers_where_it_fits_and_measures_more(client: TestClient) -> None:
    """BETTER, at 52.5 mAP, costs more than the student of stem 4, at 51, and less than that of stem 6, at 52."""
    (better,) = macs_of(client, "better")
    students = macs_of(client, "fleet")
    assert students[1] < better < students[2] < students[3]
    before = ask(client, better)
    assert (before["chain"], before["width"]) == ("fleet", "4x2-4-8")
    offer(client, "better")
    served = {limit: ask(client, limit)["chain"] for limit in (better - 1, better, *students)}
    assert served == {
        better - 1: "fleet",
        better: "better",
        students[0]: "fleet",
        students[1]: "fleet",
        students[2]: "better",
        students[3]: "fleet",
    }
    client.delete("/chains/better/offer")
    assert ask(client, better)["id"] == before["id"]


def test_the_manifest_says_why_a_terminal_chain_was_taken(client: TestClient) -> None:
    for name in ("better", "worse", "foreign"):
        offer(client, name)
    (better,), (worse,) = macs_of(client, "better"), macs_of(client, "worse")
    choice = ask(client, better)["choice"]
    assert choice["chosen"] == "terminal"
    assert choice["why"] == (
        "Terminal chain 'better' measures 52.5 mAP on 'made up for tests' (1 queries, 1 gallery images); student "
        "4x2-4-8 of chain 'fleet' measures 51 mAP on the same. Both answer in embedding space 'fleet-1'."
    )
    assert choice["student"] == {"width": "4x2-4-8", "map": 51.0}
    nothing = {"limit": None, "allowed": None, "needed": None}
    foreign = {"chain": "foreign", "embedding_space": "es-foreign", "map": 60.0, "reason": "other-embedding-space"}
    lower = {"chain": "worse", "embedding_space": "fleet-1", "map": 50.5, "reason": "not-better"}
    assert choice["declined"] == [foreign | nothing, lower | nothing]
    assert worse < better


def test_the_manifest_says_why_a_student_was_taken(client: TestClient) -> None:
    without = ask(client, 10**9)["choice"]
    assert (without["chosen"], without["declined"]) == ("student", [])
    assert without["why"].endswith("No terminal chain is offered with it.")
    for name in ("better", "worse", "foreign"):
        offer(client, name)
    (better,) = macs_of(client, "better")
    choice = ask(client, better - 1)["choice"]
    assert (choice["chosen"], choice["student"]) == ("student", {"width": "4x2-4-8", "map": 51.0})
    assert choice["why"].startswith("Student 4x2-4-8 of chain 'fleet' measures 51 mAP on 'made up for tests'")
    assert choice["why"].endswith(
        f"Of the terminal chains offered with it, 'better' does not fit: max_macs allows {better - 1:,}, it needs "
        f"{better:,}; 'foreign' has another embedding space, 'es-foreign'; 'worse' is no better: it measures 50.5 mAP."
    )
    reasons = {declined["chain"]: declined for declined in choice["declined"]}
    assert reasons["better"]["reason"] == "does-not-fit"
    assert [reasons["better"][name] for name in ("limit", "allowed", "needed")] == ["max_macs", better - 1, better]


def test_of_other_embedding_spaces_only_who_asks_for_any_gets_one(client: TestClient) -> None:
    offer(client, "foreign")
    (macs,) = macs_of(client, "foreign")
    assert ask(client, macs)["chain"] == ask(client, macs, embedding_space="chain")["chain"] == "fleet"
    manifest = ask(client, macs, embedding_space="any")
    assert (manifest["chain"], manifest["embedding_space"]) == ("foreign", "es-foreign")
    assert manifest["choice"]["why"].endswith(
        ". Their embeddings do not compare: its space is 'es-foreign', the chain's 'fleet-1'."
    )
    assert ask(client, macs, embedding_space="all")["code"] == "request-invalid"


def test_a_terminal_chain_answers_where_no_student_fits(client: TestClient) -> None:
    (macs,) = macs_of(client, "foreign")
    narrowest = macs_of(client, "fleet")[0]
    offer(client, "foreign")
    assert ask(client, macs)["code"] == "budget-too-small"
    manifest = ask(client, macs, embedding_space="any")
    assert (manifest["chain"], manifest["choice"]["student"]) == ("foreign", None)
    assert "; no student of chain 'fleet' fits. " in manifest["choice"]["why"]
    problem = ask(client, macs - 1, embedding_space="any")
    assert problem["detail"].startswith("no student of, or terminal chain offered with, chain 'fleet' fits")
    assert (problem["chain"], problem["smallest_available"]) == ("fleet", macs)
    assert ask(client, macs - 1)["smallest_available"] == narrowest > macs


LOSSES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "other bytes": lambda file: file.write_bytes(b"x"),
    "unreadable": lambda file: (file.unlink(), file.mkdir()),
}


def lose(app: FastAPI, name: str, how: str, root: Path) -> None:
    """Take the stored file of that chain away, and all chains from memory."""
    registry = app.state.services.registry
    (file,) = root.rglob(registry.find(name).digest)
    LOSSES[how](file)
    registry.forget_loaded()


@pytest.mark.parametrize("how", LOSSES)
def test_a_terminal_chain_that_cannot_be_loaded_leaves_the_chain_and_the_other_ones(
    app: FastAPI, client: TestClient, tmp_path: Path, how: str
) -> None:
    for name in ("better", "worse"):
        offer(client, name)
    (macs,) = macs_of(client, "better")
    lose(app, "better", how, tmp_path)
    with capture_logs() as logs:
        manifest = ask(client, macs)
    assert (manifest["chain"], manifest["width"]) == ("fleet", "4x2-4-8")
    choice = manifest["choice"]
    assert choice["declined"][0] == {
        "chain": "better",
        "embedding_space": "fleet-1",
        "map": 52.5,
        "reason": "cannot-be-loaded",
        "limit": None,
        "allowed": None,
        "needed": None,
    }
    assert [declined["chain"] for declined in choice["declined"]] == ["better", "worse"]
    assert "offered with it, the stored file of 'better' cannot be loaded; 'worse' is no better" in choice["why"]
    (warning,) = [line for line in logs if line["log_level"] == "warning"]
    assert (warning["chain"], list(warning["errors"])) == ("fleet", ["better"])
    assert 'widthwise_terminals_not_loaded_total{chain="better"} 1.0' in client.get("/metrics").text


def test_only_terminal_chains_that_take_part_are_loaded(app: FastAPI, client: TestClient, tmp_path: Path) -> None:
    offer(client, "foreign")
    lose(app, "foreign", "missing", tmp_path)
    loaded = app.state.services.registry.cache.misses
    (declined,) = ask(client, 10**9)["choice"]["declined"]
    assert (declined["reason"], declined["map"]) == ("other-embedding-space", 60.0)
    assert app.state.services.registry.cache.misses == loaded + 1
    (declined,) = ask(client, 10**9, embedding_space="any")["choice"]["declined"]
    assert declined["reason"] == "cannot-be-loaded"


def test_what_might_have_fitted_but_cannot_be_loaded_is_no_refusal(
    app: FastAPI, client: TestClient, tmp_path: Path
) -> None:
    offer(client, "foreign")
    (macs,) = macs_of(client, "foreign")
    lose(app, "foreign", "missing", tmp_path)
    assert ask(client, macs)["code"] == "budget-too-small"
    assert ask(client, macs, embedding_space="any")["code"] == "stored-object-missing"


def test_a_chain_that_cannot_be_loaded_itself_is_an_error(app: FastAPI, client: TestClient, tmp_path: Path) -> None:
    offer(client, "better")
    lose(app, "fleet", "other bytes", tmp_path)
    assert ask(client, 10**9)["code"] == "stored-object-corrupt"


def test_headers_and_bytes_are_those_of_the_terminal_chain(client: TestClient) -> None:
    offer(client, "better")
    (macs,) = macs_of(client, "better")
    body = {"chain": "fleet", "limits": {"max_macs": macs}}
    answer = client.post("/models", json=body)
    assert answer.headers["widthwise-chain"] == "better"
    assert int(answer.headers["widthwise-macs"]) == macs
    own = client.post("/models", json=body | {"chain": "better"})
    assert (own.content, own.headers["etag"]) == (answer.content, answer.headers["etag"])
    fetched = client.get(answer.headers["location"]).json()
    assert fetched["choice"] is None
    assert fetched | {"choice": ask(client, macs)["choice"]} == ask(client, macs)
    assert client.get(fetched["artifact"], headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    counted = client.get("/metrics").text
    assert 'widthwise_models_served_total{chain="better",width="8x2-4-8"}' in counted


def test_a_chain_without_offers_costs_no_further_statement_and_no_further_load(
    app: FastAPI, client: TestClient
) -> None:
    offer(client, "better")
    services = app.state.services
    body = {"chain": "pico", "limits": {"max_macs": 10**9}}
    client.post("/models", json=body)
    asked: list[str] = []
    event.listen(services.database.engine, "before_cursor_execute", lambda *told: asked.append(told[2]))
    services.registry.forget_loaded()
    loaded = services.registry.cache.misses
    client.post("/models", json=body)
    assert services.registry.cache.misses == loaded + 1
    assert len(asked) == 2  # the chain with what is offered, the recipe
    client.post("/models", json=body | {"chain": "fleet"})
    assert services.registry.cache.misses == loaded + 3


def test_chains_show_what_is_offered(client: TestClient) -> None:
    offer(client, "worse")
    offer(client, "better", "fleet")
    chains = {chain["name"]: chain for chain in client.get("/chains").json()["chains"]}
    shown = {name: [chain[field] for field in ("is_terminal", "offered_with", "terminals")]
             for name, chain in chains.items()}  # fmt: skip
    assert shown == {
        "better": [True, "fleet", []],
        "fleet": [False, None, ["better", "worse"]],
        "foreign": [True, None, []],
        "pico": [False, None, []],
        "worse": [True, "fleet", []],
    }
    for name in ("better", "fleet"):
        assert client.get(f"/chains/{name}").json() == chains[name]


def test_an_offer_says_what_it_changed(client: TestClient) -> None:
    client.put("/chains/fleet/aliases/canary", json={})
    made = client.put("/chains/better/offer", json={"chain": "canary"})
    assert made.json() == {"terminal": "better", "chain": "fleet", "previous": None, "same_embedding_space": True}
    assert client.put("/chains/foreign/offer", json={"chain": "fleet"}).json()["same_embedding_space"] is False
    assert client.delete("/chains/better/offer").status_code == 204
    trail = [entry["action"] for entry in client.get("/audit").json()["entries"]]
    assert trail[:3] == ["offer.remove", "offer.set", "offer.set"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("PUT", "/chains/better/offer", {}, 422, "request-invalid"),
        ("PUT", "/chains/better/offer", {"chain": "fleet", "force": True}, 422, "request-invalid"),
        ("PUT", "/chains/better/offer", {"chain": "nobody"}, 404, "chain-unknown"),
        ("PUT", "/chains/nobody/offer", {"chain": "fleet"}, 404, "chain-unknown"),
        ("PUT", "/chains/%00/offer", {"chain": "fleet"}, 404, "chain-unknown"),
        ("PUT", "/chains/pico/offer", {"chain": "fleet"}, 409, "offer-refused"),
        ("PUT", "/chains/better/offer", {"chain": "foreign"}, 409, "offer-refused"),
        ("DELETE", "/chains/better/offer", None, 404, "offer-unknown"),
        ("DELETE", "/chains/nobody/offer", None, 404, "chain-unknown"),
    ],
)
def test_refusals_have_codes(client: TestClient, method: str, path: str, body: object, status: int, code: str) -> None:
    answer = client.request(method, path, **({} if body is None else {"json": body}))
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_over_http_unknown_rights_are_listed_and_chains_in_offers_kept(app: FastAPI, client: TestClient) -> None:
    app.state.services.registry.publish(artifact.dump(replace(BETTER, name="new")))
    refused = client.put("/chains/new/offer", json={"chain": "fleet"})
    assert (refused.status_code, refused.json()["code"]) == (409, "promotion-refused")
    assert refused.json()["unknown"] == ["terms", "consent_basis"]
    assert client.put("/chains/new/offer", json={"chain": "fleet", "accept_unknown": True}).status_code == 200
    for name in ("new", "fleet"):
        assert client.delete(f"/chains/{name}").json()["code"] == "chain-in-use"


# Comparing


def run(content: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])


@pytest.mark.parametrize("embedding", ["common", "native"])
def test_embeddings_of_a_terminal_chain_compare_with_those_of_its_chain(
    app: FastAPI, client: TestClient, embedding: str
) -> None:
    """A chain of which inner channels are dead, and the terminal chain made of its full width without them: both must
    give the same vector for an image, number by number, though each stores channels in an order of its own."""
    chain = with_dead_channels(FLEET)
    (group,) = chain.table.embedding_channels
    assert not np.array_equal(chain.partitions[group].order, np.arange(chain.embedding_dim))
    terminal = replace(without_dead_channels(chain), embedding_space=chain.embedding_space, frontier=BETTER.frontier)
    for made in (replace(chain, name="whole"), terminal):
        app.state.services.registry.publish(artifact.dump(made), rights=KNOWN)
    offer(client, terminal.name, "whole")
    body = {"limits": {"max_macs": 10**9}, "embedding": embedding}
    (macs,) = macs_of(client, terminal.name)
    images = np.random.default_rng(0).standard_normal((4, 3, 64, 32), dtype=np.float32)
    full, pruned = (
        client.post("/models", json=body | asked)
        for asked in ({"chain": "whole"}, {"chain": "whole", "limits": {"max_macs": macs}})
    )
    assert [answer.headers["widthwise-chain"] for answer in (full, pruned)] == ["whole", "pruned"]
    assert int(pruned.headers["widthwise-macs"]) < int(full.headers["widthwise-macs"])
    np.testing.assert_allclose(run(pruned.content, images), run(full.content, images), atol=1e-5)
    spaces = {written(answer.content)["reid.embedding_space"] for answer in (full, pruned)}
    assert spaces == {chain.embedding_space}


def written(content: bytes) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}


DEAD = 3  # the first channels of every inner layer, in the chain's order


def inner_layers(chain: Chain) -> list[str]:
    return [group for group in chain.partitions if group.endswith(".a")]


def with_dead_channels(chain: Chain) -> Chain:
    """`chain` with inner channels that are zero at full width, whatever they see."""
    tensors = dict(chain.tensors)
    for layer in (group.removesuffix(".a") for group in inner_layers(chain)):
        for name in (f"{layer}.bn1.weight", f"{layer}.bn1.bias"):
            tensors[name] = np.concatenate([np.zeros(DEAD, np.float32), tensors[name][DEAD:]])
    return replace(chain, tensors=tensors)


def without_dead_channels(chain: Chain) -> Chain:
    """The full width of `chain`, pruned as `widthwise compress` does, which leaves out channels that are dead."""
    from chains.compress.run import from_student, terminal_chain
    from chains.compress.units import with_channels
    from chains.data.images import ImageSet

    pixels = np.random.default_rng(1).integers(0, 256, (8, chain.input.height, chain.input.width, 3), dtype=np.uint8)
    people = ImageSet(pixels, np.arange(8) // 2, np.arange(8) % 2)
    start = from_student(artifact.load(artifact.dump(chain)), chain.teacher, people)
    sizes = start.student.table.group_sizes(chain.teacher)
    kept = {group: np.arange(DEAD, sizes[group]) for group in inner_layers(chain)}
    pruned = with_channels(start.student, kept)
    return terminal_chain(pruned, chain.input, name="pruned", license="none", provenance={}, order=start.order)
