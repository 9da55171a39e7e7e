"""From a file of unknown kind to named tensors. The one surprise: a torch file is looked through twice.

`torch.load(weights_only=True)` runs no code of a file, but takes its word for sizes: a file of 1.5 KB gives a tensor of
10⁶ × 10⁶ that all points at one number, and a storage may claim more bytes than its record has. So an outline of the
pickle is read first, in which nothing is called but what stands here, and every size is held against the archive.
"""

from __future__ import annotations

import io
import pickle  # only for `_Outline`
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chains.errors import WeightsRefused

Format = Literal["safetensors", "torch", "onnx"]
State = Mapping[str, Tensor]
MAX_MEMBERS = 50_000
MAX_PICKLE_BYTES = 16 * 2**20  # names and shapes; those of the largest networks fill a megabyte
MAX_TENSORS = 20_000
MAX_DEPTH = 6  # of dictionaries around the weights
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "module")
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/",
        "this is a pointer of git's large-file storage, not the file: run `git lfs pull` and send what is there",
    ),
    (b"<!DOCTYPE", "this is a web page, probably the page of a download and not the download"),
    (b"<html", "this is a web page, probably the page of a download and not the download"),
    (b"\x89HDF\r\n", "this is an HDF5 file (Keras); convert it to safetensors or ONNX first"),
    (b"\x1f\x8b", "this is a gzip archive; send the file that is inside"),
    (b"BZh", "this is a bzip2 archive; send the file that is inside"),
    (b"\xfd7zXZ", "this is an xz archive; send the file that is inside"),
    (b"7z\xbc\xaf", "this is a 7z archive; send the file that is inside"),
)
RESAVE = "save the weights alone with torch.save(model.state_dict(), path), or as safetensors"


def sniff(path: Path) -> Format:
    """The kind of a file by its first bytes, whatever it is called. Raises `WeightsRefused`."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise WeightsRefused("the file is empty")
    # First, because its first bytes are a length, which may be those of anything else: one file in 256 begins as a
    # pickle does.
    if start[5:9] == b"\0\0\0{":
        return "safetensors"
    for beginning, reason in _BEGINNINGS:
        if start[: len(beginning)].lower() == beginning.lower():
            raise WeightsRefused(reason)
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    if start[0] == 0x80:
        raise WeightsRefused(
            "this is a bare pickle, as torch wrote before version 1.6, and pickles can run code: load it where you "
            f"trust it and {RESAVE}"
        )
    if start[0] == 0x08:  # field 1 of the protobuf, the IR version
        return "onnx"
    raise WeightsRefused("this is neither safetensors nor a torch file (a zip archive) nor ONNX")


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """Tensors and metadata. Raises `WeightsRefused`."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            _require_few(len(names))
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsRefused(
            f"the file cannot be read as safetensors; it may be cut short or damaged: {error}"
        ) from error


def read_torch(path: Path) -> State:
    """The tensors of a torch file (a zip archive), wherever in it they are. Raises `WeightsRefused`."""
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch's readers raise everything there is for damaged files
        raise WeightsRefused(f"torch cannot read the file with weights_only: {_first_line(error)}") from error
    return unwrapped(loaded)


def unwrapped(loaded: Any) -> State:
    """The dictionary of tensors inside `loaded`: itself, or under one of the usual names. Raises `WeightsRefused`."""
    inside = loaded
    for _ in range(MAX_DEPTH):
        if not isinstance(inside, Mapping):
            break
        wrapped = next((inside[key] for key in WRAPPERS if isinstance(inside.get(key), Mapping)), None)
        if wrapped is None:
            break
        inside = wrapped
    tensors = (
        {name: value for name, value in inside.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if isinstance(inside, Mapping)
        else {}
    )
    if not tensors:
        keys = ", ".join(repr(key)[:40] for key in list(inside)[:5]) if isinstance(inside, Mapping) else ""
        what = f"a dictionary with {keys or 'nothing'} in it" if isinstance(inside, Mapping) else type(inside).__name__
        raise WeightsRefused(f"the file holds {what}, and no tensors by name; {RESAVE}")
    return tensors


class _Kind(NamedTuple):
    """The type of a storage. A tuple, as a pickle may write into the attributes of what it is given."""

    name: str
    item_bytes: int


class _Storage(NamedTuple):
    """A storage as the pickle names it: the record with its bytes, and how many of them it claims."""

    key: str
    kind: _Kind
    items: int

    @property
    def size_bytes(self) -> int:
        return self.items * self.kind.item_bytes


@dataclass
class _Found:
    """What an outline came across."""

    storages: dict[str, _Storage] = field(default_factory=dict)
    tensors: int = 0
    tensor_bytes: int = 0


_STORAGES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "UntypedStorage": 1,
}


