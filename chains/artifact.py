"""A chain as one file: safetensors, with exactly one metadata key that holds canonical JSON.

One key, because safetensors writes several in random order; canonical JSON and no clock, host or duration, so that
saving a loaded chain gives the same bytes and the sha256 of the file names the chain. The format stands in
`docs/reference/chain-file.md`. Nothing is ever unpickled: a file is refused unless every byte of it is accounted for.

The surprise: a chain that version 1 can hold is still written as version 1, or a file of that version would not be
written as its own bytes and chains that are out in the world would change their digests. So version 4, the one with
sizes per layer, holds terminal chains and no others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from chains.architectures import architecture
from chains.atomic import write_whole
from chains.chain import (
    AFFINE,
    FALSE_ACCEPT_RATES,
    STATISTICS,
    Chain,
    Frontier,
    InputSpec,
    Threshold,
    Thresholds,
    WidthAccuracy,
)
from chains.cut import NestedTree, Partition, SharedClusters
from chains.errors import ChainFileError, ChainsError
from chains.width import Width

FORMAT_VERSION = 4  # the latest; a chain is written in the first that can hold it
METADATA_KEY = "widthwise"
NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"  # of a chain
MAX_CHANNELS = 1_000_000  # of a group, far above any network
MAX_HEADER_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class StoredChain:
    """A chain and the file it is stored in: sha256 of its bytes (64 hex digits) and their number."""

    chain: Chain
    digest: str
    size_bytes: int


def canonical_json(value: Any) -> str:
    """The one way to write a JSON value: keys sorted, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def dump(chain: Chain) -> bytes:
    """The bytes of `chain`'s file: a function of the chain alone. Raises `ChainFileError` where `load` would refuse the
    file, such as for a name with a space."""
    return save_tensors(_file_tensors(chain), metadata={METADATA_KEY: _header_text(chain)})


def save(chain: Chain, path: Path) -> StoredChain:
    """Write `chain` to `path`, whole or not at all."""
    data = dump(chain)
    write_whole(path, data)
    return StoredChain(chain, hashlib.sha256(data).hexdigest(), len(data))


