"""The published description of the interface is complete and true."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from openapi_spec_validator import validate

PROBES = {"/health/live", "/health/ready"}
AROUND_EVERY_HANDLER = {"401", "403", "429", "503"}
AROUND_EVERY_BODY = {"408", "413"}
BY_THE_HANDLER = {
    ("/models", "post"): {"400", "404", "406", "415", "422", "500"},
    ("/models/{model_id}", "get"): {"404", "410", "500"},
    ("/models/{model_id}/artifact", "get"): {"404", "410", "412", "416", "500"},
    ("/models/{model_id}/artifact", "head"): {"404", "410", "412", "500"},
    ("/chains", "get"): {"422", "500"},
    ("/chains/{name}", "get"): {"404", "500"},
    ("/chains/{name}/frontier", "get"): {"404", "500"},
    ("/chains/{name}", "delete"): {"404", "409", "500"},
    ("/chains/{name}/aliases/{alias}", "put"): {"400", "404", "409", "415", "422", "500"},
    ("/chains/{name}/offer", "put"): {"400", "404", "409", "415", "422", "500"},
    ("/chains/{name}/offer", "delete"): {"404", "500"},
    ("/aliases", "get"): {"500"},
    ("/aliases/{alias}", "delete"): {"404", "409", "500"},
    ("/aliases/{alias}/history", "get"): {"404", "422", "500"},
    ("/aliases/{alias}/rollback", "post"): {"400", "404", "409", "415", "422", "500"},
    ("/garbage-collection", "post"): {"400", "415", "422", "500"},
    ("/keys", "get"): {"422", "500"},
    ("/keys", "post"): {"400", "415", "422", "500"},
    ("/keys/{key_id}", "get"): {"404", "500"},
    ("/keys/{key_id}", "delete"): {"404", "500"},
    ("/keys/{key_id}/rotate", "post"): {"400", "404", "409", "415", "422", "500"},
    ("/audit", "get"): {"422", "500"},
    ("/metrics", "get"): {"500"},
}


@pytest.fixture(scope="module")
def description(shared_client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = shared_client.get("/openapi.json").json()
    return found


def test_it_is_valid_openapi(description: dict[str, Any]) -> None:
    validate(description)


def errors_of(operation: dict[str, Any]) -> dict[str, Any]:
    return {status: answer for status, answer in operation["responses"].items() if status >= "400"}


def test_every_error_is_documented_as_a_problem(description: dict[str, Any]) -> None:
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            for answer in errors_of(operation).values():
                schema = answer["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (path, method)
                assert "application/json" not in answer["content"], (path, method)


def test_every_operation_documents_what_is_answered_around_it(description: dict[str, Any]) -> None:
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            around = ({"403"} if path in PROBES else AROUND_EVERY_HANDLER) | (
                AROUND_EVERY_BODY if "requestBody" in operation else set()
            )
            assert around <= errors_of(operation).keys(), (path, method)
    assert errors_of(description["paths"]["/health/live"]["get"]).keys() == {"403"}
    assert errors_of(description["paths"]["/health/ready"]["get"]).keys() == {"403", "429", "503"}


@pytest.mark.parametrize(("path", "method"), BY_THE_HANDLER)
def test_an_operation_documents_its_own_errors(description: dict[str, Any], path: str, method: str) -> None:
    operation = description["paths"][path][method]
    around = AROUND_EVERY_HANDLER | (AROUND_EVERY_BODY if "requestBody" in operation else set())
    assert errors_of(operation).keys() == BY_THE_HANDLER[path, method] | around


def test_examples_are_requests_that_work(shared_client: TestClient, description: dict[str, Any]) -> None:
    examples = description["components"]["schemas"]["ModelIn"]["examples"]
    assert len(examples) >= 2
    for example in examples:
        answer = shared_client.post("/models", json=example)
        assert answer.status_code == 200, answer.text


def test_bytes_are_described_as_onnx(description: dict[str, Any]) -> None:
    for path, method in (("/models", "post"), ("/models/{model_id}/artifact", "get")):
        ok = description["paths"][path][method]["responses"]["200"]
        assert "application/onnx" in ok["content"]
        assert {"ETag", "Repr-Digest", "Widthwise-Width", "Widthwise-Memory-Bytes-Bound"} <= ok["headers"].keys()


def test_documented_headers_are_sent(client: TestClient, description: dict[str, Any]) -> None:
    body = {"limits": {"max_macs": 10**9}, "opset": 12}
    made = client.post("/models", json=body, headers={"accept": "application/json"})
    client.post("/models", json=body)  # now the digest is known
    path = f"{made.headers['location']}/artifact"
    answers = {
        ("/models", "post", "201"): made,
        ("/models", "post", "200"): client.post("/models", json=body),
        ("/models/{model_id}/artifact", "get", "200"): client.get(path),
        ("/models/{model_id}/artifact", "get", "206"): client.get(path, headers={"range": "bytes=0-1"}),
        ("/models/{model_id}/artifact", "get", "304"): client.get(path, headers={"if-none-match": "*"}),
        ("/models/{model_id}/artifact", "head", "200"): client.head(path),
        ("/models/{model_id}/artifact", "head", "304"): client.head(path, headers={"if-none-match": "*"}),
    }
    for (route, method, status), answer in answers.items():
        assert str(answer.status_code) == status
        documented = description["paths"][route][method]["responses"][status].get("headers", {})
        assert {name.lower() for name in documented} <= answer.headers.keys(), (route, method, status)
    assert "Content-Range" in description["paths"]["/models/{model_id}/artifact"]["get"]["responses"]["206"]["headers"]
