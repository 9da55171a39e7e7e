"""The job `compress`: one network for one target, from a checked teacher or a student of a chain.

    settle     what decides the result: weights, images, rights
    compress   both trainings, under torchrun; their checkpoints travel with the job. Then calibration and the report
    verify     the file loads, was measured, and its model answers in onnxruntime as in torch
    publish    the terminal chain becomes visible

The work is that of `chains.compress.folder`, in its run directory, which any worker can put together again. A job that
was killed anywhere, however often, ends with the same chain, digest for digest, on machines of one kind and number of
threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from app.db.tables import ChainRow, TeacherRow
from app.errors import JobPermanentlyFailed
from app.services.job_requests import FINETUNE_SHARE, SMALL_STEPS, CompressIn, check_license, parse
from app.terms import Rights, rights_of, strictest
from app.worker.context import StepContext
from app.worker.training import (
    CHAIN,
    METRICS,
    MOST_WARMUP,
    REPORT,
    RUN,
    RunFiles,
    chain_row,
    data_of,
    dataset_row,
    fetch_object,
    kept_chain,
    run_stage,
    teacher_row,
    verified,
)

ASKED, STUDENT, CURVES = "compression.toml", "student.safetensors", "curves.png"
TRAININGS = ("prune", "finetune")
# In the order in which they come to be: each checkpoint is of no use without what its training started from.
PASSING = tuple(f"{name}.safetensors" for name in ("start", "checkpoint-prune", "pruned", "checkpoint-finetune"))
LASTING = (ASKED, *PASSING, METRICS, STUDENT, CURVES, CHAIN, REPORT)


def settle(context: StepContext) -> dict[str, Any]:
    """What decides the result: an alias may point elsewhere when the training goes on on another worker."""
    context.report(stage="settle")
    request, dataset = context.request, dataset_row(context)
    source = teacher_row(context) if request["teacher"] is not None else chain_row(context)
    old = None if request["compatible_with"] is None else chain_row(context, "compatible_with")
    rights = strictest([rights_of(row) for row in (source, dataset, *([old] if old else []))])
    check_license(rights.license)
    return {
        "rights": asdict(rights),
        "source": _digest_of(source),
        "dataset_digest": str(dataset.digest),
        "compatible_with": old and old.digest,
        "made_from": {
            "job": context.job_id,
            **_named(source),
            "dataset": dataset.name,
            "dataset_digest": str(dataset.digest),
        },
    }


def compress(context: StepContext) -> dict[str, Any]:
    """The report, in figures. A run that is complete already is only read."""
    context.report(stage="compress")
    settled = context.outputs["settle"]
    files = RunFiles(context, context.folder / RUN, LASTING, TRAININGS)
    files.fetch()
    if not (files.folder / REPORT).exists():
        task = {**_task(context, settled), "folder": str(files.folder)}
        run_stage(context, task, processes=context.request["processes"], watch=files)
        files.keep()
    report = json.loads((files.folder / REPORT).read_text(encoding="utf-8"))
    (width,) = report["widths"]
    told = ("digest", "limits", "costs", "vanished", "teacher", "before", "compatible_with")
    return {
        "width": width["width"],
        **{name: report[name] for name in told if name in report},
        "after": {name: width[name] for name in ("map", "rank1")},
    }


def verify(context: StepContext) -> dict[str, Any]:
    """Raises `JobPermanentlyFailed` for a chain that must not be published, and where the images are not those that the
    data set's digest names any more."""
    context.report(stage="verify")
    data = data_of(context, context.outputs["settle"]["dataset_digest"])
    return verified(context, data, context.outputs["compress"]["digest"])


def publish(context: StepContext) -> dict[str, Any]:
    """The job's result. Publishing the same file again changes nothing."""
    context.report(stage="publish")
    rights = Rights(**context.outputs["settle"]["rights"])
    row = context.registry.publish(kept_chain(context).read_bytes(), rights=rights, job=context.job_id)
    context.drop_files(PASSING)
    return {
        "chain": row.name,
        "size_bytes": row.size_bytes,
        "embedding_space": row.embedding_space,
        "terms": row.terms,
        "consent_basis": row.consent_basis,
        **context.outputs["compress"],
    }


STEPS = (("settle", settle), ("compress", compress), ("verify", verify), ("publish", publish))


def trainings_of(request: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Training -> fields of its recipe that a request asks for, on top of DEAP's schedule."""
    steps, finetune_steps = request["steps"], request["finetune_steps"]
    if request["preset"] != "paper":
        steps = SMALL_STEPS if steps is None else steps
        finetune_steps = max(1, steps // FINETUNE_SHARE) if finetune_steps is None else finetune_steps
    shared = {
        "precision": request["precision"],
        "micro_batches": request["micro_batches"] or request["processes"],
        **({} if request["batch"] is None else {"batch": request["batch"]}),
    }
    rate = {} if request["learning_rate"] is None else {"lr": request["learning_rate"]}
    return {"prune": {**shared, **rate, **_lasting(steps)}, "finetune": {**shared, **_lasting(finetune_steps)}}


def _lasting(steps: int | None) -> dict[str, int]:
    """A training's length and a warm-up that fits into it; `None`: the schedule's."""
    return {} if steps is None else {"steps": steps, "warmup_steps": min(MOST_WARMUP, steps // 10)}


def _task(context: StepContext, settled: Mapping[str, Any]) -> dict[str, Any]:
    """What the stage is told to do, with the files it needs on this worker."""
    request = parse("compress", context.request)
    assert isinstance(request, CompressIn)  # noqa: S101 - by its kind
    # By the source's name, which errors tell; in a folder of its own, where it is no other file's name.
    source = context.folder / "source" / f"{request.teacher or request.chain}.safetensors"
    old = settled["compatible_with"]
    return {
        "do": "compress",
        "source": str(fetch_object(context, settled["source"], source)),
        "data": data_of(context, settled["dataset_digest"]),
        "name": request.name,
        "license": settled["rights"]["license"],
        "made_from": settled["made_from"],
        "limits": None if request.limits is None else dict(request.limits.parse().stated()),
        "width": request.width,
        "changes": trainings_of(context.request),
        "compatible_with": old and str(fetch_object(context, old, context.folder / "compatible.safetensors")),
        "seed": request.seed,
        "device": request.device,
    }


def _digest_of(source: TeacherRow | ChainRow) -> str:
    """Of the stored object: a chain's file, a teacher's weights as the check left them."""
    if isinstance(source, ChainRow):
        return source.digest
    weights = (source.report or {}).get("teacher_sha256")
    if not isinstance(weights, str):
        raise JobPermanentlyFailed(f"teacher '{source.name}' has no weights that can be compressed")
    return weights


def _named(source: TeacherRow | ChainRow) -> dict[str, str]:
    if isinstance(source, ChainRow):
        return {"chain": source.name, "chain_digest": source.digest}
    return {"teacher": source.name, "teacher_sha256": source.sha256}
