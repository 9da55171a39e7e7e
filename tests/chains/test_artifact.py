"""The chain file: round trips, and each abuse it refuses."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chains.artifact import METADATA_KEY, canonical_json, dump, load, save
from chains.chain import Chain
from chains.errors import ChainFileError, ChainMismatch
from chains.testing import pico_chain

CHAIN = pico_chain(stem=4, narrowest=1, rungs=3)
BYTES = dump(CHAIN)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its Widthwise header changed."""
    header, body = split(BYTES)
    ours = json.loads(header["__metadata__"][METADATA_KEY])
    change(ours)
    header["__metadata__"][METADATA_KEY] = json.dumps(ours)
    return joined(header, body)


def with_tensors(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its safetensors header changed."""
    header, body = split(BYTES)
    change(header)
    return joined(header, body)


def with_value(name: str, value: float) -> bytes:
    header, body = split(BYTES)
    start = header[name]["data_offsets"][0]
    raw = bytearray(body)
    raw[start : start + 4] = np.float32(value).tobytes()
    return joined(header, bytes(raw))


@pytest.mark.parametrize("mode", ["nested", "oskt"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_saving_a_loaded_chain_gives_the_same_bytes(name: str, mode: str) -> None:
    data = dump(pico_chain(architecture_name=name, mode=mode, stem=4, narrowest=1, rungs=3))
    assert dump(load(data).chain) == data


def test_a_loaded_chain_is_the_chain_that_was_saved(tmp_path: Path) -> None:
    stored = save(CHAIN, tmp_path / "chain.safetensors")
    loaded = load(tmp_path / "chain.safetensors")
    assert loaded.digest == stored.digest == hashlib.sha256(BYTES).hexdigest()
    assert loaded.size_bytes == len(BYTES)
    for field in ("name", "mode", "teacher", "ladder", "input", "frontier", "provenance", "embedding_space", "license"):
        assert getattr(loaded.chain, field) == getattr(CHAIN, field), field
    assert all(np.array_equal(loaded.chain.tensors[name], CHAIN.tensors[name]) for name in CHAIN.tensors)


def test_another_process_writes_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(BYTES)
    script = (
        "import sys; from pathlib import Path; from chains.artifact import dump, load;"
        "sys.stdout.buffer.write(dump(load(Path(sys.argv[1])).chain))"
    )
    again = subprocess.run([sys.executable, "-c", script, tmp_path / "a.safetensors"], capture_output=True, check=True)
    assert again.stdout == BYTES


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chain.safetensors"
    save(CHAIN, path)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(replace(CHAIN, name="other"), path)
    assert path.read_bytes() == BYTES


def a_torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(1)}, buffer)
    return buffer.getvalue()


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was run')",))


ABUSES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "truncated"),
    "a torch checkpoint": (a_torch_zip(), "pickle or a torch checkpoint"),
    "a pickle that runs code": (pickle.dumps(_Bomb()), "pickle or a torch checkpoint"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "truncated"),
    "a header longer than the file": ((10**12).to_bytes(8, "little") + b"{}", "truncated"),
    "a header that is no JSON": ((8).to_bytes(8, "little") + b"{{{{{{{{", "no JSON"),
    "a header that is a list": ((8).to_bytes(8, "little") + b"[1,2,3] ", "no JSON object"),
    "JSON nested a million deep": ((10**6).to_bytes(8, "little") + b"[" * 10**6, "no JSON"),
    "no metadata": (with_tensors(lambda h: h.pop("__metadata__")), "one metadata key"),
    "metadata that is no object": (with_tensors(lambda h: h.update(__metadata__=3)), "one metadata key"),
    "a second metadata key": (with_tensors(lambda h: h["__metadata__"].update(more="x")), "one metadata key"),
    "a future version": (with_header(lambda h: h.update(format_version=2)), "format version 2 is not 1"),
    "a field of the future": (with_header(lambda h: h.update(colour="red")), "colour"),
    "a missing field": (with_header(lambda h: h.pop("license")), "license"),
    "NaN in the header": (with_header(lambda h: h["input"].update(mean=[float("nan")] * 3)), "NaN"),
    "an unknown architecture": (with_header(lambda h: h.update(architecture="resnet19")), "no architecture"),
    "an unknown mode": (with_header(lambda h: h.update(mode="magic")), "mode"),
    "the other mode": (with_header(lambda h: h.update(mode="oskt")), "sizes' is missing"),
    "a wider teacher than its tensors": (with_header(lambda h: h.update(teacher="8x2-4-8")), "channels at 8x2-4-8"),
    "an enormous teacher": (with_header(lambda h: h.update(teacher="4096x64-64-64")), "channels at 4096"),
    "a ladder out of order": (with_header(lambda h: h["ladder"].reverse()), "narrow to wide"),
    "a rung beyond the teacher": (with_header(lambda h: h["ladder"].append("5x2-4-8")), "the teacher 4x2-4-8 has 4"),
    "a rung not written in full": (with_header(lambda h: h.update(ladder=["4"])), "not written in full"),
    "a name with a path": (with_header(lambda h: h.update(name="../../etc/passwd")), "name"),
    "a lopsided cross matrix": (with_header(lambda h: h["frontier"].update(cross_map=[[1.0]])), "3 × 3"),
    "a deviation of zero": (with_header(lambda h: h["input"].update(std=[0.2, 0.0, 0.2])), "std.1"),
    "half a character": (with_header(lambda h: h.update(license="\ud800")), "license"),
    "an mAP over 100": (with_header(lambda h: h["frontier"]["widths"][0].update(map=101.0)), "map"),
    "NaN in a weight": (with_value("weight/conv1.weight", float("nan")), "conv1.weight holds NaN"),
    "infinity in a statistic": (
        with_value("statistics/1x2-4-8/bn1.running_mean", float("inf")),
        "holds NaN or infinity",
    ),
    "a negative variance": (with_value("statistics/1x2-4-8/bn1.running_var", -1.0), "negative variance"),
    "truncated tensors": (BYTES[:-4], "not a usable chain file"),
    "bytes behind the end": (BYTES + b"1234", "not a usable chain file"),
    "a tensor missing": (with_header(lambda h: h["ladder"].pop(0)), "no part of a chain claims"),
}


def a_shape_lie() -> bytes:
    def lie(header: dict[str, Any]) -> None:
        out, columns, height, width = header["weight/conv1.weight"]["shape"]
        header["weight/conv1.weight"]["shape"] = [columns, out, height, width]

    return with_tensors(lie)


ABUSES["a shape that is not the architecture's"] = (a_shape_lie(), r"conv1.weight is float32 \(3, 4, 7, 7\)")


@pytest.mark.parametrize("abuse", ABUSES)
def test_abuse_is_refused_with_its_reason(abuse: str) -> None:
    data, reason = ABUSES[abuse]
    with pytest.raises(ChainFileError, match=reason):
        load(data)


def test_a_claim_of_a_million_by_a_million_costs_no_memory() -> None:
    def lie(header: dict[str, Any]) -> None:
        header["weight/conv1.weight"]["shape"] = [10**6, 10**6]

    with pytest.raises(ChainFileError):
        load(with_tensors(lie))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_loads_cleanly_or_is_refused_cleanly(data: st.DataObject) -> None:
    damaged = bytearray(BYTES)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged), 12_000) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ChainFileError):
        assert dump(load(bytes(damaged)).chain)


def test_an_object_that_is_no_chain_cannot_be_built() -> None:
    with pytest.raises(ChainMismatch, match="not in both"):
        replace(CHAIN, tensors={name: t for name, t in CHAIN.tensors.items() if name != "conv1.weight"})


def test_canonical_json_knows_no_order_and_no_nan() -> None:
    assert canonical_json({"b": 1, "a": [True, None]}) == '{"a":[true,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_the_format_guards_its_bytes() -> None:
    """A chain of integers, so that the digest depends on the format alone. A new digest is a new format version."""
    assert load(dump(integer_chain())).digest == "e8593c38c5098f4591b4e40df2b3353c1059160b6478909f8a1d035330d1c725"


def integer_chain() -> Chain:
    zeros = {
        name: np.arange(tensor.size, dtype=np.float32).reshape(tensor.shape) for name, tensor in CHAIN.tensors.items()
    }
    ones = {w: {n: np.ones_like(v) for n, v in statistics.items()} for w, statistics in CHAIN.statistics.items()}
    trees = {
        group: type(tree)(np.arange(len(tree.order)), np.arange(1, len(tree.order)))
        for group, tree in CHAIN.partitions.items()
    }
    return replace(CHAIN, tensors=zeros, statistics=ones, partitions=trees)


def test_a_zip_that_is_no_torch_file_is_refused_too() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ChainFileError, match="torch checkpoint"):
        load(buffer.getvalue())
