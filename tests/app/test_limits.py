"""Every answer fits its limits, counted again over the ONNX graph; and more is never less."""

from __future__ import annotations

from math import prod
from typing import Any

import onnx
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper, shape_inference

LIMITS = {
    "max_macs": "macs",
    "max_flops": "flops",
    "max_params": "params",
    "max_artifact_bytes": "artifact_bytes",
    "max_peak_activation_bytes": "peak_activation_bytes",
    "max_memory_bytes": "memory_bytes_bound",
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"opset": 11},
    {"opset": 18, "normalize": False},
    {"embedding": "native"},
    {"preprocess": "in-graph"},
    {"preprocess": "in-graph", "embedding": "native", "opset": 13},
]


def shapes_at_batch_1(model: onnx.ModelProto) -> dict[str, list[int]]:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def recount(content: bytes) -> dict[str, int]:
    """MACs of every multiplying node, float elements of the initialisers, bytes of the file."""
    model = onnx.load_from_string(content)
    initialisers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shapes = shapes_at_batch_1(model)
    macs = 0
    for node in model.graph.node:
        assert node.op_type not in {"MatMul", "Gemm", "Einsum", "ConvTranspose"}, "count these too"
        if node.op_type == "Conv":
            weight = initialisers[node.input[1]]
            macs += prod(shapes[node.output[0]]) * prod(weight.shape[1:])  # (out, in / groups, kh, kw)
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    params = sum(prod(tensor.dims) for tensor in floats)
    return {"macs": macs, "flops": 2 * macs, "params": params, "artifact_bytes": len(content)}


def frontier(client: TestClient) -> list[dict[str, Any]]:
    widths: list[dict[str, Any]] = client.get("/chains/pico/frontier").json()["widths"]
    return widths


def test_the_frontier_is_what_a_recount_finds(shared_client: TestClient) -> None:
    for width in frontier(shared_client):
        content = shared_client.post("/models", json={"limits": {"max_macs": width["costs"]["macs"]}}).content
        counted = recount(content)
        assert counted == {name: width["costs"][name] for name in counted}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_answer_fits_its_limits_when_recounted(shared_client: TestClient, data: st.DataObject) -> None:
    largest = frontier(shared_client)[-1]["costs"]
    limits = data.draw(
        st.fixed_dictionaries(
            {}, optional={limit: st.integers(1, 2 * largest[cost]) for limit, cost in LIMITS.items()}
        ).filter(bool)
    )
    answer = shared_client.post("/models", json={"limits": limits, **data.draw(st.sampled_from(OPTIONS))})
    if answer.status_code == 422:
        problem = answer.json()
        assert problem["code"] == "budget-too-small"
        assert problem["requested"] == limits[problem["limit"]] < problem["smallest_available"]
        return
    assert answer.status_code == 200
    counted = recount(answer.content)
    stated = {LIMITS[limit]: allowed for limit, allowed in limits.items()}
    for cost, count in counted.items():
        assert int(answer.headers[f"widthwise-{cost.replace('_', '-')}"]) == count
        assert count <= stated.get(cost, count)
    for cost in ("peak_activation_bytes", "memory_bytes_bound"):
        assert int(answer.headers[f"widthwise-{cost.replace('_', '-')}"]) <= stated.get(cost, 2**63)
    assert int(answer.headers["widthwise-memory-bytes-bound"]) >= 2.7 * 4 * counted["params"]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_larger_limit_never_gives_a_narrower_model(shared_client: TestClient, data: st.DataObject) -> None:
    limit = data.draw(st.sampled_from(sorted(LIMITS)))
    largest = frontier(shared_client)[-1]["costs"][LIMITS[limit]]
    low, high = sorted(data.draw(st.lists(st.integers(1, 2 * largest), min_size=2, max_size=2)))
    options = data.draw(st.sampled_from(OPTIONS))
    answers = [
        shared_client.post(
            "/models", json={"limits": {limit: allowed}, **options}, headers={"accept": "application/json"}
        )
        for allowed in (low, high)
    ]
    if answers[0].status_code == 422:
        return
    narrow, wide = (answer.json()["costs"]["macs"] for answer in answers)
    assert narrow <= wide


@pytest.mark.parametrize("limit", sorted(LIMITS))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_limit_is_met_to_the_unit(shared_client: TestClient, limit: str, options: dict[str, Any]) -> None:
    """Exactly what a model costs is enough for it; one less is not. Costs are those of the file with these options."""
    as_json = {"accept": "application/json"}
    widest = shared_client.post("/models", json={"limits": {"max_macs": 10**12}, **options}, headers=as_json).json()
    cost = widest["costs"][LIMITS[limit]]
    enough, too_little = (
        shared_client.post("/models", json={"limits": {limit: allowed}, **options}, headers=as_json).json()
        for allowed in (cost, cost - 1)
    )
    assert enough["id"] == widest["id"]
    if "costs" not in too_little:  # every width costs as much, as when the pixels themselves are the peak
        assert too_little["smallest_available"] == cost
    else:
        assert too_little["costs"]["macs"] < widest["costs"]["macs"]
