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
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chains.artifact import METADATA_KEY, canonical_json, dump, load, save
from chains.chain import FALSE_ACCEPT_RATES, Chain, InputSpec, Threshold, Thresholds
from chains.cut import NestedTree, SharedClusters
from chains.errors import ChainFileError, ChainMismatch, CutError
from chains.expand import student
from chains.model import load_student
from chains.testing import as_first_measured, pico_chain, with_own_norms
from chains.width import Width

CHAIN = pico_chain(stem=4, narrowest=1, rungs=3)
BYTES = dump(CHAIN)
OWN = dump(with_own_norms(replace(CHAIN, frontier=None)))
FIRST = replace(CHAIN, frontier=as_first_measured(CHAIN.frontier))  # what a file of version 1 holds


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def with_header(change: Callable[[dict[str, Any]], object], data: bytes = BYTES) -> bytes:
    """The file with its Widthwise header changed."""
    header, body = split(data)
    ours = json.loads(header["__metadata__"][METADATA_KEY])
    change(ours)
    header["__metadata__"][METADATA_KEY] = json.dumps(ours)
    return joined(header, body)


def with_text(old: str, new: str) -> bytes:
    """The file with a piece of its Widthwise header replaced, for what `json.dumps` would not write."""
    header, body = split(BYTES)
    text = header["__metadata__"][METADATA_KEY]
    assert old in text
    header["__metadata__"][METADATA_KEY] = text.replace(old, new, 1)
    return joined(header, body)


def with_array(name: str, array: np.ndarray) -> bytes:
    """The file with one tensor replaced by another of any shape."""
    metadata = split(BYTES)[0]["__metadata__"]
    return safetensors.numpy.save({**safetensors.numpy.load(BYTES), name: array}, metadata)


def with_dtype(dtype: str) -> bytes:
    """The file with the bytes of one tensor declared to be numbers of one byte and of type `dtype`."""

    def lie(header: dict[str, Any]) -> None:
        entry = header["weight/conv1.weight"]
        entry |= {"dtype": dtype, "shape": [entry["data_offsets"][1] - entry["data_offsets"][0]]}

    return with_tensors(lie)


def with_threshold(rate: int, name: str, value: object) -> bytes:
    """The file with the cut-off of the second width against the third changed."""

    def change(header: dict[str, Any]) -> None:
        header["frontier"]["thresholds"][rate][name][1][2] = value

    return with_header(change)


