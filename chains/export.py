"""Networks as safetensors files to train on: tensors, running statistics, and where they come from.

Three kinds, one format: a *student* as its chain gives it, a student that was *finetuned*, and a *teacher*. The tensors
are the backbone under its architecture's names, of a ResNet torchvision's (`conv1.weight`,
`layer1.0.bn1.running_mean`, …; `chains/architectures` says whose others are), the BNNeck as `neck.*`, and for networks
trained here the classifier as `classifier.weight` (identities, D). One metadata key holds canonical JSON.
The one surprise: channels of a student stand in its chain's leaf order, so embeddings are native to the width; `lift`
in the metadata maps them into the common space of all widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from chains.arch import Architecture
from chains.architectures import architecture
from chains.artifact import StoredChain, canonical_json
from chains.atomic import write_whole
from chains.chain import STATISTICS, InputSpec
from chains.errors import ChainFileError, ChainMismatch, ChainsError
from chains.expand import student
from chains.model import ReIDModel, model_of, module_name, network_of, numpy_tensors, of_sizes
from chains.train import Trained
from chains.width import Width

Kind = Literal["student", "finetuned", "teacher"]
METADATA_KEY = "widthwise.network"
CLASSIFIER = "classifier.weight"


class Origin(BaseModel):
    """What a file says about itself. `mean`, `std`: the input is `(pixel / 255 - mean) / std`, RGB of `height` ×
    `image_width`. `lift`: embedding channel of the common space -> coordinate of this embedding; students only.
    `sizes`: channels of every group, of terminal models only (`Chain.sizes`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    kind: Kind
    architecture: str
    width: str
    height: int
    image_width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    license: str
    chain: str | None = None
    chain_digest: str | None = None
    embedding_space: str | None = None
    lift: tuple[int, ...] | None = None
    sizes: dict[str, int] | None = None

    @property
    def input(self) -> InputSpec:
        return InputSpec(self.height, self.image_width, self.mean, self.std)


@dataclass(frozen=True, eq=False)
class Exported:
    """What a file holds. classifier: (identities, D), where the network was trained here."""

    model: ReIDModel
    origin: Origin
    classifier: torch.Tensor | None


def origin(kind: Kind, model: ReIDModel, input: InputSpec, license: str) -> Origin:
    """The part of an origin that every kind has."""
    return Origin(
        kind=kind,
        architecture=model.table.name,
        width=str(model.width),
        height=input.height,
        image_width=input.width,
        mean=input.mean,
        std=input.std,
        license=license,
    )


def export_safetensors(stored: StoredChain, width: Width, path: Path) -> None:
    """Write the calibrated student of `stored` at `width` to `path`, whole or not at all; the same bytes every time.

    Raises `NotCalibrated` when the width has no statistics."""
    chain = stored.chain
    tensors = student(chain, width)
    model = model_of(network_of(chain), width, tensors)
    mark = {
        "chain": chain.name,
        "chain_digest": stored.digest,
        "embedding_space": chain.embedding_space,
        "lift": tuple(chain.lift(width).tolist()),
        "sizes": None if chain.sizes is None else dict(chain.sizes),
    }
    _write(path, tensors, origin("student", model, chain.input, chain.license).model_copy(update=mark))


def save_trained(trained: Trained, mark: Origin, path: Path) -> None:
    """Write a trained network with its classifier, whole or not at all."""
    save_network(trained.model, trained.classifier, mark, path)


def save_network(model: ReIDModel, classifier: torch.Tensor | None, mark: Origin, path: Path) -> None:
    """Write a network, with the classifier (identities, D) that it has or has not, whole or not at all."""
    own = {} if classifier is None else {CLASSIFIER: classifier.detach().cpu().numpy().astype(np.float32)}
    _write(path, {**numpy_state(model), **own}, mark)


def numpy_state(model: ReIDModel) -> dict[str, NDArray[np.float32]]:
    """Copies of parameters and running statistics by the axis table's names."""
    state = model.state_dict()
    names = (f"{norm}.{kind}" for norm in model.table.batch_norms for kind in STATISTICS)
    return {**numpy_tensors(model), **{n: state[module_name(n)].cpu().numpy().astype(np.float32) for n in names}}


def load_exported(path: Path) -> ReIDModel:
    """The network in `path` as a torch module in eval mode. Raises `ChainFileError` for any other file."""
    return read_exported(path).model


def load_trained(path: Path) -> Trained:
    """The network in `path` and its classifier. Raises `ChainFileError` for any other file, and for one without."""
    exported = read_exported(path)
    if exported.classifier is None:
        raise ChainFileError(
            f"'{path}' is a {exported.origin.kind} without a classifier, so it cannot be refined as it is; "
            "begin a training with it (start)"
        )
    return Trained(exported.model, exported.classifier)


def read_exported(path: Path) -> Exported:
    """All that `path` holds. Raises `ChainFileError` for any other file."""
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ChainFileError(f"'{path}' cannot be read as safetensors: {error}") from error
    if text is None:
        raise ChainFileError(f"'{path}' is no exported network: its metadata lack '{METADATA_KEY}'")
    classifier = tensors.pop(CLASSIFIER, None)
    try:
        mark = Origin.model_validate_json(text)
        network, width = of_sizes(mark.architecture, mark.sizes), Width.parse(mark.width)
        _require_shapes(architecture(network) if isinstance(network, str) else network, width, tensors)
        model = model_of(network, width, tensors)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or METADATA_KEY
        raise ChainFileError(f"'{path}' is no usable network: {field}: {first['msg']}") from error
    except ChainsError as error:
        raise ChainFileError(f"'{path}' is no usable network: {error}") from error
    return Exported(model, mark, None if classifier is None else _checked(path, classifier, model))


def _require_shapes(table: Architecture, width: Width, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raise `ChainMismatch` unless `tensors` are the weights of a network of `width`. Looked at before that network is
    made, for a file of some bytes may name one of terabytes."""
    for name, shape in table.tensor_shapes(width).items():
        if name not in tensors:
            raise ChainMismatch(f"tensors do not fit {table.name} {width}: lacking {name}")
        if tensors[name].shape != shape:
            raise ChainMismatch(f"{name} is {tensors[name].shape}; {table.name} {width} needs {shape}")


def _checked(path: Path, classifier: NDArray[Any], model: ReIDModel) -> torch.Tensor:
    if classifier.ndim != 2 or classifier.shape[1] != model.backbone.channels or classifier.dtype != np.float32:
        raise ChainFileError(
            f"'{path}': {CLASSIFIER} is {classifier.dtype} {classifier.shape}; "
            f"it must be float32 (identities, {model.backbone.channels})"
        )
    return torch.from_numpy(classifier)


def _write(path: Path, tensors: dict[str, NDArray[np.float32]], mark: Origin) -> None:
    whole = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    said = mark.model_dump(mode="json", exclude={"sizes"} if mark.sizes is None else None)  # older files, same bytes
    write_whole(path, save_tensors(whole, metadata={METADATA_KEY: canonical_json(said)}))
