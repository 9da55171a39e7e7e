from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI

from app.db.migrate import migrate
from app.errors import ChainNameTaken, ChainRightsDiffer, ObjectCorrupt, ObjectNotFound, ReservedName, UnknownChain
from app.main import wire
from app.services import demo_chain
from app.services.chain_cache import ChainCache
from app.services.demo_chain import publish_demo_chain_if_empty
from app.services.registry import Registry
from app.settings import Settings
from app.terms import Rights, strictest
from chains import artifact
from chains.artifact import StoredChain
from chains.errors import ChainFileError, ChainMismatch, NotCalibrated
from chains.onnxfile import EmitOptions, write
from chains.testing import pico_chain
from chains.width import Width


@pytest.fixture
def registry(app: FastAPI) -> Registry:
    found: Registry = app.state.services.registry
    return found


def test_the_first_chain_becomes_stable_and_the_second_does_not(registry: Registry) -> None:
    registry.publish(artifact.dump(pico_chain(name="later", seed=1)))
    assert registry.find("stable").name == "pico"
    assert registry.find("later").aliases == []


def test_stored_costs_are_those_of_the_files(registry: Registry, chain_file: bytes) -> None:
    stored = artifact.load(chain_file)
    for row in registry.find("pico").widths:
        assert row.artifact_bytes == len(write(stored, Width.parse(row.width), EmitOptions()))


def test_publishing_the_same_file_again_changes_nothing(registry: Registry, chain_file: bytes) -> None:
    before = registry.find("pico")
    assert registry.publish(chain_file).published_at == before.published_at
    assert len(registry.page("", 10).chains) == 1


def test_publishing_at_once_from_many_threads_publishes_once(registry: Registry) -> None:
    content = artifact.dump(pico_chain(name="rushed"))
    with ThreadPoolExecutor(6) as pool:
        digests = {row.digest for row in pool.map(registry.publish, [content] * 6)}
    assert len(digests) == 1
    assert [row.name for row in registry.page("", 10).chains] == ["pico", "rushed"]


def test_a_name_is_never_given_to_another_file(registry: Registry) -> None:
    with pytest.raises(ChainNameTaken, match="another name"):
        registry.publish(artifact.dump(pico_chain(seed=7)))
    assert registry.find("pico").embedding_space == "pico-0"


@pytest.mark.parametrize("name", ["stable", "canary"])
def test_a_chain_must_not_hide_an_alias(registry: Registry, name: str) -> None:
    with pytest.raises(ReservedName):
        registry.publish(artifact.dump(pico_chain(name=name)))


def test_a_chain_with_an_uncalibrated_width_is_not_published(registry: Registry) -> None:
    chain = pico_chain(name="hasty")
    incomplete = replace(chain, statistics={chain.ladder[0]: chain.statistics[chain.ladder[0]]})
    with pytest.raises(NotCalibrated):
        registry.publish(artifact.dump(incomplete))
    with pytest.raises(UnknownChain):
        registry.find("hasty")


def test_weights_that_overflow_once_they_are_merged_are_not_published(registry: Registry) -> None:
    """Every number of the file is finite, but two columns of it sum to infinity."""
    chain = pico_chain(name="huge")
    name = "layer4.1.conv2.weight"
    huge = replace(chain, tensors={**chain.tensors, name: np.full_like(chain.tensors[name], 3e38)})
    with pytest.raises(ChainMismatch, match=r"layer4\.1\.conv2\.weight of the student at 2x2-4-8 overflows"):
        registry.publish(artifact.dump(huge))


def test_a_broken_file_is_not_published(registry: Registry, chain_file: bytes) -> None:
    with pytest.raises(ChainFileError):
        registry.publish(chain_file[:-1])


def test_a_chain_of_a_job_has_the_strictest_rights_of_what_it_was_made_from(registry: Registry) -> None:
    teacher = Rights("CC-BY-NC-4.0", "research", "public")
    dataset = Rights("Apache-2.0", "any", "synthetic")
    row = registry.publish(artifact.dump(pico_chain(name="made")), rights=strictest([teacher, dataset]), job="1")
    assert (row.terms, row.consent_basis, row.job) == ("research", "public", "1")
    assert row.license == "CC-BY-NC-4.0 AND Apache-2.0"


def test_a_chain_of_a_job_never_becomes_stable_by_itself(empty: Registry) -> None:
    empty.publish(artifact.dump(pico_chain(name="made")), job="1")
    with pytest.raises(UnknownChain):
        empty.find("stable")
    empty.publish(artifact.dump(pico_chain(name="tried", seed=1)), become_stable=False)
    with pytest.raises(UnknownChain):
        empty.find("stable")
    empty.publish(artifact.dump(pico_chain(name="first", seed=2)))
    assert empty.find("stable").name == "first"


@pytest.mark.parametrize(
    ("stated", "terms", "consent_basis"),
    [
        ({}, "unknown", "unknown"),
        ({"terms": "research", "consent_basis": "consent"}, "research", "consent"),
        ({"terms": "whatever", "consent_basis": 7}, "unknown", "unknown"),
        ({"terms": ["any"], "consent_basis": {}}, "unknown", "unknown"),
    ],
)
def test_without_other_word_a_chain_has_the_rights_its_provenance_states(
    registry: Registry, stated: dict[str, object], terms: str, consent_basis: str
) -> None:
    row = registry.publish(artifact.dump(replace(pico_chain(name="stating"), provenance=stated)))
    assert (row.terms, row.consent_basis) == (terms, consent_basis)
    assert row.license == pico_chain().license


