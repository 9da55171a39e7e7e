"""The published description of the interface is complete and true."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from openapi_spec_validator import validate

ERRORS = {
    ("/models", "post"): {"400", "404", "406", "413", "415", "422", "500", "503"},
    ("/models/{model_id}", "get"): {"404", "410", "500", "503"},
    ("/models/{model_id}/artifact", "get"): {"404", "410", "412", "416", "500", "503"},
    ("/models/{model_id}/artifact", "head"): {"404", "410", "412", "500", "503"},
    ("/chains", "get"): {"422", "500", "503"},
    ("/chains/{name}", "get"): {"404", "500", "503"},
    ("/chains/{name}/frontier", "get"): {"404", "500", "503"},
    ("/health/live", "get"): set(),
    ("/health/ready", "get"): {"503"},
}


@pytest.fixture(scope="module")
def description(shared_client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = shared_client.get("/openapi.json").json()
    return found


def test_it_is_valid_openapi(description: dict[str, Any]) -> None:
    validate(description)


def test_every_operation_documents_its_errors_as_problems(description: dict[str, Any]) -> None:
    found = {(path, method): op for path, methods in description["paths"].items() for method, op in methods.items()}
    assert found.keys() == ERRORS.keys()
    for key, operation in found.items():
        errors = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
        assert errors.keys() == ERRORS[key], key
        for answer in errors.values():
            schema = answer["content"]["application/problem+json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Problem"}
            assert "application/json" not in answer["content"]


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
