"""The contract of object stores: one suite, every adapter."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.errors import InvalidKey, ObjectCorrupt, ObjectNotFound, StorageUnavailable
from app.storage import ObjectStore, content_key, open_store, read_verified
from app.storage.local import LocalStore
from app.storage.port import fetch_to
from app.storage.s3 import S3Store

CONTENT = bytes(range(256)) * 4000  # more than one chunk
BAD_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../b",
    "a/.hidden",
    "A",
    "a b",
    "a\0",
    "ä",
    "a\\b",
    "a" * 600,
    "a\n",
]


@pytest.fixture(params=["folder", "s3", "s3 under a prefix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        store = open_store((tmp_path / "a folder").as_uri())
    else:
        request.getfixturevalue("s3_credentials")
        prefix = "/some/prefix" if "prefix" in request.param else ""
        store = open_store(f"s3://test-{uuid.uuid4().hex}{prefix}", request.getfixturevalue("s3_url"))
    store.prepare()
    return store


def put(store: ObjectStore, key: str, content: bytes = CONTENT) -> bool:
    return store.put(key, iter([content[:1000], content[1000:]]), hashlib.sha256(content).hexdigest())


def get(store: ObjectStore, key: str, *slice_: int | None) -> bytes:
    return b"".join(store.get(key, *slice_))


def test_what_is_put_comes_back(store: ObjectStore) -> None:
    assert put(store, "a/b")
    assert get(store, "a/b") == CONTENT
    assert store.stat("a/b").size_bytes == len(CONTENT)


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    assert put(store, "empty", b"")
    assert get(store, "empty") == b""
    assert store.stat("empty").size_bytes == 0


SIZE = len(CONTENT)
SLICES = [(0, 10), (5, 6), (1000, None), (0, 0), (7, 3), (SIZE - 1, SIZE), (SIZE, None), (9**9, None), (1000, 9**9)]


@pytest.mark.parametrize("bounds", SLICES)
def test_a_range_is_a_slice(store: ObjectStore, bounds: tuple[int, int | None]) -> None:
    put(store, "a")
    assert get(store, "a", *bounds) == CONTENT[slice(*bounds)]


def test_chunks_are_of_bounded_size(store: ObjectStore) -> None:
    put(store, "a")
    assert max(len(chunk) for chunk in store.get("a")) <= 256 * 1024


def test_a_taken_key_is_left_as_it_is(store: ObjectStore) -> None:
    put(store, "a")
    assert put(store, "a", b"other") is False
    assert get(store, "a") == CONTENT


def test_bytes_with_another_digest_are_not_stored(store: ObjectStore) -> None:
    with pytest.raises(ObjectCorrupt, match="5 bytes"):
        store.put("a", [b"hello"], hashlib.sha256(b"bye").hexdigest())
    with pytest.raises(ObjectNotFound):
        store.stat("a")
    assert list(store.list()) == []


def test_a_source_that_breaks_stores_nothing(store: ObjectStore) -> None:
    def broken():
        yield b"some"
        raise RuntimeError("the client went away")

    with pytest.raises(RuntimeError, match="went away"):
        store.put("a", broken(), hashlib.sha256(b"some").hexdigest())
    assert list(store.list()) == []


@pytest.mark.parametrize("bounds", [(), (0, 5), (3, 3)])
def test_reading_what_is_not_there_says_so(store: ObjectStore, bounds: tuple[int, ...]) -> None:
    put(store, "a/b")
    for missing in ("c", "a"):
        with pytest.raises(ObjectNotFound):
            get(store, missing, *bounds)
        with pytest.raises(ObjectNotFound):
            store.stat(missing)


def test_what_is_deleted_is_gone_and_deleting_twice_is_fine(store: ObjectStore) -> None:
    put(store, "a")
    store.delete("a")
    store.delete("a")
    with pytest.raises(ObjectNotFound):
        store.stat("a")


def test_listing_is_in_order_and_by_prefix(store: ObjectStore) -> None:
    for key in ("b", "a/2", "a/1", "a-1", "a/10"):
        put(store, key, key.encode())
    assert list(store.list()) == ["a-1", "a/1", "a/10", "a/2", "b"]
    assert list(store.list("a/1")) == ["a/1", "a/10"]
    assert list(store.list("c")) == []


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_outside_the_alphabet_are_refused(store: ObjectStore, key: str) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: put(store, key),
        lambda: get(store, key),
        lambda: store.stat(key),
        lambda: store.delete(key),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidKey):
            attempt()


def test_preparing_twice_is_fine(store: ObjectStore) -> None:
    put(store, "a")
    store.prepare()
    assert get(store, "a") == CONTENT


def test_a_verified_read_is_the_content(store: ObjectStore) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    put(store, content_key(sha256))
    assert read_verified(store, sha256) == CONTENT


def test_a_verified_read_refuses_what_changed_in_the_store(store: ObjectStore) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    put(store, content_key(sha256), b"not the content")
    with pytest.raises(ObjectCorrupt, match="15 bytes"):
        read_verified(store, sha256)


def test_a_fetched_file_is_whole_or_as_it_was(store: ObjectStore, tmp_path: Path) -> None:
    sha256, place = hashlib.sha256(CONTENT).hexdigest(), tmp_path / "fetched" / "file"
    with pytest.raises(ObjectNotFound):
        fetch_to(store, sha256, place)
    assert list(place.parent.iterdir()) == []
    store.put(content_key(sha256), [CONTENT], sha256)
    fetch_to(store, sha256, place)
    assert place.read_bytes() == CONTENT
    other = hashlib.sha256(b"other").hexdigest()
    store.put(content_key(other), [b"damaged"], hashlib.sha256(b"damaged").hexdigest())
    with pytest.raises(ObjectCorrupt):
        fetch_to(store, other, place)
    assert [(path.name, path.read_bytes()) for path in place.parent.iterdir()] == [("file", CONTENT)]


def test_content_lies_under_its_digest() -> None:
    assert content_key("ab" * 32) == f"sha256/ab/{'ab' * 32}"


@pytest.mark.parametrize("digest", ["", "AB" * 32, "ab" * 31, "ab" * 32 + "\n", "../" * 21 + "a"])
def test_only_a_digest_makes_a_content_key(digest: str) -> None:
    with pytest.raises(InvalidKey):
        content_key(digest)


def test_of_two_writers_of_a_folder_exactly_one_stores(tmp_path: Path) -> None:
    store, stored, start = LocalStore(tmp_path), [], threading.Barrier(8)

    def write(content: bytes) -> None:
        start.wait()
        stored.append((put(store, "a", content), content))

    threads = [threading.Thread(target=write, args=(bytes([number]) * 5000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [content for won, content in stored if won]
    assert winners == [get(store, "a")]


def test_an_object_has_an_age(store: ObjectStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)  # some servers know seconds only
    put(store, "a")
    found = store.stat("a")
    assert (found.key, found.modified_at.utcoffset()) == ("a", timedelta(0))
    assert before <= found.modified_at <= datetime.now(UTC) + timedelta(seconds=2)


def test_the_age_of_content_begins_anew_when_it_is_put_again(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.storage.s3.YOUNG", timedelta(0))
    key = content_key(hashlib.sha256(CONTENT).hexdigest())
    put(store, key)
    first = store.stat(key).modified_at
    time.sleep(1.1)
    assert put(store, key) is False
    assert store.stat(key).modified_at > first
    assert get(store, key) == CONTENT


def test_a_young_object_is_not_sent_again(s3_url: str, s3_credentials: None) -> None:
    store = open_store(f"s3://test-{uuid.uuid4().hex}", s3_url)
    store.prepare()
    key = content_key(hashlib.sha256(CONTENT).hexdigest())
    put(store, key)
    first = store.stat(key).modified_at
    time.sleep(1.1)
    assert put(store, key) is False
    assert store.stat(key).modified_at == first


def test_an_object_deleted_just_when_it_is_put_again_is_stored_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, touch = LocalStore(tmp_path), os.utime
    put(store, "a")

    def touch_what_is_gone(path: Path) -> None:
        monkeypatch.setattr(os, "utime", touch)
        store.delete("a")
        touch(path)

    monkeypatch.setattr(os, "utime", touch_what_is_gone)
    assert put(store, "a") is True
    assert get(store, "a") == CONTENT


def leave_a_draft(store: ObjectStore, tmp_path: Path) -> None:
    """What a writer leaves that is killed in the middle."""
    if isinstance(store, S3Store):
        store._client.create_multipart_upload(Bucket=store._bucket, Key=store._name("sha256/large"))
    else:
        folder = tmp_path / "a folder" / "sha256"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".put-abc").write_bytes(b"half")


def test_drafts_of_writers_that_were_killed_are_dropped(store: ObjectStore, tmp_path: Path) -> None:
    put(store, "a")
    leave_a_draft(store, tmp_path)
    soon, past = datetime.now(UTC) + timedelta(minutes=1), datetime(2000, 1, 1, tzinfo=UTC)
    assert store.drop_drafts(past) == 0
    assert store.drop_drafts(soon, dry_run=True) == 1
    assert store.drop_drafts(soon) == 1
    assert store.drop_drafts(soon) == 0
    assert list(store.list()) == ["a"]


def test_a_folder_keeps_no_drafts(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    put(store, "a")
    put(store, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "url",
    ["", "folder", "http://host/x", "file://host/x", "s3://", "s3:bucket", "ftp://a/b"],
    ids=lambda url: url or "none",
)
def test_other_urls_are_no_stores(url: str) -> None:
    with pytest.raises(StorageUnavailable, match="storage URL"):
        open_store(url)


def test_an_object_of_several_parts_comes_back(store: ObjectStore) -> None:
    large = CONTENT * 17  # boto3 sends more than 8 MiB in parts
    assert put(store, "large", large)
    assert get(store, "large", 9_000_000, None) == large[9_000_000:]
    assert store.stat("large").size_bytes == len(large)


def test_a_bucket_that_was_never_made_is_named_unavailable(s3_url: str, s3_credentials: None) -> None:
    store = open_store("s3://never-made", s3_url)
    with pytest.raises(StorageUnavailable):
        put(store, "a")
    with pytest.raises(StorageUnavailable):
        get(store, "a")
    with pytest.raises(StorageUnavailable):
        list(store.list())


def test_a_server_that_is_away_is_named_unavailable(s3_credentials: None) -> None:
    store = open_store("s3://bucket", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailable, match="S3 server"):
        store.stat("a")
    with pytest.raises(StorageUnavailable):
        store.prepare()


def test_a_full_disk_under_an_upload_is_the_stores_affair(
    s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is spooled does not fit: a caller is told to come back, not that something is broken."""

    class Full(io.BytesIO):
        def write(self, _data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.storage.s3.tempfile.SpooledTemporaryFile", lambda **_: Full())
    store = open_store("s3://a-bucket", "http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match="No space left on device"):
        put(store, "a")


def test_an_endpoint_that_is_no_url_is_named(s3_credentials: None) -> None:
    with pytest.raises(StorageUnavailable, match="WIDTHWISE_S3_ENDPOINT_URL"):
        open_store("s3://bucket", "127.0.0.1:8333")


def test_half_a_credential_is_named(s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it remembers the credentials it found before
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageUnavailable, match="AWS_SECRET_ACCESS_KEY"):
        open_store("s3://bucket", "http://127.0.0.1:9")
