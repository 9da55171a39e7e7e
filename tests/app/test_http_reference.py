"""The HTTP page names everything there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.api.errors import HTTP_CODES, TABLE
from app.api.schemas import ModelIn
from app.services.limits import LimitsIn

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "http.md").read_text()


def test_every_path_is_on_the_page(shared_client: TestClient) -> None:
    for path, methods in shared_client.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in PAGE or (method == "head" and "`HEAD`" in PAGE)


@pytest.mark.parametrize("field", [*ModelIn.model_fields, *LimitsIn.model_fields])
def test_every_request_field_is_on_the_page(field: str) -> None:
    assert f"`{field}`" in PAGE


def test_every_error_code_is_on_the_page_with_its_status() -> None:
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith(("| 4", "| 5"))]
    documented = {(int(row[1]), code.strip("` ")) for row in rows for code in row[2].split(",")}
    expected = {(row.status, row.code) for row in TABLE.values()} | set(HTTP_CODES.items()) | {(422, "request-invalid")}
    assert documented == expected


def test_every_header_of_a_model_is_on_the_page(shared_client: TestClient) -> None:
    answer = shared_client.post("/models", json={"limits": {"max_macs": 10**9}})
    ours = [name for name in answer.headers if name.startswith("widthwise-")]
    assert len(ours) == 8
    for name in ours:
        assert f"`{name}`" in PAGE.lower()
