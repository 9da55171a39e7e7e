"""Checks a teacher's file and writes what it found, and the teacher in this project's own format.

    python -m chains.importers.check --file weights --out report.json --teacher teacher.safetensors

A refusal is an answer: the report says `refused` and why, and the command ends with 0. It is meant to run where it can
do no harm, because the file comes from somebody else: see `app.worker.sandbox`. `--declared` takes the architecture and
the input that the owner stated, as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from chains.atomic import write_whole
from chains.chain import InputSpec
from chains.errors import ChainsError, WeightsRefused
from chains.export import METADATA_KEY, Origin, origin, save_network
from chains.importers.containers import read_safetensors, read_torch, sniff
from chains.importers.people import people, require_sane, score
from chains.importers.recognise import recognise
from chains.importers.schemes import Pixels, Recognised, identity_neck
from chains.model import ReIDModel, normalise

USUAL_INPUT = InputSpec(256, 128, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of most of the field
FROZEN = "onnx"  # the architecture of a graph that cannot be refined
BATCH = 8
MOST_LISTED = 20  # names in a report
MAPS = 2  # images: maps are large


@dataclass(frozen=True)
class Declared:
    """What the owner of a file stated; `None`: nothing. size: height and width of images, where mean and std were not
    stated with them, as they are in `input`."""

    architecture: str | None = None
    input: InputSpec | None = None
    license: str = "unknown"
    size: tuple[int, int] | None = None

    @classmethod
    def parse(cls, stated: Mapping[str, Any]) -> Declared:
        made = cls(stated.get("architecture"), license=stated.get("license") or "unknown")
        found = stated.get("input")
        if not found:
            return made
        size = (found["height"], found["width"])
        if "mean" not in found:
            return replace(made, size=size)
        return replace(made, input=InputSpec(*size, tuple(found["mean"]), tuple(found["std"])))


def check(file: Path, declared: Declared, teacher: Path | None = None) -> dict[str, Any]:
    """The report on a file: JSON values. With `teacher`, a network that can be refined is also written there.

    Raises `WeightsRefused` with the reason, and `MemoryError`."""
    kind = sniff(file)
    if kind == "onnx":
        return {"state": "ready", "format": kind, **_check_frozen(file, declared)}
    state, metadata = read_safetensors(file) if kind == "safetensors" else (read_torch(file), {})
    mark = _origin(metadata)
    found = recognise(state, declared.architecture, None if mark is None else mark.architecture)
    return {"state": "ready", "format": kind, **_check_network(found, mark, declared, teacher)}


def answer(file: Path, declared: Declared, teacher: Path | None = None) -> dict[str, Any]:
    """As `check`, with a refusal as a report of its own."""
    try:
        return check(file, declared, teacher)
    except ChainsError as error:
        return {"state": "refused", "reason": str(error)}
    except MemoryError:
        size = file.stat().st_size
        return {"state": "refused", "reason": f"reading the {size:,} bytes takes more memory than the check may use"}


@torch.no_grad()
def _check_network(found: Recognised, mark: Origin | None, declared: Declared, teacher: Path | None) -> dict[str, Any]:
    model = found.model
    name, width = model.table.name, str(model.width)
    _require_declared(declared.architecture, name, found.assumed)
    if found.pretraining is not None:
        raise WeightsRefused(found.pretraining)
    spec, said = _input(found, mark, declared)
    shown = people(spec)
    if not found.neck:
        features = _in_batches(model, shown.pixels, spec, part=0)
        require_sane(features.numpy())
        identity_neck(model, features)
    embeddings = _in_batches(model, shown.pixels, spec, part=1).numpy()
    require_sane(embeddings)
    if teacher is not None:
        save_network(model, found.classifier, origin("teacher", model, spec, declared.license), teacher)
    return {
        "architecture": name,
        "width": width,
        "input": _json(spec),
        "embedding_dim": embeddings.shape[1],
        "parameters": sum(values.numel() for values in model.tensors().values()),
        "toolkit": found.toolkit,
        "neck": "own" if found.neck else "identity",
        "identities": None if found.classifier is None else found.classifier.shape[0],
        "matched": found.matched,
        "missing": _listed(found.missing),
        "ignored": _listed(found.ignored),
        "notes": [*found.notes, *said],
        "sanity": score(embeddings, shown),
    }


def _check_frozen(file: Path, declared: Declared) -> dict[str, Any]:
    # half a second, and only graphs need it
    from chains.importers.frozen import embed_frozen, read_graph, require_map, require_pixels

    graph = read_graph(file)
    _require_declared(declared.architecture, FROZEN)
    if declared.input is not None:
        require_pixels(graph, (declared.input.mean, declared.input.std))
    stated = USUAL_INPUT if graph.pixels is None else replace(USUAL_INPUT, mean=graph.pixels[0], std=graph.pixels[1])
    wanted = declared.input or _sized(stated, declared.size)
    spec = replace(wanted, height=graph.height or wanted.height, width=graph.width or wanted.width)
    shown = people(spec)
    images = normalise(shown.pixels, spec).numpy()
    embeddings = embed_frozen(graph, images)
    require_sane(embeddings)
    if graph.map is not None:
        require_map(graph, images[:MAPS])
    fixed = [f"the batch is fixed at {graph.batch}"] if graph.batch else []
    whose = "ImageNet's" if graph.pixels is None else "the file's"
    assumed = [] if declared.input else [_assumed(spec, whose, declared.size)]
    return {
        "architecture": FROZEN,
        "width": None,
        "input": _json(spec),
        "embedding_dim": embeddings.shape[1],
        "parameters": graph.parameters,
        "opset": graph.opset,
        "toolkit": None,
        "neck": None,
        "identities": None,
        "matched": None,
        "missing": [],
        "ignored": [],
        "notes": [
            "a graph cannot be refined; it can be evaluated, and fused into a teacher that can",
            *(["it shows a feature map, which a fusion learns from, too"] if graph.map else []),
            *fixed,
            *assumed,
        ],
        "sanity": score(embeddings, shown),
    }


def _in_batches(model: ReIDModel, pixels: Any, input: InputSpec, part: int) -> torch.Tensor:
    """Features (part 0) or embeddings (part 1) of uint8 images (n, H, W, 3)."""
    spans = (slice(start, start + BATCH) for start in range(0, len(pixels), BATCH))
    return torch.cat([model(normalise(pixels[span], input))[part] for span in spans])


def _origin(metadata: Mapping[str, str]) -> Origin | None:
    """What a file of this project says about itself; `None` for any other file. Raises `WeightsRefused`."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        mark = Origin.model_validate_json(text)
    except ValidationError as error:
        raise WeightsRefused(f"the file's own description ({METADATA_KEY}) cannot be read") from error
    if not (16 <= mark.height <= 1024 and 16 <= mark.image_width <= 512 and _are_usable(mark.mean, mark.std)):
        raise WeightsRefused(f"the file's own description asks for an input that makes no sense: {mark.input}")
    return mark