class _Outline(pickle.Unpickler):
    """Reads names and sizes of a torch pickle. Every global it resolves is one of the functions below: it has no way to
    call anything else, and no bytes of tensors are read."""

    def __init__(self, file: IO[bytes], found: _Found) -> None:
        super().__init__(file)
        self.found = found
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _first,
            **{("torch", name): _Kind(name, size) for name, size in _STORAGES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        found = self.known.get((module, name))
        if found is None:
            raise WeightsRefused(
                f"the file wants {module[:80]}.{name[:80]}, which is no plain tensor: it can run code when loaded."
                f" Load it where you trust it and {RESAVE}"
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Kind)):
            raise WeightsRefused("the file names a storage in a way torch does not write")
        storage = _Storage(_text(pid[2]), pid[1], _count(pid[4]))
        known = self.found.storages.setdefault(storage.key, storage)
        if known.size_bytes != storage.size_bytes:
            raise WeightsRefused(f"the file claims two sizes for storage {storage.key[:40]}")
        return storage

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> None:
        if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise WeightsRefused("the file describes a tensor in a way torch does not write")
        shape, items = tuple(map(_count, size)), 1
        for length in shape:
            items *= length
        _count(offset)
        if items > storage.items:
            raise WeightsRefused(
                f"a tensor claims shape {_times(shape)} and its storage holds {storage.items:,} numbers: its size is "
                "made up by strides"
            )
        self.found.tensors += 1
        self.found.tensor_bytes += items * storage.kind.item_bytes


def _check_archive(path: Path) -> None:
    """Every size in a torch file against what is there. Raises `WeightsRefused`."""
    size_bytes = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            folder = _checked_members(members, size_bytes)
            found = _outline(archive, f"{folder}/data.pkl")
            _check_storages(found, {member.filename: member.file_size for member in members}, folder)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, NotImplementedError, ValueError) as error:
        raise WeightsRefused(
            f"the archive cannot be read; it may be cut short or damaged: {_first_line(error)}"
        ) from error
    if found.tensor_bytes > 2 * size_bytes:  # twice: a few shared tensors are honest
        raise WeightsRefused(
            f"the tensors would fill {found.tensor_bytes:,} bytes, the file has {size_bytes:,}: many share one storage"
        )


def _checked_members(members: Sequence[zipfile.ZipInfo], size_bytes: int) -> str:
    """The archive's one top folder. Raises `WeightsRefused` for what torch never writes."""
    if len(members) > MAX_MEMBERS:
        raise WeightsRefused(f"the archive has {len(members):,} members; {MAX_MEMBERS:,} are more than any network has")
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise WeightsRefused("the archive has two members of one name")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise WeightsRefused(
                f"'{member.filename[:80]}' is compressed, {member.compress_size:,} of {member.file_size:,} bytes; "
                "torch stores weights as they are, so this is another archive or a bomb"
            )
        if member.flag_bits & 1:
            raise WeightsRefused("the archive is encrypted")
    claimed = sum(member.file_size for member in members)
    if claimed > size_bytes:
        raise WeightsRefused(
            f"the archive claims {claimed:,} bytes in members that overlap; the file has {size_bytes:,}"
        )
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise WeightsRefused(f"this is a TorchScript program and not a file of weights; {RESAVE}")
    folders = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(folders) != 1:
        raise WeightsRefused("the zip archive is no torch file: it has no data.pkl in its folder")
    return folders[0]


def _outline(archive: zipfile.ZipFile, name: str) -> _Found:
    if archive.getinfo(name).file_size > MAX_PICKLE_BYTES:
        raise WeightsRefused(f"its data.pkl has {archive.getinfo(name).file_size:,} bytes, more than names can need")
    found = _Found()
    with archive.open(name) as file:
        content = file.read()
        try:
            _require_modest(content)
            _Outline(io.BytesIO(content), found).load()
        except (WeightsRefused, MemoryError):
            raise
        except Exception as error:  # damaged pickles raise everything there is
            raise WeightsRefused(f"its data.pkl is damaged: {_first_line(error)}") from error
    _require_few(found.tensors)
    return found


def _require_modest(content: bytes) -> None:
    """Refuse a pickle that numbers its objects beyond its own length: a few bytes would make the unpickler reserve room
    for billions. Also raises as `pickletools` does, for strings longer than what is left."""
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(content):
            raise WeightsRefused(
                f"its data.pkl of {len(content):,} bytes numbers an object {argument:,}: it is made up"
            )


def _check_storages(found: _Found, sizes: Mapping[str, int], folder: str) -> None:
    for storage in found.storages.values():
        record = sizes.get(f"{folder}/data/{storage.key}")
        if record != storage.size_bytes:
            there = "is missing" if record is None else f"has {record:,} bytes"
            raise WeightsRefused(
                f"storage {storage.key[:40]} claims {storage.size_bytes:,} bytes and its record {there}"
            )


def _require_few(tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise WeightsRefused(f"the file has {tensors:,} tensors; {MAX_TENSORS:,} are more than any network has")


def _first(value: Any, *_rest: Any) -> Any:
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise WeightsRefused("the file names a storage in a way torch does not write")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise WeightsRefused("the file states a size that is no number of items")
    return value


def _times(shape: Sequence[int]) -> str:
    return "×".join(f"{length:,}" for length in shape[:6]) or "()"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
