"""What an evaluation costs: CPU time and memory of ranking, thresholds and re-ranking at the sizes of public test sets.

Next to it the plain way, in the same run and on the same embeddings: cosines of a block of queries, then a full stable
argsort of each row (`sort`), which is only the first half of an evaluation. Embeddings are random clusters, one per
identity. Every measurement is a fresh process.

- cpu_s: process CPU time on one thread; over_sort: times that of `sort`.
- peak_mb: growth of the resident high-water mark over the embeddings, of which evaluation makes a normalised copy;
  embeddings_mb: what they take. all_scores_mb: what all scores at once would take. MB are 10^6 bytes.

    python -m benchmarks.evaluation            # writes benchmarks/results/evaluation.csv
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provision import MB, ROOT, _status_bytes, provenance
from benchmarks.setup import RESULTS, command
from chains.ranking import Floats, Truth, block_spans, l2_normalised, rank_blocks, score_blocks
from chains.rerank import Reranking, reranked_blocks
from chains.thresholds import PairCounts

SIZES = {  # queries, gallery images, identities, embedding length
    "Market-1501, ResNet-18": (3368, 15913, 750, 512),
    "Market-1501, ResNet-50": (3368, 15913, 750, 2048),
    "10k × 20k, ResNet-18": (10_000, 20_000, 1500, 512),
    "10k × 20k, ResNet-50": (10_000, 20_000, 1500, 2048),
}
CAMERAS, DISTRACTORS, SPREAD = 6, 0.1, 3.0
Embedded = tuple[Floats, Floats, Truth]


def embedded(queries: int, gallery: int, identities: int, length: int) -> Embedded:
    """Random clusters; a tenth of the gallery are distractors, pid 0."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((identities + 1, length), dtype=np.float32)
    pids = generator.integers(1, identities + 1, queries + gallery)
    pids[queries:][generator.random(gallery) < DISTRACTORS] = 0
    camids = generator.integers(0, CAMERAS, queries + gallery)
    images = np.float32(SPREAD) * generator.standard_normal((queries + gallery, length), dtype=np.float32)
    images += centres[pids]
    truth = Truth(pids[:queries], camids[:queries], pids[queries:], camids[queries:])
    return images[:queries], images[queries:], truth


def by_sort(queries: Floats, gallery: Floats, _truth: Truth) -> None:
    queries, gallery = l2_normalised(queries), l2_normalised(gallery)
    for start, stop in block_spans(len(queries), len(gallery)):
        np.argsort(-(queries[start:stop] @ gallery.T), axis=1, kind="stable")


def by_ranks(queries: Floats, gallery: Floats, truth: Truth) -> None:
    rank_blocks(score_blocks(queries, gallery, truth), truth)


def with_thresholds(queries: Floats, gallery: Floats, truth: Truth) -> None:
    counts = PairCounts(truth)
    rank_blocks(counts.watch(score_blocks(queries, gallery, truth)), truth)
    counts.threshold(1e-3)


def re_ranked(queries: Floats, gallery: Floats, truth: Truth) -> None:
    rank_blocks(reranked_blocks(queries, gallery, truth, Reranking()), truth)


WAYS: dict[str, Callable[[Floats, Floats, Truth], None]] = {
    "sort": by_sort,
    "rank": by_ranks,
    "rank and thresholds": with_thresholds,
    "re-rank": re_ranked,
}


def measure(size: str, way: str) -> dict[str, Any]:
    """One row of figures."""
    queries, gallery, truth = embedded(*SIZES[size])
    cpu_s, peak = _cost(lambda: WAYS[way](queries, gallery, truth))
    return {
        "way": way,
        "size": size,
        "queries": len(queries),
        "gallery": len(gallery),
        "dim": queries.shape[1],
        "cpu_s": round(cpu_s, 2),
        "peak_mb": round(peak / MB),
        "embeddings_mb": round((queries.nbytes + gallery.nbytes) / MB),
        "all_scores_mb": round(4 * len(queries) * len(gallery) / MB),
    }


def _cost(run: Callable[[], None]) -> tuple[float, int]:
    """(CPU seconds, bytes by which the resident high-water mark passed what was resident before). Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, begin = _status_bytes("VmRSS"), time.process_time()
    run()
    return time.process_time() - begin, _status_bytes("VmHWM") - before


def in_a_process(size: str, way: str) -> dict[str, Any]:
    """Measured in a process of its own, on one thread."""
    arguments = [sys.executable, "-m", "benchmarks.evaluation", "--measure", size, way]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time and memory of an evaluation.")
    parser.add_argument("--output", type=Path, default=RESULTS / "evaluation.csv")
    parser.add_argument("--measure", nargs=2, metavar=("SIZE", "WAY"), help="one measurement in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    known = {name: value for name, value in provenance().items() if name in ("device", "python", "numpy", "date")}
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        measured = [in_a_process(size, way) for way in WAYS]
        for row in measured:
            row["over_sort"] = round(row["cpu_s"] / measured[0]["cpu_s"], 2)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row | known | {"command": command()})
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
