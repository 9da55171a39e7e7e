"""The demo: three devices with different limits ask a running service for models and search for people together.

The devices' limits come from the service's own frontier. Each model runs in onnxruntime over synthetic people that the
demo chain was not trained on. All models embed into one space, so the last table can let the camera with the smallest
model search the gallery of the largest.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from chains.data.images import ImageSet
from chains.data.synthetic import PeopleSettings, gallery_images, query_images
from chains.ranking import Ranking, rank_sets

Floats = NDArray[np.float32]
BATCH = 64
TIMEOUT_S = 60
TEST_IDENTITIES = 100


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class Device:
    """A made-up device and the one limit it states."""

    name: str
    limit: str
    allowed: int


@dataclass(frozen=True, eq=False)
class Delivery:
    """What a device got, and how long it took from before connecting to the first and the last byte of the file."""

    device: Device
    manifest: dict[str, Any]
    content: bytes
    first_byte_ms: float
    last_byte_ms: float


@dataclass(frozen=True, eq=False)
class Embedded:
    """Query and gallery as one model sees them, in the common space."""

    queries: Floats
    gallery: Floats


def run_demo(url: str, key: str | None = None) -> str:
    """Run the demo against the service at `url`, with an API key where it asks for one, and return its tables. Raises
    `DemoFailed`."""
    frontier = _get_json(url, "/chains/stable/frontier", key)
    deliveries = [fetch(url, device, key) for device in devices(frontier)]
    image = deliveries[0].manifest["image"]
    people = PeopleSettings(test_identities=TEST_IDENTITIES, height=image["height"], width=image["width"])
    queries, gallery = query_images(people), gallery_images(people)
    embedded = [embed(delivery, queries, gallery) for delivery in deliveries]
    matrix = [[rank_sets(a.queries, b.gallery, queries, gallery) for b in embedded] for a in embedded]
    return "\n".join(
        [
            f"Chain {frontier['chain']}: {len(queries)} queries, {len(gallery)} gallery images of synthetic people.\n",
            table(_summary(deliveries, [row[index] for index, row in enumerate(matrix)])),
            "\nmAP in percent when the camera of the row searches the gallery of the column, one embedding space:\n",
            table(_cross(deliveries, matrix)),
        ]
    )


def devices(frontier: dict[str, Any]) -> list[Device]:
    """One device per end of the frontier and one in its middle, each bound by another kind of limit."""
    widths = frontier["widths"]
    narrow, middle, wide = (widths[index]["costs"] for index in (0, len(widths) // 2, -1))
    return [
        Device("battery camera", "max_macs", narrow["macs"]),
        Device("street camera", "max_artifact_bytes", middle["artifact_bytes"]),
        Device("edge box", "max_memory_bytes", wide["memory_bytes_bound"]),
    ]


def fetch(url: str, device: Device, key: str | None = None) -> Delivery:
    """Ask for a model as a device would: one call for the bytes, one for the manifest."""
    started = time.perf_counter()
    response = _request(url, "POST", "/models", key, {"limits": {device.limit: device.allowed}})
    head = response.read(1)
    first = time.perf_counter()
    content = head + response.read()
    last = time.perf_counter()
    manifest = _get_json(url, response.headers["Location"], key)
    return Delivery(device, manifest, content, 1000 * (first - started), 1000 * (last - started))


def embed(delivery: Delivery, queries: ImageSet, gallery: ImageSet) -> Embedded:
    """Run the delivered file over both sets. Raises `DemoFailed` without onnxruntime."""
    try:
        import onnxruntime  # only the demo runs models, the service does not
    except ImportError as error:
        raise DemoFailed("the demo runs models: pip install onnxruntime") from error
    session = onnxruntime.InferenceSession(delivery.content, providers=["CPUExecutionProvider"])
    return Embedded(*(_run(session, delivery.manifest["image"], images) for images in (queries, gallery)))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with aligned columns; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _run(session: Any, image: dict[str, Any], images: ImageSet) -> Floats:
    mean, std = (np.array(image[name], np.float32) for name in ("mean", "std"))
    outputs = []
    for start in range(0, len(images), BATCH):
        pixels = images.images[start : start + BATCH].astype(np.float32) / np.float32(255)
        batch = np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2))
        outputs.append(session.run(None, {"images": batch})[0])
    return np.concatenate(outputs)


def _summary(deliveries: Sequence[Delivery], rankings: Sequence[Ranking]) -> list[list[str]]:
    head = ["device", "limit", "width", "MACs", "bytes", "ms to first byte", "to last", "Rank-1 %", "mAP %"]
    return [head, *(_line(delivery, ranking) for delivery, ranking in zip(deliveries, rankings, strict=True))]


def _line(delivery: Delivery, ranking: Ranking) -> list[str]:
    return [
        delivery.device.name,
        f"{delivery.device.limit} {delivery.device.allowed:,}",
        delivery.manifest["width"],
        f"{delivery.manifest['costs']['macs']:,}",
        f"{len(delivery.content):,}",
        f"{delivery.first_byte_ms:.1f}",
        f"{delivery.last_byte_ms:.1f}",
        f"{ranking.rank(1):.1f}",
        f"{ranking.map:.1f}",
    ]


def _cross(deliveries: Sequence[Delivery], matrix: Sequence[Sequence[Ranking]]) -> list[list[str]]:
    names = [str(delivery.manifest["width"]) for delivery in deliveries]
    lines = zip(names, matrix, strict=True)
    return [["query \\ gallery", *names], *([name, *(f"{cell.map:.1f}" for cell in row)] for name, row in lines)]


def _get_json(url: str, path: str, key: str | None) -> dict[str, Any]:
    answer: dict[str, Any] = json.load(_request(url, "GET", path, key))
    return answer


def _request(url: str, method: str, path: str, key: str | None, body: object = None) -> http.client.HTTPResponse:
    """The answer, its body unread. Raises `DemoFailed` when nobody answers, or with the service's own words."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DemoFailed(f"'{url}' is no http URL")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
    headers = {"Connection": "close"} | ({"Content-Type": "application/json"} if body is not None else {})
    if key is not None:
        if not (key.isascii() and key.isprintable()):
            raise DemoFailed("the API key has characters that no header can carry; give it as it was shown")
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request(
            method, parts.path.rstrip("/") + path, json.dumps(body) if body is not None else None, headers
        )
        response = connection.getresponse()
    except OSError as error:
        raise DemoFailed(f"no service answers at {url} ({error}); start one with `widthwise serve`") from error
    if response.status >= 400:
        raise DemoFailed(f"{method} {path} answered {response.status}: {_words(response.read())}")
    return response


def _words(content: bytes) -> str:
    try:
        return str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