def load(source: bytes | Path) -> StoredChain:
    """Read a chain file and check all of it.

    Raises `ChainFileError` for anything that is not a whole, sane chain file of this version: pickles, truncated files,
    unknown versions and fields, NaN or infinity, tensors that are missing, left over or of another shape than the
    architecture says. The arrays of the chain are read-only: students of full width share them.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        header, tensors = _parse(data)
        chain = _build(header, tensors)
    except ChainFileError:
        raise
    except (ChainsError, SafetensorError, ValidationError) as refusal:
        raise ChainFileError(f"not a usable chain file: {_short(refusal)}") from refusal
    return StoredChain(chain, hashlib.sha256(data).hexdigest(), len(data))


# --- the header


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Percent = Annotated[float, Field(ge=0, le=100)]


class _Input(_Strict):
    height: int = Field(ge=16, le=4096)
    width: int = Field(ge=16, le=4096)
    mean: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=1e-3, le=1)]] = Field(min_length=3, max_length=3)


class _Accuracy(_Strict):
    width: str
    map: Percent
    map_ci95: list[Percent] = Field(min_length=2, max_length=2)
    rank1: Percent
    rank5: Percent
    rank10: Percent


class _AccuracyAndMinp(_Accuracy):
    minp: Percent


Measured = TypeVar("Measured", bound=_Accuracy)


class _Frontier(_Strict, Generic[Measured]):
    dataset: str
    protocol: str
    seed: int
    queries: int = Field(ge=1)
    gallery: int = Field(ge=1)
    trained_after_expansion: bool
    widths: list[Measured]
    cross_map: list[list[Percent]]

    @model_validator(mode="after")
    def _require_square(self) -> Self:
        _require_matrix("the cross-width matrix", self.cross_map, len(self.widths))
        return self


class _Thresholds(_Strict):
    """Cut-offs at one rate; both matrices are null in the same places."""

    false_accept_rate: float
    cosine: list[list[Annotated[float, Field(ge=-1, le=1)] | None]]
    true_accept: list[list[Percent | None]]


class _FrontierWithThresholds(_Frontier[_AccuracyAndMinp]):
    thresholds: list[_Thresholds]

    @model_validator(mode="after")
    def _require_rates(self) -> Self:
        if tuple(found.false_accept_rate for found in self.thresholds) != FALSE_ACCEPT_RATES:
            raise ValueError(f"there must be thresholds at the false-accept rates {FALSE_ACCEPT_RATES}, in this order")
        for found in self.thresholds:
            _require_matrix("cosine", found.cosine, len(self.widths))
            _require_matrix("true_accept", found.true_accept, len(self.widths))
            if _nulls(found.cosine) != _nulls(found.true_accept):
                raise ValueError("cosine and true_accept must be null in the same places")
        return self


def _require_matrix(what: str, matrix: Sequence[Sequence[float | None]], count: int) -> None:
    if len(matrix) != count or any(len(row) != count for row in matrix):
        raise ValueError(f"{what} must be {count} × {count}, a row per measured width")


def _nulls(matrix: Sequence[Sequence[float | None]]) -> list[list[bool]]:
    return [[value is None for value in row] for row in matrix]


OfVersion = TypeVar("OfVersion", bound=_Frontier[_Accuracy] | _FrontierWithThresholds | None)


class _Header(_Strict, Generic[OfVersion]):
    format_version: int
    name: str = Field(pattern=NAME)
    architecture: str
    mode: Literal["nested", "oskt"]
    teacher: str
    ladder: list[str] = Field(min_length=1, max_length=256)
    input: _Input
    embedding_space: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    license: str = Field(min_length=1, max_length=200)
    frontier: OfVersion
    provenance: dict[str, JsonValue]


class _TerminalHeader(_Header[_FrontierWithThresholds | None]):
    """Of a terminal chain. `sizes`: group -> channels."""

    sizes: dict[str, Annotated[int, Field(ge=1, le=MAX_CHANNELS)]]


AnyHeader = _Header[_Frontier[_Accuracy] | None] | _Header[_FrontierWithThresholds | None] | _TerminalHeader
HEADERS: Mapping[int, type[AnyHeader]] = {
    1: _Header[_Frontier[_Accuracy] | None],
    2: _Header[_FrontierWithThresholds | None],
    3: _Header[_FrontierWithThresholds | None],
    4: _TerminalHeader,
}


def _header_text(chain: Chain) -> str:
    """The header of `chain`'s file, read back as `load` will: what cannot be loaded again must not be stored."""
    for what, of_widths in (("statistics", chain.statistics), ("norms", chain.own_norms)):
        if stray := of_widths.keys() - set(chain.ladder):
            raise ChainFileError(
                f"chain '{chain.name[:64]}' has {what} of {min(stray)}, which is not on its ladder and would be lost"
            )
    try:
        text = canonical_json(_header(chain))
        _read_header(text)
    except (ChainFileError, TypeError, ValueError) as refusal:  # also pydantic's, which is a ValueError
        raise ChainFileError(f"chain '{chain.name[:64]}' cannot be stored: {_short(refusal)}") from refusal
    return text


def _version(chain: Chain) -> int:
    """The first version that can hold `chain`."""
    frontier = chain.frontier
    if chain.sizes is not None:
        return 4
    if any(isinstance(partition, NestedTree) and not partition.is_whole for partition in chain.partitions.values()):
        return 3
    if chain.own_norms:
        return 2
    is_first = frontier is None or not (frontier.thresholds or any(w.minp is not None for w in frontier.widths))
    return 1 if is_first else 2


def _header(chain: Chain) -> dict[str, Any]:
    version = _version(chain)
    return {
        "format_version": version,
        "name": chain.name,
        "architecture": chain.architecture,
        "mode": chain.mode,
        "teacher": str(chain.teacher),
        "ladder": [str(width) for width in chain.ladder],
        "input": {
            "height": chain.input.height,
            "width": chain.input.width,
            "mean": _floats(chain.input.mean),
            "std": _floats(chain.input.std),
        },
        "embedding_space": chain.embedding_space,
        "license": chain.license,
        "frontier": None if chain.frontier is None else _frontier_json(chain.frontier, version),
        "provenance": dict(chain.provenance),
        **({} if chain.sizes is None else {"sizes": dict(chain.sizes)}),
    }


def _frontier_json(frontier: Frontier, version: int) -> dict[str, Any]:
    metrics = ("map", "rank1", "rank5", "rank10", *(("minp",) if version > 1 else ()))
    written = {
        **{name: getattr(frontier, name) for name in ("dataset", "protocol", "seed", "queries", "gallery")},
        "trained_after_expansion": frontier.trained_after_expansion,
        "widths": [
            {
                "width": str(measured.width),
                "map_ci95": _floats(measured.map_ci95),
                **{name: _float(getattr(measured, name)) for name in metrics},
            }
            for measured in frontier.widths
        ],
        "cross_map": [_floats(row) for row in frontier.cross_map],
    }
    return written | ({"thresholds": [_thresholds_json(found) for found in frontier.thresholds]} if version > 1 else {})


