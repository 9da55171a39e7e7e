"""What one request for a model costs: CPU time and memory, next to a memcpy of the same bytes.

Three ways to get the ONNX file of one width from a chain that is in memory: `stream` (chains.onnxfile, what the service
does), `helper` (expand all, `onnx.helper`, `SerializeToString`) and `torch` (expand all, build the module,
`torch.onnx.export`). Sockets are left out. Every measurement is a fresh process:

- cpu_ms: process CPU time, median of warm runs; memcpy_ms: the same for `np.copyto` of as many bytes.
- peak_rss_mb: growth of the resident high-water mark in the first run, layout and all; peak_heap_mb: tracemalloc's peak
  in a warm run. The chain itself was loaded before. MB are 10^6 bytes.
- layout_ms: CPU time of a plan that is not cached; first_byte_ms: wall time to the first chunk of one that is.
- over_chain_memcpy: CPU time over a memcpy of the chain's own weights: a width in between reads all of them.

    python -m benchmarks.provision            # writes benchmarks/results/provision.csv; exits 1 when the bar is missed

The bar: at full width of the ResNet-50 (94 MB), `stream` takes at most 5 memcpys of CPU and 16 MB of memory. That chain
has random weights, and Ward trees of them.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from chains.artifact import StoredChain, load, save
from chains.onnxfile import EmitOptions, lay_out, plan
from chains.width import Width

ROOT = Path(__file__).resolve().parent.parent
DEMO_CHAIN = ROOT / "chains" / "demo" / "synthetic-r18.safetensors"
RESULTS = Path(__file__).resolve().parent / "results" / "provision.csv"
RUNS = {"stream": 15, "helper": 5, "torch": 3}
MAX_OVER_MEMCPY, MAX_PEAK_MB = 5.0, 16.0
MB = 1e6


# --- the three ways; each returns the number of bytes it made


def by_stream(stored: StoredChain, width: Width) -> int:
    return sum(len(chunk) for chunk in plan(stored, width).chunks())


def by_helper(stored: StoredChain, width: Width) -> int:
    """The model of our own plan, put together by onnx's helper from whole arrays."""
    from onnx import helper, numpy_helper

    from chains import onnxgraph
    from chains.onnxweights import Weight, initialisers, lift_initialiser

    chain, options = stored.chain, onnxgraph.EmitOptions()
    constants = [
        numpy_helper.from_array(
            _whole(stored, constant) if isinstance(constant, Weight) else constant.values, constant.name
        )
        for constant in (*initialisers(chain, width, chain.cuts(width)), lift_initialiser(chain, width))
    ]
    images = helper.make_tensor_value_info("images", 1, ["batch", 3, chain.input.height, chain.input.width])
    embedding = helper.make_tensor_value_info("embedding", 1, ["batch", chain.embedding_dim])
    nodes = list(onnxgraph.nodes(chain.table, options, is_lifted=True))
    graph = helper.make_graph(nodes, chain.architecture, [images], [embedding], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", options.opset)])
    return len(model.SerializeToString())


def _whole(stored: StoredChain, weight: Any) -> Any:
    from chains.expand import merge

    return merge(stored.chain.tensors[weight.name], weight.rows, weight.columns) * weight.scale


def by_torch(stored: StoredChain, width: Width) -> int:
    """The exporter that needs nothing but torch: the one that traces."""
    import torch

    from chains.model import ReIDModel, load_student

    class Embedder(torch.nn.Module):
        def __init__(self, model: ReIDModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model.embed(images)

    embedder = Embedder(load_student(stored.chain, width)).eval()
    images = torch.zeros(1, 3, stored.chain.input.height, stored.chain.input.width)
    file: Any = io.BytesIO()
    warnings.simplefilter("ignore", DeprecationWarning)  # that this exporter is the older one
    torch.onnx.export(embedder, (images,), file, dynamo=False, opset_version=17, input_names=["images"])
    return int(file.tell())


WAYS: dict[str, Callable[[StoredChain, Width], int]] = {"stream": by_stream, "helper": by_helper, "torch": by_torch}


# --- measuring, in a process of its own


def measure(way: str, path: Path, width: Width) -> dict[str, Any]:
    """One row of figures. The first run is the cold one that memory is taken from; time is taken from those after."""
    stored = load(path)
    make = WAYS[way]
    if way == "torch":
        import torch

        torch.set_num_threads(1)
    model_bytes, peak_rss = _resident_growth(lambda: make(stored, width))
    cpu_ms = _cpu_ms(lambda: make(stored, width), RUNS[way])
    memcpy_ms = _memcpy_ms(model_bytes)
    chain_bytes = sum(tensor.nbytes for tensor in stored.chain.tensors.values())
    return {
        "model_bytes": model_bytes,
        "cpu_ms": round(cpu_ms, 3),
        "memcpy_ms": round(memcpy_ms, 4),
        "over_memcpy": round(cpu_ms / memcpy_ms, 1),
        "over_chain_memcpy": round(cpu_ms / _memcpy_ms(chain_bytes), 1),
        "layout_ms": round(_layout_ms(stored, width), 2) if way == "stream" else "",
        "first_byte_ms": round(_first_byte_ms(stored, width), 2) if way == "stream" else "",
        "peak_rss_mb": round(peak_rss / MB, 1),
        "peak_heap_mb": round(_heap_peak(lambda: make(stored, width)) / MB, 1),
    }


def _cpu_ms(run: Callable[[], Any], runs: int) -> float:
    times = []
    for _ in range(runs):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return 1e3 * median(times)


def _memcpy_ms(size: int) -> float:
    """CPU time to copy `size` bytes between two arrays that were touched before."""
    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    repeats = max(1, 10_000_000 // size)  # a single small copy is too short to time

    def copy() -> None:
        for _ in range(repeats):
            np.copyto(target, source)

    return _cpu_ms(copy, runs=31) / repeats


def _layout_ms(stored: StoredChain, width: Width) -> float:
    """CPU time of what a plan costs when it is not cached."""
    return _cpu_ms(lambda: lay_out(stored, width, EmitOptions()), runs=15)


def _first_byte_ms(stored: StoredChain, width: Width) -> float:
    """Wall time to the first chunk, the layout cached."""
    times = []
    for _ in range(31):
        begin = time.perf_counter()
        next(plan(stored, width).chunks())
        times.append(time.perf_counter() - begin)
    return 1e3 * median(times)


def _resident_growth(run: Callable[[], int]) -> tuple[int, int]:
    """(what `run` returns, bytes by which the resident high-water mark passed what was resident before). Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    made = run()
    return made, _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _heap_peak(run: Callable[[], Any]) -> int:
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# --- what is measured


def cases(chains: dict[str, Path]) -> Iterator[tuple[str, str, Width]]:
    """(chain, way, width): every rung streamed; the two others at the narrowest, the middle and full width."""
    for name, path in chains.items():
        ladder = load(path).chain.ladder
        for width in ladder:
            yield name, "stream", width
        for way in ("helper", "torch"):
            for width in (ladder[0], ladder[len(ladder) // 2], ladder[-1]):
                yield name, way, width


def random_resnet50(folder: Path) -> Path:
    from chains.testing import pico_chain

    chain = pico_chain(
        architecture_name="resnet50", stem=64, narrowest=16, rungs=7, height=256, width=128, name="random-r50"
    )
    return _saved(chain, folder / "random-r50.safetensors")


def random_resnet18(folder: Path) -> Path:
    """Of the demo chain's shape, for before there is one."""
    from chains.testing import pico_chain

    chain = pico_chain(stem=16, narrowest=4, rungs=7, height=128, width=64, name="random-r18")
    return _saved(chain, folder / "random-r18.safetensors")


def _saved(chain: Any, path: Path) -> Path:
    save(chain, path)
    return path


def provenance() -> dict[str, str]:
    names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "device": f"{' '.join(names[0].split())}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "onnx", "torch")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def run_case(way: str, path: Path, width: Width) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.provision"]
    arguments = ["--measure", way, "--chain", str(path), "--width", str(width)]
    done = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE, cwd=ROOT)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def misses(rows: list[dict[str, Any]]) -> list[str]:
    """What the bar asks of the ResNet-50 at full width and did not get."""
    full = max(
        (row for row in rows if (row["chain"], row["way"]) == ("random-r50", "stream")), key=lambda r: r["model_bytes"]
    )
    bars = {"over_memcpy": MAX_OVER_MEMCPY, "peak_rss_mb": MAX_PEAK_MB, "peak_heap_mb": MAX_PEAK_MB}
    return [f"{name} is {full[name]}, the bar {bar}" for name, bar in bars.items() if full[name] > bar]


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU time and memory of one request for a model.")
    parser.add_argument("--without-demo", action="store_true", help="a random chain of the demo chain's shape instead")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=WAYS, help="one measurement in this process, as JSON")
    parser.add_argument("--chain", type=Path)
    parser.add_argument("--width", type=Width.parse)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.chain, options.width)))
        return 0
    if not options.without_demo and not DEMO_CHAIN.exists():
        parser.error(f"there is no {DEMO_CHAIN.relative_to(ROOT)}; --without-demo measures a random chain of its shape")
    with tempfile.TemporaryDirectory() as folder:
        small = random_resnet18(Path(folder)) if options.without_demo else DEMO_CHAIN
        return report({small.stem: small, "random-r50": random_resnet50(Path(folder))}, options.output)


def report(chains: dict[str, Path], output: Path) -> int:
    """Measure everything, print and write it; 1 when the bar is missed."""
    rows = []
    for chain, way, width in cases(chains):
        row = {"chain": chain, "way": way, "width": str(width), **run_case(way, chains[chain], width)}
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row | provenance())
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for miss in misses(rows):
        print(f"missed: {miss}", file=sys.stderr)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
