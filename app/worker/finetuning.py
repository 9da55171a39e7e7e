"""The job `finetune`: one student of a chain, trained on a data set by the OSKT paper's protocol.

The student leaves the chain's embedding space. It is not published: it stays with the job as `student.safetensors`, to
train on, as `student.onnx`, to run, and as a chain of its one width.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from app.worker.context import StepContext
from app.worker.datasets import verify as verify_dataset
from app.worker.measuring import inherited
from app.worker.training import (
    CHAIN,
    METRICS,
    REPORT,
    RUN,
    RunFiles,
    chain_row,
    data_of,
    dataset_row,
    fetch_object,
    kept_chain,
    recipe_of,
    run_stage,
)

RECIPE, CHECKPOINT, STUDENT, ONNX = (
    *("recipe.toml", "checkpoint-finetune.safetensors", "student.safetensors"),
    "student.onnx",
)
LASTING = (RECIPE, CHECKPOINT, METRICS, STUDENT, "curves.png", CHAIN, REPORT)


def settle(context: StepContext) -> dict[str, Any]:
    """What decides the result: an alias may point elsewhere when the training goes on on another worker."""
    chain, dataset = chain_row(context), dataset_row(context)
    return {
        "chain": chain.name,
        "chain_digest": chain.digest,
        "dataset_digest": str(dataset.digest),
        "rights": asdict(inherited(chain, dataset)),
    }


def finetune(context: StepContext) -> dict[str, Any]:
    """Trains; a run that is complete already is only read."""
    context.report(stage="finetune")
    request, settled = context.request, context.outputs["settle"]
    files = RunFiles(context, context.folder / RUN, LASTING, ["finetune"])
    files.fetch()
    if not (files.folder / REPORT).exists():
        steps, changes = recipe_of(request)
        task = {
            "do": "finetune",
            "chain": str(fetch_object(context, settled["chain_digest"], context.folder / "subject.safetensors")),
            "data": data_of(context, settled["dataset_digest"]),
            "seed": request["seed"],
            "device": request["device"],
            "license": settled["rights"]["license"],
            "folder": str(files.folder),
            "width": request["width"],
            "preset": "paper" if request["preset"] == "paper" else None,
            "steps": steps,
            "changes": changes,
        }
        run_stage(context, task, processes=request["processes"], watch=files)
        verify_dataset(context, dataset_row(context))
        files.keep()
    report = json.loads((files.folder / REPORT).read_text(encoding="utf-8"))
    (width,) = report["widths"]
    return {
        **settled,
        "width": request["width"],
        "dataset": request["dataset"],
        "before": report["before"],
        "after": {name: width[name] for name in ("map", "rank1")},
    }


def export(context: StepContext) -> dict[str, Any]:
    """The job's result, once the student is there as ONNX too."""
    context.report(stage="export")
    out = context.folder / ONNX
    task = {"do": "export", "chain": str(kept_chain(context)), "width": context.request["width"], "out": str(out)}
    run_stage(context, task)
    sha256 = context.keep_file(out, ONNX)
    return {**context.outputs["finetune"], "files": [STUDENT, ONNX, CHAIN, REPORT], "onnx_sha256": sha256}


STEPS = (("settle", settle), ("finetune", finetune), ("export", export))