def test_rights_can_be_stated_later_and_then_stay(registry: Registry) -> None:
    content = artifact.dump(pico_chain(name="quiet"))
    registry.publish(content)
    assert registry.publish(content, rights=Rights("l", "any", "unknown")).terms == "any"
    assert registry.publish(content, rights=Rights("l", "unknown", "public")).consent_basis == "public"
    with pytest.raises(ChainRightsDiffer, match="recorded as 'any' and cannot become 'research'"):
        registry.publish(content, rights=Rights("l", "research", "public"))
    assert registry.publish(content).terms == "any"


def test_what_a_job_could_not_know_nobody_states_later(registry: Registry) -> None:
    content = artifact.dump(pico_chain(name="made"))
    registry.publish(content, rights=Rights("l", "unknown", "public"), job="1")
    with pytest.raises(ChainRightsDiffer):
        registry.publish(content, rights=Rights("l", "any", "public"))
    assert registry.publish(content, rights=Rights("l", "unknown", "public"), job="1").terms == "unknown"


@pytest.mark.parametrize("name", ["nobody", "", "..", "a/b", "a\0b", "A", "x" * 500])
def test_names_of_nothing_are_unknown(registry: Registry, name: str) -> None:
    with pytest.raises(UnknownChain):
        registry.find(name)


def test_a_chain_is_read_from_the_store_after_memory_is_lost(registry: Registry, chain_file: bytes) -> None:
    digest = registry.find("pico").digest
    registry.load(digest)
    registry.forget_loaded()
    assert artifact.dump(registry.load(digest).chain) == chain_file


def object_file(folder: Path) -> Path:
    return next(path for path in (folder / "data" / "objects").rglob("*") if path.is_file())


def test_a_chain_that_changed_in_the_store_is_not_loaded(registry: Registry, tmp_path: Path) -> None:
    object_file(tmp_path).write_bytes(b"something else")
    with pytest.raises(ObjectCorrupt):
        registry.load(registry.find("pico").digest)


def test_a_lost_object_is_healed_by_publishing_again(registry: Registry, tmp_path: Path, chain_file: bytes) -> None:
    object_file(tmp_path).unlink()
    digest = registry.find("pico").digest
    with pytest.raises(ObjectNotFound):
        registry.load(digest)
    registry.publish(chain_file)
    assert registry.load(digest).digest == digest


@pytest.fixture
def demo_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "demo.safetensors"
    file.write_bytes(artifact.dump(pico_chain(name="demo")))
    monkeypatch.setattr(demo_chain, "DEMO_CHAIN", file)
    return file


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Registry]:
    services = wire(Settings(data_dir=tmp_path / "empty"))
    migrate(services.database)
    services.registry.prepare_storage()
    yield services.registry
    services.database.dispose()


def test_an_empty_registry_gets_the_demo_chain_once(empty: Registry, demo_file: Path) -> None:
    published = publish_demo_chain_if_empty(empty)
    assert published is not None
    assert (published.name, published.terms, published.consent_basis) == ("demo", "any", "synthetic")
    assert publish_demo_chain_if_empty(empty) is None
    assert empty.find("stable").name == "demo"


def test_a_package_without_a_demo_chain_starts_empty(empty: Registry, demo_file: Path) -> None:
    demo_file.unlink()
    assert publish_demo_chain_if_empty(empty) is None
    assert empty.is_empty()


def test_a_registry_with_chains_gets_no_demo_chain(registry: Registry, demo_file: Path) -> None:
    assert publish_demo_chain_if_empty(registry) is None
    assert [row.name for row in registry.page("", 10).chains] == ["pico"]


class Loader:
    """Counts loads, and holds them up until told otherwise."""

    def __init__(self, chain_file: bytes) -> None:
        self.stored = artifact.load(chain_file)
        self.loads: list[str] = []
        self.may_go_on = threading.Event()

    def __call__(self, digest: str) -> StoredChain:
        self.loads.append(digest)
        self.may_go_on.wait(10)
        return self.stored


@pytest.fixture
def loader(chain_file: bytes) -> Loader:
    return Loader(chain_file)


def test_many_who_want_a_chain_at_once_wait_for_one_load(loader: Loader) -> None:
    cache = ChainCache(loader, max_bytes=10**9)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(cache.get, "a") for _ in range(8)]
        loader.may_go_on.set()
        assert {id(future.result()) for future in waiting} == {id(loader.stored)}
    assert loader.loads == ["a"]


def test_the_least_recently_used_chain_leaves_first(loader: Loader) -> None:
    loader.may_go_on.set()
    cache = ChainCache(loader, max_bytes=2 * loader.stored.size_bytes)
    for digest in ("a", "b", "a", "c", "a", "b"):
        cache.get(digest)
    assert loader.loads == ["a", "b", "c", "b"]


def test_a_chain_larger_than_the_cache_is_still_served(loader: Loader) -> None:
    loader.may_go_on.set()
    cache = ChainCache(loader, max_bytes=0)
    assert cache.get("a") is loader.stored
    assert cache.get("a") is loader.stored
    assert loader.loads == ["a"]


def test_a_failed_load_is_tried_again_by_the_next_who_asks(loader: Loader) -> None:
    attempts = []

    def load(digest: str) -> StoredChain:
        attempts.append(digest)
        if len(attempts) == 1:
            raise ObjectNotFound("not yet")
        return loader.stored

    cache = ChainCache(load, max_bytes=0)
    with pytest.raises(ObjectNotFound):
        cache.get("a")
    assert cache.get("a") is loader.stored
