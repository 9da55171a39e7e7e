from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.db.repositories import Chains
from chains import artifact
from chains.testing import as_first_measured, pico_chain

NAMES = ["a", "b-1", "c-2", "pico", "z9"]


@pytest.fixture
def five(app: FastAPI) -> Iterator[TestClient]:
    registry = app.state.services.registry
    for seed, name in enumerate(NAMES):
        if name != "pico":
            registry.publish(artifact.dump(pico_chain(name=name, seed=seed, rungs=2)))
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("page_size", [1, 2, 3, 5, 100])
def test_pages_list_every_chain_once_in_order(five: TestClient, page_size: int) -> None:
    names, token = [], None
    while True:
        params = {"page_size": page_size} | ({"page_token": token} if token else {})
        page = five.get("/chains", params=params).json()
        assert len(page["chains"]) <= page_size
        names += [chain["name"] for chain in page["chains"]]
        token = page["next_page_token"]
        if token is None:
            break
    assert names == NAMES


def test_a_chain_says_what_it_is(shared_client: TestClient, chain_file: bytes) -> None:
    chain = shared_client.get("/chains/pico").json()
    stored = artifact.load(chain_file)
    assert chain["digest"] == stored.digest
    assert chain["size_bytes"] == len(chain_file)
    assert chain["widths"] == ["2x2-4-8", "4x2-4-8", "6x2-4-8", "8x2-4-8"]
    assert chain["embedding_dim"] == 64
    assert chain["image"] == {"height": 64, "width": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert chain["aliases"] == ["stable"]
    assert chain["provenance"] == dict(stored.chain.provenance)


def test_an_alias_leads_to_its_chain(shared_client: TestClient) -> None:
    for tail in ("", "/frontier"):
        assert shared_client.get(f"/chains/stable{tail}").json() == shared_client.get(f"/chains/pico{tail}").json()


def test_the_frontier_has_costs_accuracy_and_how_it_was_measured(shared_client: TestClient) -> None:
    frontier = shared_client.get("/chains/pico/frontier").json()
    first = frontier["widths"][0]
    assert first["width"] == "2x2-4-8"
    figures = {"map": 50.0, "map_ci95": [49.5, 50.5], "rank1": 60.0, "rank5": 70.0, "rank10": 80.0, "minp": 40.0}
    assert first["accuracy"] == figures
    assert first["costs"]["flops"] == 2 * first["costs"]["macs"]
    assert frontier["measured"]["trained_after_expansion"] is False
    assert frontier["cross_width"]["widths"] == [width["width"] for width in frontier["widths"]]
    assert [len(row) for row in frontier["cross_width"]["map"]] == [4, 4, 4, 4]
    macs = [width["costs"]["macs"] for width in frontier["widths"]]
    assert macs == sorted(macs)


def test_the_frontier_has_cut_offs_for_every_pair_of_widths(shared_client: TestClient) -> None:
    cross = shared_client.get("/chains/pico/frontier").json()["cross_width"]
    hundredth, thousandth = cross["thresholds"]
    assert (hundredth["false_accept_rate"], thousandth["false_accept_rate"]) == (0.01, 0.001)
    for name in ("cosine", "true_accept"):
        assert [len(row) for row in hundredth[name]] == [4, 4, 4, 4]
        assert hundredth[name][0][0] is None  # made up as not known
    assert (hundredth["cosine"][1][2], hundredth["true_accept"][1][2]) == (0.46, 63.0)
    assert thousandth["cosine"][1][2] == 0.469


def test_a_chain_measured_before_there_were_thresholds_is_shown_without(app: FastAPI, client: TestClient) -> None:
    chain = pico_chain(name="first", seed=1)
    registry = app.state.services.registry
    registry.publish(artifact.dump(replace(chain, frontier=as_first_measured(chain.frontier))))
    frontier = client.get("/chains/first/frontier").json()
    assert {width["accuracy"]["minp"] for width in frontier["widths"]} == {None}
    assert frontier["cross_width"]["thresholds"] == []
    body = {"chain": "first", "limits": {"max_macs": 10**9}}
    manifest = client.post("/models", json=body, headers={"accept": "application/json"}).json()
    assert (manifest["thresholds"], manifest["accuracy"]["minp"]) == (None, None)


def test_a_measurement_recorded_by_an_older_release_is_shown_as_it_was(app: FastAPI, client: TestClient) -> None:
    with app.state.services.database.transaction() as session:
        row = Chains(session).find("pico")
        row.measurement = {name: value for name, value in row.measurement.items() if name != "thresholds"}
    cross = client.get("/chains/pico/frontier").json()["cross_width"]
    assert cross["thresholds"] == []
    assert len(cross["map"]) == 4


def test_a_chain_that_was_never_measured_says_so(app: FastAPI, client: TestClient) -> None:
    app.state.services.registry.publish(artifact.dump(replace(pico_chain(name="unmeasured"), frontier=None)))
    frontier = client.get("/chains/unmeasured/frontier").json()
    assert frontier["measured"] is None
    assert frontier["cross_width"] is None
    assert {width["accuracy"] for width in frontier["widths"]} == {None}
    body = {"chain": "unmeasured", "limits": {"max_macs": 10**9}}
    manifest = client.post("/models", json=body, headers={"accept": "application/json"}).json()
    assert (manifest["accuracy"], manifest["width"]) == (None, "8x2-4-8")
