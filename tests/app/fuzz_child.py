"""Mutates files and reads them, many in one process; started by test_fuzz_files.py inside the sandbox.

    python fuzz_child.py seeds first last

`seeds`: a folder with one good file per format. Writes `result.json`; `at` holds the number of the mutation in hand, so
that one that ends the process is known by its number, which makes the same bytes again.
"""

from __future__ import annotations

import io
import json
import resource
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from chains import artifact
from chains.chain import InputSpec
from chains.errors import ChainsError
from chains.importers.check import Declared, check

SEED = 4
DECLARED = Declared(input=InputSpec(32, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
FORMATS = ("safetensors", "torch", "onnx", "chain")
LARGE_BYTES = 100 * 2**20  # of one mutation: named in the result
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def mutated(content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """A change or some; most near the beginning or the end, where formats keep what they say about themselves."""
    data = bytearray(content)
    for _ in range(int(generator.choice([1, 1, 1, 2, 4]))):
        if not data:
            break
        near = min(len(data), int(generator.choice([64, 512, 4096, len(data)])))
        at = int(generator.integers(0, near))
        at = at if generator.random() < 0.6 else len(data) - 1 - at
        length = int(generator.integers(1, 64))
        match int(generator.integers(0, 8)):
            case 0:
                data[at] ^= 1 << int(generator.integers(0, 8))
            case 1:
                data[at : at + length] = generator.bytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = generator.bytes(length)
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                del data[at:]
            case 6:
                number = NUMBERS[int(generator.integers(0, len(NUMBERS)))]
                data[at : at + 8] = number.to_bytes(8, "little" if generator.random() < 0.7 else "big")
            case _:
                start = int(generator.integers(0, max(1, len(other))))
                data[at : at + length] = other[start : start + length]
    return bytes(data)


def mutated_pickle(content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """The archive whole, checksums and all, around a changed pickle or a changed record."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickles = [name for name in members if name.endswith("data.pkl")]
    chosen = pickles[0] if generator.random() < 0.8 else str(generator.choice(list(members)))
    members[chosen] = mutated(members[chosen], other, generator)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return buffer.getvalue()


def made(number: int, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """Format and bytes of the mutation of this number; always the same."""
    generator = np.random.default_rng([SEED, number])
    name = FORMATS[number % len(FORMATS)]
    other = seeds[str(generator.choice(FORMATS))]
    change = mutated_pickle if name == "torch" and generator.random() < 0.7 else mutated
    return name, change(seeds[name], other, generator)


def read(name: str, content: bytes, path: Path) -> str:
    """`valid` or the class of the refusal; anything else goes through."""
    try:
        if name == "chain":
            artifact.load(content)
        else:
            path.write_bytes(content)
            check(path, DECLARED)
    except (ChainsError, MemoryError) as error:
        return type(error).__name__
    return "valid"


def peak_bytes() -> int:
    """The most memory this process has had at once."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(folder: Path, first: int, last: int) -> None:
    seeds = {name: (folder / name).read_bytes() for name in FORMATS}
    counts: Counter[str] = Counter()
    bugs: list[dict[str, object]] = []
    large: list[dict[str, object]] = []
    slowest = 0.0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    with Path("at").open("w") as at:
        for number in range(first, last):
            at.seek(0)
            at.write(f"{number:09d}")
            at.flush()
            name, content = made(number, seeds)
            started, before = time.perf_counter(), peak_bytes()
            try:
                counts[f"{name} {read(name, content, Path('file'))}"] += 1
            except Exception:
                bugs.append({"number": number, "format": name, "error": traceback.format_exc()[-2000:]})
            slowest = max(slowest, time.perf_counter() - started)
            if peak_bytes() > before + LARGE_BYTES:
                large.append({"number": number, "format": name, "bytes": peak_bytes() - before})
    result = {"counts": counts, "bugs": bugs, "slowest_s": slowest, "peak_bytes": peak_bytes(), "large": large}
    Path("result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
