"""Conditional and ranged requests for a model's bytes, after RFC 9110."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

HUGE = "9" * 5000


@pytest.fixture(scope="module")
def whole(shared_client: TestClient) -> tuple[str, bytes, str]:
    """(path, content, etag) of a model."""
    answer = shared_client.post("/models", json={"limits": {"max_macs": 10**9}})
    return answer.headers["content-location"], answer.content, answer.headers["etag"]


def test_head_answers_as_get_without_bytes(shared_client: TestClient, whole: tuple[str, bytes, str]) -> None:
    path, content, _ = whole
    head, got = shared_client.head(path), shared_client.get(path)
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == str(len(content))
    assert head.headers["accept-ranges"] == "bytes"
    ours = {"x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in ours} == {
        k: v for k, v in got.headers.items() if k not in ours
    }


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("tags", ["{etag}", "*", "W/{etag}", '"x", {etag}', '"x",{etag},"y"', "  {etag}  "])
def test_who_has_it_already_gets_304(
    shared_client: TestClient, whole: tuple[str, bytes, str], method: str, tags: str
) -> None:
    path, _, etag = whole
    answer = shared_client.request(method, path, headers={"if-none-match": tags.format(etag=etag)})
    assert answer.status_code == 304
    assert answer.content == b""
    assert answer.headers["etag"] == etag
    assert "immutable" in answer.headers["cache-control"]


@pytest.mark.parametrize("tags", ['"x"', "{bare}", "", '"{bare}', "nonsense"])
def test_who_has_another_version_gets_the_bytes(
    shared_client: TestClient, whole: tuple[str, bytes, str], tags: str
) -> None:
    path, content, etag = whole
    answer = shared_client.get(path, headers={"if-none-match": tags.format(bare=etag.strip('"'))})
    assert (answer.status_code, answer.content) == (200, content)


@pytest.mark.parametrize(("tags", "status"), [("{etag}", 200), ("*", 200), ('"x"', 412), ("W/{etag}", 412)])
def test_if_match_compares_strongly(
    shared_client: TestClient, whole: tuple[str, bytes, str], tags: str, status: int
) -> None:
    path, _, etag = whole
    assert shared_client.get(path, headers={"if-match": tags.format(etag=etag)}).status_code == status


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-99", (0, 100)),
        ("bytes=100-", (100, None)),
        ("bytes=-100", (-100, None)),
        ("bytes=-999999999999", (0, None)),
        (f"bytes=-{HUGE}", (0, None)),
        ("bytes=5-999999999999", (5, None)),
        (f"bytes=5-{HUGE}", (5, None)),
        ("BYTES=1-2", (1, 3)),
        ("bytes= 1-2 ", (1, 3)),
    ],
)
def test_a_range_is_that_part_of_the_whole(
    shared_client: TestClient, whole: tuple[str, bytes, str], value: str, bounds: tuple[int, int | None]
) -> None:
    path, content, etag = whole
    expected = content[slice(*bounds)]
    answer = shared_client.get(path, headers={"range": value})
    assert (answer.status_code, answer.content) == (206, expected)
    start = content.index(expected) if len(expected) > 1000 else slice(*bounds).indices(len(content))[0]
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(content)}"
    assert answer.headers["content-length"] == str(len(expected))
    assert answer.headers["etag"] == etag


@pytest.mark.parametrize(
    "value",
    ["bytes=2-1", "bytes=-", "bytes=a-b", "bytes=1-2,4-5", "bytes=", "bytes", "lines=1-2", "bytes=1--2", "bytes=+1-2",
     "bytes=1.0-2", "bytes=0x1-2", "bytes=١-٢", "", "bytes 1-2", "bytes=1-2;q=1", f"bytes={HUGE}-1"],
)  # fmt: skip
def test_a_range_that_cannot_be_read_is_ignored(
    shared_client: TestClient, whole: tuple[str, bytes, str], value: str
) -> None:
    path, content, _ = whole
    answer = shared_client.get(path, headers={"range": value.encode()})
    assert (answer.status_code, answer.content) == (200, content)


@pytest.mark.parametrize(
    "value", ["bytes={size}-", "bytes={size}-{size}", "bytes=-0", f"bytes={HUGE}-", "bytes=999999999999-"]
)
def test_a_range_behind_the_end_is_416_and_says_the_size(
    shared_client: TestClient, whole: tuple[str, bytes, str], value: str
) -> None:
    path, content, _ = whole
    answer = shared_client.get(path, headers={"range": value.format(size=len(content))})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(content)}"
    assert answer.json()["code"] == "range-not-satisfiable"


@pytest.mark.parametrize(
    ("validator", "status"),
    [("{etag}", 206), ('"x"', 200), ("W/{etag}", 200), ("Sat, 21 Nov 2026 05:00:00 GMT", 200), ("*", 200)],
)
def test_if_range_gives_the_part_only_of_this_version(
    shared_client: TestClient, whole: tuple[str, bytes, str], validator: str, status: int
) -> None:
    path, _, etag = whole
    headers = {"range": "bytes=1-2", "if-range": validator.format(etag=etag)}
    assert shared_client.get(path, headers=headers).status_code == status


def test_head_knows_no_ranges(shared_client: TestClient, whole: tuple[str, bytes, str]) -> None:
    path, content, _ = whole
    answer = shared_client.head(path, headers={"range": "bytes=1-2"})
    assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(content)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ranges_reassemble_to_the_whole(
    shared_client: TestClient, whole: tuple[str, bytes, str], data: st.DataObject
) -> None:
    path, content, etag = whole
    cuts = sorted(data.draw(st.sets(st.integers(1, len(content) - 1), max_size=6)))
    parts = [
        shared_client.get(path, headers={"range": f"bytes={start}-{stop - 1}", "if-range": etag}).content
        for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True)
    ]
    assert b"".join(parts) == content


@settings(max_examples=60, deadline=None)
@given(value=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_no_range_header_ever_gets_a_500(shared_client: TestClient, whole: tuple[str, bytes, str], value: str) -> None:
    path, _, _ = whole
    for header in ("range", "if-range", "if-none-match", "if-match"):
        headers = {"range": "bytes=0-1"} | {header: f"bytes={value}"}
        assert shared_client.get(path, headers=headers).status_code < 500
