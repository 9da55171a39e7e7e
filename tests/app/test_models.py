"""POST /models and what can be fetched afterwards, over every kind of deployment."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.errors import DatabaseUnavailable
from app.services.provision import Provision
from chains import artifact, onnxfile
from chains.onnxfile import OnnxPlan
from chains.testing import contract_chain

ROOMY = {"limits": {"max_macs": 10**9}}
AS_JSON = {"accept": "application/json"}


@pytest.fixture(params=["SQLite and a folder", "PostgreSQL and S3"])
def deployed(request: pytest.FixtureRequest, make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    settings: dict[str, Any] = {}
    if request.param == "PostgreSQL and S3":
        request.getfixturevalue("s3_credentials")
        settings = {
            "database_url": request.getfixturevalue("postgres_url"),
            "storage_url": f"s3://test-{uuid.uuid4().hex}/widthwise",
            "s3_endpoint_url": request.getfixturevalue("s3_url"),
        }
    with TestClient(make_app(**settings)) as client:
        yield client


def digest_header(content: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def run(content: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(None, {"images": images})
    return np.asarray(embedding)


def some_images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 64, 32), dtype=np.float32)


def test_a_device_gets_a_model_that_runs(deployed: TestClient) -> None:
    answer = deployed.post("/models", json=ROOMY)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/onnx"
    assert int(answer.headers["content-length"]) == len(answer.content)
    onnx.checker.check_model(onnx.load_from_string(answer.content), full_check=True)
    embedding = run(answer.content, some_images())
    assert embedding.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


def test_headers_say_what_was_chosen_and_what_it_costs(deployed: TestClient) -> None:
    headers = deployed.post("/models", json=ROOMY).headers
    widest = deployed.get("/chains/stable/frontier").json()["widths"][-1]
    assert headers["widthwise-width"] == widest["width"] == "8x2-4-8"
    assert headers["widthwise-chain"] == "pico"
    for name in ("macs", "flops", "params", "artifact_bytes", "peak_activation_bytes", "memory_bytes_bound"):
        assert int(headers["widthwise-" + name.replace("_", "-")]) == widest["costs"][name]
    model_id = headers["etag"].strip('"')
    assert re.fullmatch("[0-9a-f]{64}", model_id)
    assert headers["cache-control"] == "no-store"
    assert headers["location"] == f"/models/{model_id}"
    assert headers["content-disposition"] == f'attachment; filename="resnet18_w8_pico_{model_id[:8]}.onnx"'


def test_what_location_and_artifact_lead_to_is_the_same_model(deployed: TestClient) -> None:
    answer = deployed.post("/models", json=ROOMY)
    manifest = deployed.get(answer.headers["location"]).json()
    assert f'"{manifest["id"]}"' == answer.headers["etag"]
    fetched = deployed.get(manifest["artifact"])
    assert fetched.content == answer.content
    assert fetched.headers["etag"] == answer.headers["etag"]
    assert fetched.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert manifest["artifact_sha256"] == hashlib.sha256(answer.content).hexdigest()


def test_the_digest_is_known_after_one_full_download_and_true(deployed: TestClient) -> None:
    first, second = (deployed.post("/models", json=ROOMY) for _ in range(2))
    assert "repr-digest" not in first.headers
    assert second.headers["repr-digest"] == digest_header(first.content)
    ranged = deployed.get(first.headers["content-location"], headers={"range": "bytes=5-9"})
    assert ranged.headers["repr-digest"] == digest_header(first.content)


def test_a_manifest_on_request_is_201_once_and_200_after(deployed: TestClient) -> None:
    answers = [deployed.post("/models", json=ROOMY, headers=AS_JSON) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert answers[0].json() == answers[1].json()
    assert answers[0].headers["location"] == f"/models/{answers[0].json()['id']}"
    assert answers[0].json()["artifact_sha256"] is None


def test_the_same_request_gives_the_same_bytes_on_every_deployment(
    make_app: Callable[..., FastAPI], tmp_path: Path, deployed: TestClient
) -> None:
    fresh = TestClient(make_app(data_dir=tmp_path / "a fresh machine"))
    onnxfile._layouts._layouts.clear()
    body = {**ROOMY, "opset": 13, "embedding": "native"}
    answers = [client.post("/models", json=body) for client in (deployed, deployed, fresh)]
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["etag"] for answer in answers}) == 1


def test_the_same_bytes_come_after_every_cache_is_lost(deployed: TestClient) -> None:
    before = deployed.post("/models", json=ROOMY)
    deployed.app.state.services.registry.forget_loaded()  # type: ignore[attr-defined]
    onnxfile._layouts._layouts.clear()
    after = deployed.get(before.headers["content-location"])
    assert after.content == before.content


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "application/onnx"),
        ("*/*", "application/onnx"),
        ("", "application/onnx"),
        ("application/*", "application/onnx"),
        ("application/onnx, application/json;q=0.5", "application/onnx"),
        ("application/json", "application/json"),
        ("APPLICATION/JSON;Q=0.8", "application/json"),
        ("application/json, */*;q=0.1", "application/json"),
        ("application/onnx;q=0, */*", "application/json"),
        ("text/html, application/json;q=0.9", "application/json"),
    ],
)
def test_the_accept_header_chooses(shared_client: TestClient, accept: str | None, media_type: str) -> None:
    headers = {} if accept is None else {"accept": accept}
    answer = shared_client.post("/models", json=ROOMY, headers=headers)
    assert answer.status_code < 300
    assert answer.headers["content-type"] == media_type


@pytest.mark.parametrize(
    ("agent", "accept", "media_type"),
    [
        ("curl/8.14.1", "application/json", "application/onnx"),  # what `curl --json` sends
        ("curl/8.14.1", "*/*", "application/onnx"),
        ("curl/8.14.1", "application/json;q=1", "application/json"),
        ("python-httpx2/2.16", "application/json", "application/json"),
        ("", "application/json", "application/json"),
    ],
)
def test_what_curl_says_of_its_own_accord_is_no_wish(
    shared_client: TestClient, agent: str, accept: str, media_type: str
) -> None:
    answer = shared_client.post("/models", json=ROOMY, headers={"user-agent": agent, "accept": accept})
    assert answer.headers["content-type"] == media_type
    assert answer.headers["vary"] == "Accept, User-Agent"


def test_the_alias_stable_answers_when_no_chain_is_named(shared_client: TestClient) -> None:
    etags = {shared_client.post("/models", json=ROOMY | extra).headers["etag"]
             for extra in ({}, {"chain": "stable"}, {"chain": "pico"})}  # fmt: skip
    assert len(etags) == 1


def test_options_make_other_models(shared_client: TestClient) -> None:
    variants = [{}, {"opset": 11}, {"embedding": "native"}, {"normalize": False}, {"preprocess": "in-graph"}]
    answers = [shared_client.post("/models", json=ROOMY | variant) for variant in variants]
    assert len({answer.headers["etag"] for answer in answers}) == len(variants)
    for answer in answers:
        rebuilt = shared_client.get(answer.headers["content-location"])
        assert rebuilt.content == answer.content


def manifest_of(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/models", json=body, headers=AS_JSON)
    manifest: dict[str, Any] = answer.json()
    return manifest


def lift(native: np.ndarray, manifest: dict[str, Any]) -> np.ndarray:
    lifted = native[:, manifest["lift"]["channels"]]
    return np.asarray(lifted / np.linalg.norm(lifted, axis=1, keepdims=True))


@pytest.mark.parametrize("stem", [2, 4, 6, 8])
def test_a_native_embedding_lifted_by_the_manifest_is_the_common_one(shared_client: TestClient, stem: int) -> None:
    costs = {width["width"]: width["costs"] for width in shared_client.get("/chains/pico/frontier").json()["widths"]}
    body = {"limits": {"max_macs": costs[f"{stem}x2-4-8"]["macs"]}}
    native_body = body | {"embedding": "native"}
    manifest = manifest_of(shared_client, native_body)
    assert manifest["width"] == f"{stem}x2-4-8"
    native, common = (run(shared_client.post("/models", json=b).content, some_images()) for b in (native_body, body))
    assert native.shape[1] == manifest["lift"]["native_dim"] == manifest["output"]["shape"][1]
    np.testing.assert_allclose(lift(native, manifest), common, atol=1e-6)
    scaled = native * np.sqrt(manifest["lift"]["part_sizes"])
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    np.testing.assert_allclose(scaled @ scaled.T, common @ common.T, atol=1e-5)


@pytest.mark.parametrize("embedding", ["common", "native"])
@pytest.mark.parametrize("limit", [300_000, 10**9])
def test_manifest_and_file_agree_about_the_embedding(shared_client: TestClient, embedding: str, limit: int) -> None:
    body = {"limits": {"max_macs": limit}, "embedding": embedding}
    manifest = manifest_of(shared_client, body)
    model = onnx.load_from_string(shared_client.post("/models", json=body).content)
    written = {entry.key: entry.value for entry in model.metadata_props}
    assert written["reid.embedding_space"] == manifest["embedding_space"]
    assert written["reid.embedding_dim"] == str(manifest["output"]["shape"][1])
    assert written["widthwise.width"] == manifest["width"]
    (output,) = model.graph.output
    assert output.name == manifest["output"]["name"]
    assert output.type.tensor_type.shape.dim[1].dim_value == manifest["output"]["shape"][1]


def test_the_manifest_has_the_cut_offs_of_its_width_against_every_width(shared_client: TestClient) -> None:
    manifest = manifest_of(shared_client, {"limits": {"max_macs": 300_000}})
    cross = shared_client.get("/chains/pico/frontier").json()["cross_width"]
    assert manifest["width"] == cross["widths"][0]
    assert manifest["thresholds"]["space"] == manifest["lift"]["space"] == "pico-0"
    expected = [
        {"gallery_width": width, "false_accept_rate": rate["false_accept_rate"], "cosine": c, "true_accept": t}
        for rate in cross["thresholds"]
        for width, c, t in zip(cross["widths"], rate["cosine"][0], rate["true_accept"][0], strict=True)
        if c is not None
    ]
    assert manifest["thresholds"]["cut_offs"] == expected
    assert len(expected) == 6  # the narrowest against itself is not known


@pytest.mark.parametrize("embedding", ["common", "native"])
def test_manifest_and_file_agree_about_the_cut_offs(shared_client: TestClient, embedding: str) -> None:
    body = ROOMY | {"embedding": embedding}
    manifest = manifest_of(shared_client, body)
    model = onnx.load_from_string(shared_client.post("/models", json=body).content)
    written = {entry.key: entry.value for entry in model.metadata_props}
    by_rate = json.loads(written["reid.thresholds"])
    found = {(c["gallery_width"], c["false_accept_rate"]): c["cosine"] for c in manifest["thresholds"]["cut_offs"]}
    assert found == {(width, float(rate)): c for rate, cosines in by_rate.items() for width, c in cosines.items()}
    assert float(written["reid.threshold_far_1e-3"]) == found[manifest["width"], 0.001]


def test_a_native_embedding_below_full_width_has_cut_offs_for_what_it_is_lifted_to(shared_client: TestClient) -> None:
    bodies = [{"limits": {"max_macs": 300_000}, "embedding": embedding} for embedding in ("native", "common")]
    native, common = (manifest_of(shared_client, body) for body in bodies)
    assert native["thresholds"] == common["thresholds"]
    assert native["embedding_space"] != native["thresholds"]["space"] == common["embedding_space"]
    model = onnx.load_from_string(shared_client.post("/models", json=bodies[0]).content)
    assert not [entry.key for entry in model.metadata_props if entry.key.startswith("reid.threshold")]


@pytest.mark.parametrize("preprocess", ["none", "in-graph"])
def test_doing_what_the_manifest_says_to_pixels_feeds_the_model(shared_client: TestClient, preprocess: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 64, 32, 3), dtype=np.uint8)
    body = ROOMY | {"preprocess": preprocess}
    manifest = manifest_of(shared_client, body)
    mean, std = (np.array(manifest["image"][name], np.float32) for name in ("mean", "std"))
    prepared = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    images = pixels if manifest["input"]["layout"] == "NHWC" else np.ascontiguousarray(prepared)
    assert str(images.dtype) == manifest["input"]["dtype"]
    assert list(images.shape[1:]) == manifest["input"]["shape"][1:]
    reference = run(shared_client.post("/models", json=ROOMY).content, np.ascontiguousarray(prepared))
    np.testing.assert_allclose(run(shared_client.post("/models", json=body).content, images), reference, atol=1e-5)


def test_a_database_that_fails_while_the_digest_is_stored_costs_nobody_a_download(
    app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.services import provision

    class Failing(provision.Models):
        def set_artifact_digest(self, *_: str) -> None:
            raise DatabaseUnavailable("gone")

    monkeypatch.setattr(provision, "Models", Failing)
    answer = client.post("/models", json=ROOMY)
    assert len(answer.content) == int(answer.headers["content-length"])
    assert "repr-digest" not in client.post("/models", json=ROOMY).headers


def test_a_download_that_stops_half_way_teaches_no_digest(app: FastAPI) -> None:
    service: Provision = app.state.services.provision
    body = TestClient(app).post("/models", json=ROOMY, headers=AS_JSON).json()
    model = service.rebuild(service.recorded(body["id"]))
    chunks = service.stream(model)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert service.recorded(body["id"]).artifact_sha256 is None
    assert hashlib.sha256(b"".join(service.stream(model))).hexdigest() == service.recorded(body["id"]).artifact_sha256


def test_a_model_of_another_writer_version_is_gone(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    location = client.post("/models", json=ROOMY, headers=AS_JSON).headers["location"]
    monkeypatch.setattr(OnnxPlan, "model_id", property(lambda _: "f" * 64))
    for path in (location, f"{location}/artifact"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (410, "model-not-reproducible")


@pytest.mark.parametrize("architecture", ["resnet50_ibn_a", "mobilenetv2", "osnet", "vit_tiny"])
def test_every_family_is_served_by_budget(app: FastAPI, architecture: str) -> None:
    """Depthwise layers, gates, instance norms, heads: the device sees the same call and an ONNX file that fits."""
    chain = replace(contract_chain(architecture), name=architecture.replace("_", "-"))
    app.state.services.registry.publish(artifact.dump(chain))
    with TestClient(app) as client:
        name = chain.name
        frontier = client.get(f"/chains/{name}/frontier").json()["widths"]
        assert [row["width"] for row in frontier] == [str(width) for width in chain.ladder]
        for row in frontier:
            answer = client.post("/models", json={"chain": name, "limits": {"max_macs": row["costs"]["macs"]}})
            assert answer.status_code == 200
            assert answer.headers["widthwise-width"] == row["width"]
            assert len(answer.content) == row["costs"]["artifact_bytes"]
            shape = (2, 3, chain.input.height, chain.input.width)
            embeddings = run(answer.content, np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
            assert embeddings.shape == (2, chain.embedding_dim)
            assert np.isfinite(embeddings).all()
        below = client.post("/models", json={"chain": name, "limits": {"max_macs": frontier[0]["costs"]["macs"] - 1}})
        assert below.status_code == 422
        assert below.json()["smallest_available"] == frontier[0]["costs"]["macs"]
