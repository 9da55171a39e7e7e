"""What devices may send, by mistake or on purpose: every line must get a clear answer, and never a 500."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

FITS = {"max_macs": 10**9}
BODIES = [
    ("{}", 422, "request-invalid", "/limits"),
    ('{"limits": {}}', 422, "limits-invalid", None),
    ('{"limits": null}', 422, "request-invalid", "/limits"),
    ('{"limits": []}', 422, "request-invalid", "/limits"),
    ('{"limits": {"max_macs": null}}', 422, "limits-invalid", None),
    ('{"limits": {"max_macs": "5"}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": true}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": 1.5}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": 1e7}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": 0}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": -1}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": 9223372036854775808}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": ' + "9" * 4000 + "}}", 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": ' + "9" * 5000 + "}}", 400, "body-malformed", None),
    ('{"limits": {"max_macs": NaN}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": Infinity}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": 1e999}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_macs": [1]}}', 422, "request-invalid", "/limits/max_macs"),
    ('{"limits": {"max_mac": 5}}', 422, "request-invalid", "/limits/max_mac"),
    ('{"limits": {"a/b~": 5}}', 422, "request-invalid", "/limits/a~1b~0"),
    ('{"limits": {"\\ud800": 5}}', 422, "request-invalid", None),
    ('{"limits": {"max_macs": 1}}', 422, "budget-too-small", None),
    ('{"limits": {"max_flops": 1}}', 422, "budget-too-small", None),
    ('{"limits": {"max_params": 1}}', 422, "budget-too-small", None),
    ('{"limits": {"max_artifact_bytes": 1}}', 422, "budget-too-small", None),
    ('{"limits": {"max_peak_activation_bytes": 1}}', 422, "budget-too-small", None),
    ('{"limits": {"max_memory_bytes": 1}}', 422, "budget-too-small", None),
    ('{"limits": {"max_latency_ms": 5}}', 422, "latency-not-measurable-yet", None),
    ('{"limits": {"max_macs": 1000000000, "max_latency_ms": 5}}', 422, "latency-not-measurable-yet", None),
    ('{"limits": {"max_macs": 1000000000, "device_class": "nano"}}', 422, "latency-not-measurable-yet", None),
    ('{"limits": {"max_latency_ms": "5"}}', 422, "request-invalid", "/limits/max_latency_ms"),
    ('{"limits": {"max_latency_ms": 0}}', 422, "request-invalid", "/limits/max_latency_ms"),
    ('{"limits": {"max_latency_ms": NaN}}', 422, "request-invalid", "/limits/max_latency_ms"),
    ('{"limits": {"max_latency_ms": 1e999}}', 422, "request-invalid", "/limits/max_latency_ms"),
    ('{"limits": FITS, "task": "reid"}', 422, "request-invalid", "/task"),
    ('{"limits": FITS, "dtype": "float16"}', 422, "request-invalid", "/dtype"),
    ('{"limits": FITS, "chain": "nobody"}', 404, "chain-unknown", None),
    ('{"limits": FITS, "chain": ""}', 404, "chain-unknown", None),
    ('{"limits": FITS, "chain": "a\\u0000b"}', 404, "chain-unknown", None),
    ('{"limits": FITS, "chain": "../pico"}', 404, "chain-unknown", None),
    ('{"limits": FITS, "chain": "\\ud800"}', 422, "request-invalid", "/chain"),
    ('{"limits": FITS, "chain": "' + "x" * 64 + '"}', 422, "request-invalid", "/chain"),
    ('{"limits": FITS, "chain": null}', 422, "request-invalid", "/chain"),
    ('{"limits": FITS, "chain": 5}', 422, "request-invalid", "/chain"),
    ('{"limits": FITS, "opset": 10}', 422, "option-unsupported", None),
    ('{"limits": FITS, "opset": 19}', 422, "option-unsupported", None),
    ('{"limits": FITS, "opset": -1}', 422, "option-unsupported", None),
    ('{"limits": FITS, "opset": "17"}', 422, "request-invalid", "/opset"),
    ('{"limits": FITS, "opset": 17.0}', 422, "request-invalid", "/opset"),
    ('{"limits": FITS, "opset": true}', 422, "request-invalid", "/opset"),
    ('{"limits": FITS, "embedding": "teacher"}', 422, "request-invalid", "/embedding"),
    ('{"limits": FITS, "normalize": 1}', 422, "request-invalid", "/normalize"),
    ('{"limits": FITS, "normalize": "yes"}', 422, "request-invalid", "/normalize"),
    ('{"limits": FITS, "preprocess": "all"}', 422, "request-invalid", "/preprocess"),
    ("", 422, "request-invalid", ""),
    ("null", 422, "request-invalid", ""),
    ("[]", 422, "request-invalid", ""),
    ('"limits"', 422, "request-invalid", ""),
    ("5", 422, "request-invalid", ""),
    ("NaN", 422, "request-invalid", ""),
    ("{", 400, "body-malformed", None),
    ("limits=5", 400, "body-malformed", None),
    ('{"limits": FITS,}', 400, "body-malformed", None),
    ("[" * 30_000, 400, "body-malformed", None),
    ('{"limits":' * 6_000, 400, "body-malformed", None),
    ("[" * 2_000 + "]" * 2_000, 400, "body-malformed", None),
    (b'{"limits": "\xff\xfe"}', 400, "body-malformed", None),
    (b"\xff\xff\xff", 400, "body-malformed", None),
    (b"\x00" * 50, 400, "body-malformed", None),
    ('{"limits": {"max_macs": 1}}'.encode("utf-16"), 400, "body-malformed", None),
    ('{"limits": {"max_macs": 1}}'.encode("utf-32-le"), 400, "body-malformed", None),
    ('\ufeff{"limits": {"max_macs": 1}}', 422, "budget-too-small", None),
    ('{"limits": {"max_macs": 1, "max_macs": 1000000000}}', 400, "body-malformed", None),
    ('{"limits": {"max_macs": 1}, "limits": FITS}', 400, "body-malformed", None),
    ('{"limits": FITS, "x": {"y": 1, "\\u0079": 2}}', 400, "body-malformed", None),
    (" " * 70_000, 413, "body-too-large", None),
    ('{"limits": FITS, "chain": "' + "x" * 70_000 + '"}', 413, "body-too-large", None),
]


@pytest.mark.parametrize(("body", "status", "code", "pointer"), BODIES, ids=[str(body)[:60] for body, *_ in BODIES])
def test_a_bad_body_gets_a_clear_answer(
    shared_client: TestClient, body: str | bytes, status: int, code: str, pointer: str | None
) -> None:
    content = body.replace("FITS", json.dumps(FITS)) if isinstance(body, str) else body
    answer = shared_client.post("/models", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["code"] == code
    assert problem["detail"]
    if pointer is not None:
        assert pointer in [error["pointer"] for error in problem["errors"]]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "media-type-unsupported"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "media-type-unsupported"),
        ({"content-type": ""}, 415, "media-type-unsupported"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415, "media-type-unsupported"),
        ({"content-type": "application/json", "accept": "text/html"}, 406, "not-acceptable"),
        ({"content-type": "application/json", "accept": "*/*;q=0"}, 406, "not-acceptable"),
        ({"content-type": "application/json", "accept": "application/onnx;q=x"}, 406, "not-acceptable"),
    ],
)
def test_bad_headers_get_a_clear_answer(
    shared_client: TestClient, headers: dict[str, str], status: int, code: str
) -> None:
    answer = shared_client.post("/models", content=json.dumps({"limits": FITS}), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_accept_may_be_said_in_several_lines(shared_client: TestClient) -> None:
    headers = [("accept", "text/html"), ("accept", "application/json"), ("content-type", "application/json")]
    answer = shared_client.post("/models", content=json.dumps({"limits": FITS}), headers=headers)
    assert answer.headers["content-type"] == "application/json", answer.text


def test_a_body_without_announced_length_is_counted(shared_client: TestClient) -> None:
    pieces = (b" " * 10_000 for _ in range(10))
    answer = shared_client.post("/models", content=pieces, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")


def test_a_refused_limit_says_what_would_do(shared_client: TestClient) -> None:
    answer = shared_client.post("/models", json={"limits": {"max_macs": 1000, "max_params": 10**9}}).json()
    narrowest = shared_client.get("/chains/pico/frontier").json()["widths"][0]
    assert answer["limit"] == "max_macs"
    assert answer["requested"] == 1000
    assert answer["smallest_available"] == narrowest["costs"]["macs"]
    assert answer["chain"] == "pico"


def test_the_values_sent_are_not_repeated(shared_client: TestClient) -> None:
    answer = shared_client.post("/models", json={"limits": {"max_macs": "hunter2"}})
    assert "hunter2" not in answer.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NEARLY = st.fixed_dictionaries(
    {"limits": JSON | st.dictionaries(st.sampled_from(["max_macs", "max_latency_ms", "device_class", "x"]), JSON)},
    optional=dict.fromkeys(("chain", "opset", "embedding", "normalize", "preprocess", "x"), JSON),
)


@settings(max_examples=150, deadline=None)
@given(body=JSON | NEARLY)
def test_no_json_ever_gets_a_500(shared_client: TestClient, body: object) -> None:
    answer = shared_client.post("/models", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert answer.json()["code"]


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=200))
def test_no_bytes_ever_get_a_500(shared_client: TestClient, body: bytes) -> None:
    answer = shared_client.post("/models", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["code"]