def _thresholds_json(thresholds: Thresholds) -> dict[str, Any]:
    return {
        "false_accept_rate": float(thresholds.false_accept_rate),
        "cosine": [[found and _float(found.cosine) for found in row] for row in thresholds.matrix],
        "true_accept": [[found and _float(found.true_accept) for found in row] for row in thresholds.matrix],
    }


def _float(value: float | None) -> float | None:
    """As it will be read: `0` and `0.0` are one value to Python and two in a file that is named by its digest."""
    return None if value is None else float(value)


def _floats(values: Iterable[float]) -> list[float | None]:
    return [_float(value) for value in values]


# --- the tensors: weight/<tensor>, group/<group>/order|splits|sizes, statistics/<width>/<norm>.running_mean|var,
#     norms/<width>/<norm>.weight|bias


def _file_tensors(chain: Chain) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {f"weight/{name}": tensor for name, tensor in chain.tensors.items()}
    for group, partition in chain.partitions.items():
        tensors[f"group/{group}/order"] = partition.order.astype(np.int32)
        family, values = _family_of(partition)
        tensors[f"group/{group}/{family}"] = values.astype(np.int32)
    for width, statistics in chain.statistics.items():
        tensors |= {f"statistics/{width}/{name}": values for name, values in statistics.items()}
    for width, norms in chain.own_norms.items():
        tensors |= {f"norms/{width}/{name}": values for name, values in norms.items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _family_of(partition: Partition) -> tuple[str, NDArray[np.int64]]:
    return ("splits", partition.splits) if isinstance(partition, NestedTree) else ("sizes", partition.sizes)


def _parse(data: bytes) -> tuple[AnyHeader, dict[str, NDArray[Any]]]:
    if _is_pickle(data):
        raise ChainFileError(
            "this is a pickle or a torch checkpoint, which can run code when read; a chain is a safetensors file"
        )
    metadata = _metadata(data)
    text = metadata.get(METADATA_KEY)
    if metadata.keys() != {METADATA_KEY} or not isinstance(text, str):
        found = [key[:40] for key in sorted(metadata)[:4]]
        raise ChainFileError(f"a chain file has one metadata key, '{METADATA_KEY}', that holds a text; found {found}")
    return _read_header(text), _read_tensors(data)


def _is_pickle(data: bytes) -> bool:
    """A torch zip or a bare pickle. A safetensors file may start with 0x80 too, the low byte of its header's length,
    but then its header's brace stands behind those eight bytes."""
    return data.startswith(b"PK\x03\x04") or (data.startswith(b"\x80") and data[8:9] != b"{")


def _read_header(text: str) -> AnyHeader:
    ours = _json_object(text)
    header = _fields_of(ours.get("format_version")).model_validate(ours)
    try:
        canonical_json(header.provenance).encode()
    except UnicodeEncodeError as error:
        raise ChainFileError("the provenance holds half a character, which no file can") from error
    return header


def _read_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    try:
        tensors = load_tensors(data)
    except KeyError as dtype:
        raise ChainFileError(f"the file holds tensors of type {dtype}; a chain has float32 and int32 only") from dtype
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return tensors


def _fields_of(version: object) -> type[AnyHeader]:
    """Before anything else is looked at: another version means other fields."""
    if isinstance(version, int) and not isinstance(version, bool) and version in HEADERS:
        return HEADERS[version]
    raise ChainFileError(
        f"format version {str(version)[:20]} is not one this release reads, 1 to {FORMAT_VERSION}; upgrade Widthwise"
    )


def _metadata(data: bytes) -> dict[str, Any]:
    """The metadata of a safetensors file; `load_tensors` checks all the rest of its header but does not return this."""
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ChainFileError(f"{len(data)} bytes with a header that claims {length}: truncated, or no safetensors file")
    header = _json_object(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def _json_object(text: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ChainFileError(f"the header is no JSON: {_short(error)}") from error
    if not isinstance(value, dict):
        raise ChainFileError("the header is no JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ChainFileError(f"the header holds {name}, which is no JSON number")


def _finite(number: str) -> float:
    """JSON allows `1e999`, and Python reads it as infinity."""
    value = float(number)
    if not math.isfinite(value):
        raise ChainFileError(f"the header holds {number[:40]}, which is no finite number")
    return value


def _build(header: AnyHeader, tensors: dict[str, NDArray[Any]]) -> Chain:
    sizes = header.sizes if isinstance(header, _TerminalHeader) else None
    table = architecture(header.architecture)
    ladder = tuple(_canonical_width(text) for text in header.ladder)
    left = dict(tensors)
    weights = {name: _take(left, f"weight/{name}", np.float32) for name in table.axes}
    partitions = {group: _partition(left, group, header.mode) for group in table.groups}
    statistics = _per_width(left, "statistics", ladder, table.batch_norms, STATISTICS)
    own_norms = _per_width(left, "norms", ladder, table.norms, AFFINE)
    if left:
        raise ChainFileError(
            f"the file holds {len(left)} tensors that no part of a chain claims, such as '{min(left)[:80]}'"
        )
    chain = Chain(
        name=header.name,
        architecture=header.architecture,
        mode=header.mode,
        teacher=_canonical_width(header.teacher),
        ladder=ladder,
        input=InputSpec(header.input.height, header.input.width, _triple(header.input.mean), _triple(header.input.std)),
        embedding_space=header.embedding_space,
        license=header.license,
        tensors=weights,
        partitions=partitions,
        statistics=statistics,
        own_norms=own_norms,
        frontier=None if header.frontier is None else _frontier(header.frontier),
        provenance=header.provenance,
        sizes=sizes,
    )
    if header.format_version != _version(chain):
        raise ChainFileError(
            f"the file says format version {header.format_version}; what it holds is written in {_version(chain)}"
        )
    return chain


def _take(left: dict[str, NDArray[Any]], name: str, dtype: type[np.generic]) -> NDArray[Any]:
    if name not in left:
        raise ChainFileError(f"tensor '{name}' is missing")
    tensor = left.pop(name)
    if tensor.dtype != dtype:
        raise ChainFileError(f"tensor '{name}' is {tensor.dtype}, not {np.dtype(dtype)}")
    return tensor


def _partition(left: dict[str, NDArray[Any]], group: str, mode: str) -> Partition:
    order = _take(left, f"group/{group}/order", np.int32).astype(np.int64)
    family = "splits" if mode == "nested" else "sizes"
    values = _take(left, f"group/{group}/{family}", np.int32).astype(np.int64)
    return NestedTree(order, values) if mode == "nested" else SharedClusters(order, values)


def _per_width(
    left: dict[str, NDArray[Any]],
    folder: str,
    ladder: tuple[Width, ...],
    norms: Iterable[str],
    kinds: tuple[str, str],
) -> dict[Width, dict[str, NDArray[np.float32]]]:
    """width -> both `kinds` of every norm, for the widths that have any in `folder`."""
    present = {name.split("/")[1] for name in left if name.startswith(f"{folder}/")}
    names = [f"{norm}.{kind}" for norm in norms for kind in kinds]
    return {
        width: {name: _take(left, f"{folder}/{width}/{name}", np.float32) for name in names}
        for width in ladder
        if str(width) in present
    }


def _frontier(header: _Frontier[_Accuracy] | _FrontierWithThresholds) -> Frontier:
    return Frontier(
        dataset=header.dataset,
        protocol=header.protocol,
        seed=header.seed,
        queries=header.queries,
        gallery=header.gallery,
        trained_after_expansion=header.trained_after_expansion,
        widths=tuple(_accuracy(measured) for measured in header.widths),
        cross_map=tuple(tuple(row) for row in header.cross_map),
        thresholds=_thresholds(header.thresholds) if isinstance(header, _FrontierWithThresholds) else (),
    )


def _accuracy(measured: _Accuracy) -> WidthAccuracy:
    return WidthAccuracy(
        width=_canonical_width(measured.width),
        map=measured.map,
        map_ci95=(measured.map_ci95[0], measured.map_ci95[1]),
        rank1=measured.rank1,
        rank5=measured.rank5,
        rank10=measured.rank10,
        minp=measured.minp if isinstance(measured, _AccuracyAndMinp) else None,
    )


def _thresholds(found: list[_Thresholds]) -> tuple[Thresholds, ...]:
    return tuple(
        Thresholds(
            at_rate.false_accept_rate,
            tuple(
                tuple(None if c is None or t is None else Threshold(c, t) for c, t in zip(*rows, strict=True))
                for rows in zip(at_rate.cosine, at_rate.true_accept, strict=True)
            ),
        )
        for at_rate in found
    )


def _canonical_width(text: str) -> Width:
    width = Width.parse(text)
    if str(width) != text:
        raise ChainFileError(f"width '{text}' is not written in full: '{width}'")
    return width


def _triple(values: list[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def _short(error: Exception) -> str:
    """An error in one capped line: a hostile file must not fill the log."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"header field '{'.'.join(str(part) for part in first['loc'])}': {first['msg']}"[:300]
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
