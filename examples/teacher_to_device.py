"""A teacher's whole way: trained, uploaded, refined, promoted, and handed to three devices as ONNX models.

    python examples/teacher_to_device.py --url http://127.0.0.1:8000 --key ww_...

The people are synthetic, rendered here; a small teacher is trained on them here (needs the `train` extra),
everything else the service does. Uploads go on where a cut connection left them, jobs carry an idempotency key,
events are followed across reconnects: so servers and workers may be killed and started again underneath, and the
script ends the same. Uses nothing but the HTTP interface, the standard library, and onnxruntime where a device would.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnxruntime

from chains.data.images import ImageSet
from chains.data.synthetic import PeopleSettings, gallery_images, query_images, train_images, write_market1501
from chains.ranking import rank_sets

HEIGHT, WIDTH = 64, 32  # pixels; small, so that the whole way takes minutes on two cores
PEOPLE = PeopleSettings(train_identities=64, test_identities=24, height=HEIGHT, width=WIDTH)
RIGHTS = {"license": "Apache-2.0", "terms": "any", "consent_basis": "synthetic"}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PART_BYTES = 1024 * 1024
SHOWN = ("state", "stage", "step", "steps", "eta_s", "losses", "early_map", "attempt", "error")
CHECKED = ("architecture", "width", "input", "report")
PATIENCE_S = 600  # for servers that are away, and between two signs of life of a job


class Failed(Exception):
    """The way ends here; the message says why."""


@dataclass(frozen=True)
class Api:
    """The service at `url`, asked as the owner of `key`. Waits for servers that are away or overloaded."""

    url: str
    key: str | None

    def call(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """The answer, read whole. Raises `Failed` with the service's own words."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self.open(method, path, body, headers)
                content = answer.read()
                if answer.status < 500 and answer.status != 429:
                    break
                trouble = f"{answer.status} {content[:300].decode(errors='replace')}"
            except (OSError, http.client.HTTPException) as error:
                trouble = str(error) or type(error).__name__
            if time.monotonic() > deadline:
                raise Failed(f"{method} {path}: {trouble}")
            time.sleep(1)
        if answer.status >= 400:
            raise Failed(f"{method} {path} answered {answer.status}: {content[:2000].decode(errors='replace')}")
        return answer, content

    def json(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Any:
        content = self.call(method, path, body, {"Accept": "application/json", **(headers or {})})[1]
        return json.loads(content) if content else None

    def open(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """The answer, its body unread."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=30)
        sent: dict[str, str] = {"Connection": "close", **(headers or {})}
        if self.key:
            sent["Authorization"] = f"Bearer {self.key}"
        if body is not None and not isinstance(body, bytes):
            body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        connection.request(method, parts.path.rstrip("/") + path, body, sent)
        return connection.getresponse()


def upload(api: Api, path: str, content: bytes) -> None:
    """Send a file a part at a time, from where the service says it is, until the service has it all."""
    while True:
        offset = int(api.call("HEAD", path)[0].headers["Upload-Offset"])
        part = content[offset : offset + PART_BYTES]
        headers = {"Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
        try:
            answer = api.open("PATCH", path, part, headers)
            words = answer.read()
        except (OSError, http.client.HTTPException):
            time.sleep(1)
            continue
        if answer.status == 202 or (answer.status == 409 and not part):  # 409: it is whole, and its answer was lost
            return
        if answer.status not in (204, 409, 408, 429) and answer.status < 500:
            raise Failed(f"PATCH {path} answered {answer.status}: {words[:2000].decode(errors='replace')}")
        if answer.status != 204:
            time.sleep(1)


def wait_until_checked(api: Api, path: str) -> dict[str, Any]:
    """The teacher or data set, once a worker has looked at it. Raises `Failed` when it was refused."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found: dict[str, Any] = api.json("GET", path)
        if found["state"] == "ready":
            return found
        if found["state"] == "refused" or time.monotonic() > deadline:
            raise Failed(f"{path} is {found['state']}: {found['reason']}")
        time.sleep(0.5)


def follow(api: Api, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, data) of every event of a job, each once, until the job has ended."""
    after, deadline = "0", time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            answer = api.open("GET", f"/jobs/{job}/events", headers={"Last-Event-ID": after})
            kind = data = ""
            for line in (raw.decode().rstrip("\r\n") for raw in answer):
                name, _, value = line.partition(": ")
                if name == "id":
                    after = value
                elif name == "event":
                    kind = value
                elif name == "data":
                    data = value
                elif not line and data:
                    deadline = time.monotonic() + PATIENCE_S
                    yield kind, json.loads(data)
                    kind = data = ""
            if api.json("GET", f"/jobs/{job}")["state"] in ("succeeded", "failed", "cancelled"):
                return
        except (OSError, http.client.HTTPException):
            time.sleep(1)
    raise Failed(f"job {job} gave no sign of life for {PATIENCE_S} s")


def train_teacher(folder: Path, steps: int) -> Path:
    """A small teacher as a safetensors file. Torch is needed here and nowhere else."""
    from chains.chain import InputSpec
    from chains.data.batches import BatchRecipe
    from chains.export import origin, save_trained
    from chains.train import Run, TrainRecipe, every, train_alone
    from chains.width import Width

    spec = InputSpec(HEIGHT, WIDTH, (MEAN[0], MEAN[1], MEAN[2]), (STD[0], STD[1], STD[2]))
    recipe = TrainRecipe(steps, lr=2e-3, precision="bfloat16", batch=BatchRecipe(16, 4))
    trained = train_alone("resnet18", Width(16), train_images(PEOPLE), spec, recipe, 0, Run(report=every(100, print)))
    path = folder / "teacher.safetensors"
    save_trained(trained, origin("teacher", trained.model, spec, RIGHTS["license"]), path)
    return path


def pack_people(folder: Path) -> Path:
    """The people as a zip of a Market-1501-style folder."""
    write_market1501(folder / "people", PEOPLE)
    path = folder / "people.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted((folder / "people").rglob("*.jpg")):
            archive.write(file, file.relative_to(folder / "people"))
    return path


def announce(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


def bring(api: Api, name: str, teacher: Path, people: Path) -> None:
    """Register and upload teacher and data set; wait until workers have checked both."""
    send_teacher(api, name, teacher)
    send_people(api, name, people)
    for path in (f"/teachers/{name}", f"/datasets/{name}"):
        print_checked(api, path)


def send_teacher(api: Api, name: str, file: Path) -> str:
    """Register and upload a teacher; the sha256 of its file."""
    weights = file.read_bytes()
    announced = announce(weights)
    api.json("POST", "/teachers", {"name": name, **announced, **RIGHTS})
    upload(api, f"/teachers/{name}/weights", weights)
    return str(announced["sha256"])


def send_people(api: Api, name: str, file: Path) -> None:
    """Register and upload a data set."""
    archive = file.read_bytes()
    source = {"kind": "archive", **announce(archive)}
    api.json("POST", "/datasets", {"name": name, "source": source, "layout": "market1501", **RIGHTS})
    upload(api, f"/datasets/{name}/archive", archive)


def print_checked(api: Api, path: str) -> None:
    """What a check found, once a worker has made it."""
    found = wait_until_checked(api, path)
    print(f"{path}: {json.dumps({name: found[name] for name in CHECKED if name in found})[:300]}")


def refine(api: Api, name: str, steps: int, processes: int) -> dict[str, Any]:
    """Ask for the refinement, watch it, and return its result."""
    request = {
        "name": name, "teacher": name, "dataset": name, "steps": steps, "narrowest": "4", "rungs": 4,
        "precision": "bfloat16", "processes": processes, "evaluation": {"calibration_images": 256},
    }  # fmt: skip
    return finished(api, "refine", request)


def finished(api: Api, kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for a job, watch it, and return its result. Raises `Failed` with the job's own words."""
    key = {"Idempotency-Key": f"{kind}-{request['name']}"}  # asking again after a lost answer asks for nothing new
    job = api.json("POST", "/jobs", {"kind": kind, "request": request}, key)["id"]
    print(f"job {job}: {kind}")
    for event, data in follow(api, job):
        if event != "log":  # what the program on the worker says; GET /jobs/{id}/log has it all
            print(f"  {event}: {json.dumps({name: data[name] for name in SHOWN if name in data})}", flush=True)
    ended: dict[str, Any] = api.json("GET", f"/jobs/{job}")
    if ended["state"] != "succeeded":
        raise Failed(f"job {job} {ended['state']}: {ended['error']}")
    return dict(ended["result"])


def devices(frontier: Mapping[str, Any]) -> list[dict[str, int]]:
    """The limits of three devices: one fits the narrowest width, one a middle one, one all."""
    widths = frontier["widths"]
    narrow, middle, wide = (widths[index]["costs"] for index in (0, len(widths) // 2, -1))
    return [
        {"max_macs": narrow["macs"]},
        {"max_artifact_bytes": middle["artifact_bytes"]},
        {"max_memory_bytes": wide["memory_bytes_bound"]},
    ]


def run_models(api: Api, chain: str) -> list[float]:
    """Three devices fetch their models and search together: mAP of each one's queries in the widest one's gallery."""
    queries, gallery = query_images(PEOPLE), gallery_images(PEOPLE)
    models = []
    for limits in devices(api.json("GET", f"/chains/{chain}/frontier")):
        answer, content = api.call("POST", "/models", {"limits": limits})
        if answer.headers["Widthwise-Chain"] != chain:
            raise Failed(f"the alias stable answered with {answer.headers['Widthwise-Chain']}, not with {chain}")
        print(f"device with {limits}: width {answer.headers['Widthwise-Width']}, {len(content):,} bytes")
        models.append(onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]))
    found = embed(models[-1], gallery)
    return [rank_sets(embed(model, queries), found, queries, gallery).map for model in models]


def embed(model: Any, images: ImageSet) -> np.ndarray[Any, np.dtype[np.float32]]:
    pixels = (images.images.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    embeddings: np.ndarray[Any, np.dtype[np.float32]] = model.run(
        None, {"images": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
    )[0]
    return embeddings


def main() -> None:
    options = parse()
    api = Api(options.url, options.key)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher = options.teacher or train_teacher(folder, options.teacher_steps)
        bring(api, options.name, teacher, pack_people(folder))
    result = refine(api, options.name, options.steps, options.processes)
    print(f"chain {options.name}: {json.dumps(result)[:600]}")
    api.json("PUT", f"/chains/{options.name}/aliases/stable", {})
    maps = run_models(api, options.name)
    print("mAP of the three devices in the widest one's gallery: " + ", ".join(f"{value:.1f}" for value in maps))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default=os.environ.get("WIDTHWISE_KEY"), help="admin key; default WIDTHWISE_KEY")
    parser.add_argument("--name", default="platform", help="of teacher, data set and chain")
    parser.add_argument("--teacher", type=Path, help="a teacher file made here before, instead of training one")
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200, help="of the refinement")
    parser.add_argument("--processes", type=int, default=1, help="torchrun processes on the worker")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"teacher_to_device: {failure}")
