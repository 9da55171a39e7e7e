"""Weights to begin a training with: a file of this project, or any checkpoint that is recognised, ImageNet's too."""

from __future__ import annotations

from pathlib import Path

from chains.architectures import architecture
from chains.errors import ChainFileError, WeightsRefused
from chains.export import METADATA_KEY, load_exported, numpy_state
from chains.importers.containers import read_safetensors, read_torch, sniff
from chains.importers.recognise import recognise
from chains.importers.schemes import is_alike
from chains.model import ReIDModel, model_of


def read_start(path: Path, name: str) -> ReIDModel:
    """The network in `path`, in eval mode, as the architecture `name` where it has the same tensors: an ImageNet ResNet
    may begin one of last stride 1 (Luo et al., CVPRW 2019). A neck that the file lacks starts as a new one.

    Raises `ChainFileError` for a file that is not recognised, with the reason."""
    try:
        kind = sniff(path)
        if kind == "onnx":
            raise WeightsRefused("an ONNX graph is frozen: it has no weights that a training could begin with")
        state, metadata = read_safetensors(path) if kind == "safetensors" else (read_torch(path), {})
        if METADATA_KEY in metadata:
            return load_exported(path)
        return _as(name, recognise(state, name).model)
    except (OSError, WeightsRefused) as error:
        raise ChainFileError(f"start '{path}': {error}") from error


def _as(name: str, model: ReIDModel) -> ReIDModel:
    """`model` as the architecture `name`, where that has the same tensors; as it is otherwise."""
    if not is_alike(architecture(name), model.table, model.width):
        return model
    return model_of(name, model.width, numpy_state(model))
