"""Checkpoints: the whole state of a training run in one safetensors file, so that a killed run goes on where it was.

A file holds every tensor of the state and one JSON text: the format, the step, and the settings of the run it belongs
to. It is replaced as a whole, so that a kill leaves the old one or the new one, never half.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from chains.atomic import write_whole
from chains.errors import DataError

KEY = "widthwise.checkpoint"
FORMAT = 1
SHOWN = 120  # characters of a differing value in a message


def save_checkpoint(path: Path, step: int, tensors: Mapping[str, Tensor], run: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path` atomically. `run`: JSON values, the settings that a resumed run must share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "step": step, "run": run}, sort_keys=True)
    write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {KEY: text}))


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], run: Mapping[str, Any]) -> int:
    """Copy the checkpoint at `path` into `tensors`, in place, and return its step.

    Raises `DataError` when the file is no checkpoint of this version, or belongs to a run with other settings; the
    message names the first setting that differs."""
    try:
        with safe_open(path, framework="pt") as file:
            step = _require_same_run(path, (file.metadata() or {}).get(KEY), run)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise DataError(f"'{path}' is no checkpoint ({error}); delete it to start again") from error
    _require_same_tensors(path, stored, tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
    return step


def _require_same_run(path: Path, text: str | None, run: Mapping[str, Any]) -> int:
    """The step of the checkpoint described by `text`."""
    described = json.loads(text) if text is not None else {}
    if described.get("format") != FORMAT:
        raise DataError(f"'{path}' is no training checkpoint of format {FORMAT}; give another path or delete it")
    there, here = dict(_flat(described["run"])), dict(_flat(json.loads(json.dumps(run))))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise DataError(
                f"checkpoint '{path}' belongs to another run: {name} is {str(there.get(name))[:SHOWN]} there and "
                f"{str(here.get(name))[:SHOWN]} here. Resume with the settings it was made with, give another path, "
                "or delete it to start again"
            )
    return int(described["step"])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name -> leaf of nested JSON objects."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)


def _require_same_tensors(path: Path, stored: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(stored.keys() | tensors.keys()):
        there, here = (tuple(side[name].shape) if name in side else None for side in (stored, tensors))
        if there != here:
            raise DataError(f"checkpoint '{path}': tensor '{name}' has shape {there} there and {here} in this run")