def _are_usable(mean: Sequence[float], std: Sequence[float]) -> bool:
    return all(map(math.isfinite, (*mean, *std))) and min(std) > 0


def _require_declared(stated: str | None, found: str, why: str | None = None) -> None:
    if stated is not None and stated != found:
        because = f" ({why})" if why else ""
        raise WeightsRefused(f"the teacher was registered as {stated}, and the file holds {found}{because}")


def _input(found: Recognised, mark: Origin | None, declared: Declared) -> tuple[InputSpec, list[str]]:
    """What the network wants to see, and what was assumed: stated by the owner, else by the file, else the usual at the
    size that the network is made for; with a stated size alone goes the mean and std of the file or its toolkit. Raises
    `WeightsRefused` where it is made for one size and another was stated."""
    size = found.model.table.input_size
    spec, said = declared.input or (_sized(mark.input, declared.size) if mark else None), []
    if spec is None:
        height, width = declared.size or size or (USUAL_INPUT.height, USUAL_INPUT.width)
        mean, std = found.pixels or (USUAL_INPUT.mean, USUAL_INPUT.std)
        spec = InputSpec(height, width, mean, std)
        said = [_assumed(spec, "the file's" if found.pixels else "ImageNet's", declared.size)]
    elif found.pixels is not None and not _is_close(found.pixels, spec):
        said = [f"mean and std of the file or its toolkit are {found.pixels}, as of 0..1; those stated were taken"]
    if size is not None and size != (spec.height, spec.width):
        raise WeightsRefused(
            f"{found.model.table.name} is for images of {size[0]}×{size[1]} (height × width), and "
            f"{spec.height}×{spec.width} was stated"
        )
    return spec, said


def _sized(spec: InputSpec, size: tuple[int, int] | None) -> InputSpec:
    return spec if size is None else replace(spec, height=size[0], width=size[1])


def _assumed(spec: InputSpec, whose: str, stated: tuple[int, int] | None) -> str:
    if stated is not None:
        return f"nobody stated mean and std, so {whose} were taken"
    return f"nobody stated the input, so {spec.height} × {spec.width} with {whose} mean and std was taken"


def _is_close(pixels: Pixels, spec: InputSpec) -> bool:
    return bool(np.allclose(np.array(pixels), np.array((spec.mean, spec.std)), atol=1e-3))


def _listed(names: Sequence[str]) -> list[str]:
    more = len(names) - MOST_LISTED
    return [name[:200] for name in names[:MOST_LISTED]] + ([f"and {more} more"] if more > 0 else [])


def _json(input: InputSpec) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(input).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m chains.importers.check", description=__doc__)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--declared", type=json.loads, default={})
    given = parser.parse_args(arguments)
    torch.set_num_threads(2)
    np.seterr(all="ignore")  # numbers that overflow are looked for, and refused with words
    report = answer(given.file, Declared.parse(given.declared), given.teacher)
    write_whole(given.out, json.dumps(report, allow_nan=False).encode())


if __name__ == "__main__":
    main()