def with_tensors(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its safetensors header changed."""
    header, body = split(BYTES)
    change(header)
    return joined(header, body)


def with_names(change: Callable[[str], str | None], data: bytes) -> bytes:
    """The file `data` with its tensors renamed; `None`: left out."""
    tensors, metadata = safetensors.numpy.load(data), split(data)[0]["__metadata__"]
    return safetensors.numpy.save({new: t for name, t in tensors.items() if (new := change(name))}, metadata)


def with_value(name: str, value: float, data: bytes = BYTES) -> bytes:
    header, body = split(data)
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


def test_what_version_1_can_hold_is_written_as_version_1() -> None:
    data = dump(FIRST)
    header = json.loads(split(data)[0]["__metadata__"][METADATA_KEY])
    assert header["format_version"] == 1
    assert "thresholds" not in header["frontier"]
    loaded = load(data).chain
    assert loaded.frontier == FIRST.frontier
    assert dump(loaded) == data
    assert load(dump(replace(CHAIN, frontier=None))).chain.frontier is None


def test_a_frontier_with_thresholds_is_written_as_version_2() -> None:
    assert json.loads(split(BYTES)[0]["__metadata__"][METADATA_KEY])["format_version"] == 2
    loaded = load(BYTES).chain.frontier
    assert loaded is not None
    assert loaded.thresholds[0].matrix[0][0] is None
    assert loaded.thresholds[1].matrix[1][2] == Threshold(0.469, 63.0)
    assert [measured.minp for measured in loaded.widths] == [40.0, 41.0, 42.0]


def test_norms_of_a_width_s_own_are_written_as_version_2_and_come_back() -> None:
    chain = with_own_norms(FIRST)
    data = dump(replace(chain, frontier=None))
    assert json.loads(split(data)[0]["__metadata__"][METADATA_KEY])["format_version"] == 2
    loaded = load(data).chain
    assert loaded.own_norms.keys() == set(chain.ladder[:2])
    for width, norms in chain.own_norms.items():
        assert all(np.array_equal(loaded.own_norms[width][name], values) for name, values in norms.items())
    assert dump(loaded) == data


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chain.safetensors"
    save(CHAIN, path)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(replace(CHAIN, name="other"), path)
    assert path.read_bytes() == BYTES
    assert list(tmp_path.iterdir()) == [path]


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
    "metadata that is no text": (
        with_tensors(lambda h: h["__metadata__"].update({METADATA_KEY: 3})),
        "one metadata key",
    ),
    "a second metadata key": (with_tensors(lambda h: h["__metadata__"].update(more="x")), "one metadata key"),
    "a future version": (with_header(lambda h: h.update(format_version=5)), "format version 5 is not one .* 1 to 4"),
    "a version that is a truth": (with_header(lambda h: h.update(format_version=True)), "format version True"),
    "a version with a fraction": (with_header(lambda h: h.update(format_version=2.5)), "format version 2.5"),
    "a version that is a list": (with_header(lambda h: h.update(format_version=[2])), "format version"),
    "fields of version 2 in version 1": (with_header(lambda h: h.update(format_version=1)), "minp"),
    "thresholds in version 1": (
        with_header(lambda h: h["frontier"].update(thresholds=[]), dump(FIRST)),
        "thresholds",
    ),
    "version 2 without its fields": (with_header(lambda h: h.update(format_version=2), dump(FIRST)), "minp"),
    "version 2 where 1 would do": (
        with_header(lambda h: h.update(frontier=None)),
        "version 2; what it holds is written in 1",
    ),
    "version 2 without thresholds": (with_header(lambda h: h["frontier"].pop("thresholds")), "thresholds"),
    "no mINP": (with_header(lambda h: h["frontier"]["widths"][1].update(minp=None)), "minp"),
    "an mINP over 100": (with_header(lambda h: h["frontier"]["widths"][1].update(minp=100.1)), "minp"),
    "a number beyond every float in a threshold": (with_text("[[null,0.48", "[[null,1e999"), "no finite number"),
    "NaN in a threshold": (with_text("[[null,0.48", "[[null,NaN"), "holds NaN"),
    "a cosine above one": (with_threshold(0, "cosine", 1.0001), "thresholds.0.cosine"),
    "a cosine below minus one": (with_threshold(1, "cosine", -1.0001), "thresholds.1.cosine"),
    "a cosine in words": (with_threshold(0, "cosine", "0.5"), "thresholds.0.cosine"),
    "a true-accept rate over 100": (with_threshold(0, "true_accept", 100.1), "thresholds.0.true_accept"),
    "a true-accept rate below 0": (with_threshold(0, "true_accept", -0.1), "thresholds.0.true_accept"),
    "a cosine without its true-accept rate": (with_threshold(0, "true_accept", None), "null in the same places"),
    "a lopsided matrix of cosines": (
        with_header(lambda h: h["frontier"]["thresholds"][0]["cosine"].pop()),
        "cosine must be 3 × 3",
    ),
    "a short row of true-accept rates": (
        with_header(lambda h: h["frontier"]["thresholds"][1]["true_accept"][2].pop()),
        "true_accept must be 3 × 3",
    ),
    "thresholds at one rate only": (with_header(lambda h: h["frontier"]["thresholds"].pop()), "false-accept rates"),
    "thresholds in another order": (with_header(lambda h: h["frontier"]["thresholds"].reverse()), "in this order"),
    "thresholds at another rate": (
        with_header(lambda h: h["frontier"]["thresholds"][0].update(false_accept_rate=0.05)),
        "false-accept rates",
    ),
    "a field of the future": (with_header(lambda h: h.update(colour="red")), "colour"),
    "a missing field": (with_header(lambda h: h.pop("license")), "license"),
    "NaN in the header": (with_header(lambda h: h["input"].update(mean=[float("nan")] * 3)), "NaN"),
    "a number beyond every float in the input": (with_text("0.485", "1e999"), "1e999, which is no finite number"),
    "a number beyond every float in the frontier": (with_text("[[50.0", "[[1e999"), "no finite number"),
    "a number beyond every float in the provenance": (with_text('"seed":0}', '"seed":-1e999}'), "no finite number"),
    "an interval over 100": (with_text("[49.5,", "[149.5,"), "map_ci95"),
    "half a character in the provenance": (with_text('"seed":0}', '"seed":"\\ud800"}'), "half a character"),
    "half a character in a name in the provenance": (with_text('"seed":0}', '"\\udfff":0}'), "half a character"),
    "provenance nested three hundred deep": (
        with_text('"seed":0}', '"seed":' + "[" * 300 + "]" * 300 + "}"),
        "provenance",
    ),
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
    "a lone number for an order": (with_array("group/stem/order", np.array(0, np.int32)), "order must hold"),
    "a lone number for splits": (with_array("group/stem/splits", np.array(0, np.int32)), "splits must hold"),
    "numbers that numpy does not have": (with_dtype("F8_E4M3"), "F8_E4M3"),
    "truncated tensors": (BYTES[:-4], "not a usable chain file"),
    "bytes behind the end": (BYTES + b"1234", "not a usable chain file"),
    "a width with some norms of its own": (
        with_names(lambda name: None if name == "norms/1x2-4-8/bn1.bias" else name, OWN),
        "bn1.bias' is missing",
    ),
    "norms of a width off the ladder": (
        with_names(lambda name: name.replace("norms/1x2-4-8", "norms/9x2-4-8"), OWN),
        "no part of a chain claims",
    ),
    "NaN in a norm": (with_value("norms/1x2-4-8/bn1.weight", float("nan"), OWN), "holds NaN"),
    "a version before its norms": (with_header(lambda h: h.update(format_version=1), OWN), "written in 2"),
    "a version behind what it holds": (
        with_header(lambda h: h.update(format_version=2), dump(replace(CHAIN, frontier=None))),
        "written in 1",
    ),
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


def test_cluster_sizes_that_are_a_table_are_refused() -> None:
    chain = pico_chain(mode="oskt", stem=4, narrowest=1, rungs=3)
    tensors = safetensors.numpy.load(dump(chain))
    tensors["group/stem/sizes"] = tensors["group/stem/sizes"].reshape(-1, 1)
    with pytest.raises(ChainFileError, match="cluster sizes"):
        load(safetensors.numpy.save(tensors, split(dump(chain))[0]["__metadata__"]))


def test_no_length_of_header_makes_a_chain_look_like_a_pickle() -> None:
    """A pickle starts with 0x80; so does a safetensors file whose header is 128 bytes long, or 384, or 640 …"""
    files = [dump(replace(CHAIN, provenance={"note": "x" * extra})) for extra in range(0, 256, 8)]
    assert any(data[0] == 0x80 for data in files)
    assert all(dump(load(data).chain) == data for data in files)


def test_a_refusal_is_short_whatever_the_file_says() -> None:
    with pytest.raises(ChainFileError) as refused:
        load(with_tensors(lambda h: h["__metadata__"].update({"x" * 10**6: "y"})))
    assert len(str(refused.value)) < 500


@pytest.mark.timeout(30)
def test_many_tensors_and_a_long_ladder_are_refused_fast() -> None:
    def crowd(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header.update({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(80_000)})
        ours = json.loads(header["__metadata__"][METADATA_KEY])
        ours["ladder"] = [f"1x1-{a}-{b}" for a in range(1, 5) for b in range(1, 65)]
        header["__metadata__"][METADATA_KEY] = json.dumps(ours)

    with pytest.raises(ChainFileError, match="no part of a chain claims"):
        load(with_tensors(crowd))


def test_a_loaded_chain_cannot_be_changed_by_who_shares_it() -> None:
    chain = load(BYTES).chain
    shared = student(chain, chain.teacher)["bn1.weight"]
    assert np.shares_memory(shared, chain.tensors["bn1.weight"])
    with pytest.raises(ValueError, match="read-only"):
        shared *= 2
    assert load_student(chain, chain.teacher).backbone.bn1.weight.requires_grad


def test_whole_numbers_in_the_header_survive_a_round_trip() -> None:
    frontier = replace(
        CHAIN.frontier,
        widths=tuple(replace(w, map=50, map_ci95=(49, 51), rank1=1, rank5=2, minp=3) for w in CHAIN.frontier.widths),
        thresholds=tuple(Thresholds(rate, ((Threshold(0, 100),) * 3,) * 3) for rate in FALSE_ACCEPT_RATES),
    )
    data = dump(replace(CHAIN, input=InputSpec(64, 32, (0, 0, 0), (1, 1, 1)), frontier=frontier))
    assert dump(load(data).chain) == data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "Demo Chain"}, "'Demo Chain' cannot be stored: header field 'name'"),
        ({"license": ""}, "license"),
        ({"provenance": {"seed": np.int64(0)}}, "int64 is not JSON"),
        ({"provenance": {"loss": float("nan")}}, "not JSON compliant"),
        ({"ladder": CHAIN.ladder[1:]}, "statistics of 1x2-4-8, which is not on its ladder"),
        (
            {"ladder": CHAIN.ladder[1:], "statistics": {}, "own_norms": with_own_norms(CHAIN).own_norms},
            "norms of 1x2-4-8",
        ),
        ({"frontier": replace(CHAIN.frontier, thresholds=())}, "false-accept rates"),
        ({"frontier": replace(FIRST.frontier, thresholds=CHAIN.frontier.thresholds)}, "minp"),
    ],
    ids=str,
)
def test_what_could_not_be_loaded_again_is_not_stored(change: dict[str, Any], reason: str) -> None:
    """After hours of training this must fail before the file is written, not when somebody reads it."""
    with pytest.raises(ChainFileError, match=reason):
        dump(replace(CHAIN, **change))


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


ODD_VALUES = (None, True, 0, -1, 2**64, 1e308, "", "\x00", "4x2-4-8", [], [[]], [0.5] * 3, {}, {"a": 1})


def places(value: object, *path: str | int) -> list[tuple[str | int, ...]]:
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inside for place in ((*path, key), *places(item, *path, key))]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_header_with_an_odd_value_loads_cleanly_or_is_refused_cleanly(data: st.DataObject) -> None:
    def change(header: Any) -> None:
        *path, last = data.draw(st.sampled_from(places(header)))
        for step in path:
            header = header[step]
        header[last] = data.draw(st.sampled_from(ODD_VALUES))

    odd = data.draw(st.sampled_from([with_header, lambda c: with_header(c, dump(FIRST)), with_tensors]))(change)
    with suppress(ChainFileError):
        stored = dump(load(odd).chain)
        assert dump(load(stored).chain) == stored


def test_an_object_that_is_no_chain_cannot_be_built() -> None:
    with pytest.raises(ChainMismatch, match="not in both"):
        replace(CHAIN, tensors={name: t for name, t in CHAIN.tensors.items() if name != "conv1.weight"})


def test_partitions_of_the_other_mode_are_no_chain() -> None:
    with pytest.raises(ChainMismatch, match="'stem' has NestedTree, but mode 'oskt' needs SharedClusters"):
        replace(CHAIN, mode="oskt")


def test_checking_a_ladder_makes_no_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut costs as much as its group is wide, and a hostile file may list many rungs of a very wide teacher."""
    chain = pico_chain(mode="oskt", stem=4, narrowest=2, rungs=3)
    monkeypatch.setattr(SharedClusters, "cut", lambda *_: pytest.fail("a cut was made"))
    assert replace(chain, name="again").ladder == chain.ladder
    with pytest.raises(CutError, match="width 1x2-4-8: group 'stem' has no cut below 2"):
        replace(chain, ladder=(Width(1), *chain.ladder))


def test_trees_over_some_channels_are_written_as_version_3_and_come_back() -> None:
    chain = pico_chain(merged_share=0.5)
    data = dump(chain)
    assert json.loads(split(data)[0]["__metadata__"][METADATA_KEY])["format_version"] == 3
    found = load(data).chain
    assert dump(found) == data
    assert [found.partitions[group].leaves for group in ("stem", "layer3", "layer4.0.a", "layer4")] == [4, 16, 32, 64]
    with pytest.raises(ChainFileError, match="version 2; what it holds is written in 3"):
        load(with_header(lambda h: h.update(format_version=2), data))


def test_an_embedding_whose_tree_leaves_channels_out_is_refused() -> None:
    partial = NestedTree(np.arange(32), np.arange(1, 16))
    with pytest.raises(ChainMismatch, match="'layer4' covers 16 of 32"):
        replace(CHAIN, partitions={**CHAIN.partitions, "layer4": partial})


def test_canonical_json_knows_no_order_and_no_nan() -> None:
    assert canonical_json({"b": 1, "a": [True, None]}) == '{"a":[true,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_the_format_guards_its_bytes() -> None:
    """A chain of integers, so that the digest depends on the format alone. A new digest is a new format version."""
    chain = integer_chain()
    first = replace(chain, frontier=as_first_measured(chain.frontier))
    assert load(dump(first)).digest == "e8593c38c5098f4591b4e40df2b3353c1059160b6478909f8a1d035330d1c725"
    norms = with_own_norms(chain).own_norms
    own = {width: {name: np.ones_like(v) for name, v in vectors.items()} for width, vectors in norms.items()}
    with_norms = replace(first, frontier=None, own_norms=own)
    assert load(dump(with_norms)).digest == "9c2c1b970f6300865a36fab98dfc52851c0ff8d58f56e22ce9c0ea928ae9d6fe"
    assert load(dump(chain)).digest == "92e0a45a26283b1dc74ad08781e5e38ed19e4982b83de8d842720efd5ccea3bb"


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
