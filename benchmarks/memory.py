"""What a model takes in onnxruntime, against the figure that the service answers (`memory_bytes_bound`).

    python -m benchmarks.memory             # writes benchmarks/results/memory.csv

Each model, of random weights, is loaded and run once at batch 1 in a process of its own, one thread, with onnxruntime's
defaults. `peak_bytes`: by how much the resident memory of that process rises at most, from before the session is made
to after the run; the library itself is loaded before. Linux only: the peak is the kernel's (`VmHWM`, reset in between).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.setup import RESULTS, command, write_table
from chains.architectures import architecture
from chains.artifact import StoredChain
from chains.chain import InputSpec
from chains.onnxfile import EmitOptions, plan
from chains.testing import IMAGENET_MEAN, IMAGENET_STD, unclustered_chain
from chains.width import Width

SIZE = (256, 128)


@dataclass(frozen=True)
class Network:
    """What is measured: an architecture at one width of its family's multipliers."""

    architecture: str
    stem: int
    opset: int = 17


NETWORKS = (
    *(Network("resnet18", stem) for stem in (8, 16, 64)),
    *(Network("resnet50", stem) for stem in (8, 16, 64)),
    Network("resnet50_ibn_a", 16),
    *(Network("osnet", stem) for stem in (16, 64)),
    Network("osnet_ain", 16),
    *(Network("mobilenetv2", stem) for stem in (16, 32)),
    Network("msinet", 64),
    *(Network("vit_small", stem) for stem in (96, 168, 384)),
    Network("vit_small", 96, opset=11),
)


def main() -> None:
    options = parse()
    rows = [measured(network) for network in NETWORKS]
    for row in rows:
        print({name: row[name] for name in ("architecture", "width", "bound_bytes", "peak_bytes", "ratio")}, flush=True)
    write_table(options.results, rows)


def measured(network: Network) -> dict[str, object]:
    stored = random_chain(network)
    width = stored.chain.teacher
    planned = plan(stored, width, EmitOptions(opset=network.opset))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(b"".join(planned.chunks()))
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(file)], capture_output=True, text=True, check=True, timeout=600
        )
    bound, peak = planned.costs.memory_bytes_bound, int(json.loads(done.stdout))
    return {
        "architecture": network.architecture,
        "width": str(width),
        "opset": network.opset,
        "bound_bytes": bound,
        "peak_bytes": peak,
        "ratio": round(peak / bound, 2),
        "command": command(),
    }


def random_chain(network: Network) -> StoredChain:
    """A chain of random weights that offers this one width."""
    table = architecture(network.architecture)
    width, (height, image_width) = Width(network.stem, table.multipliers), table.input_size or SIZE
    spec = InputSpec(height, image_width, IMAGENET_MEAN, IMAGENET_STD)
    chain = unclustered_chain(table, (width,), spec)
    return StoredChain(chain, hashlib.sha256(table.name.encode()).hexdigest(), 0)


RUN = """
import sys
import numpy as np
import onnxruntime

def kilobytes(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what))

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = kilobytes("VmRSS:")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
shape = [1 if isinstance(side, str) else side for side in session.get_inputs()[0].shape]
session.run(None, {"images": np.zeros(shape, np.float32)})
print(1024 * (kilobytes("VmHWM:") - before))
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "memory.csv")
    return parser.parse_args()


if __name__ == "__main__":
    main()
