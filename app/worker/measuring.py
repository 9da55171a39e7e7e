"""The jobs `calibrate` and `evaluate`: a chain looked at on other images, and published again where that is asked for.

Both may leave a new chain of the same tensors in the same embedding space. It is published as any chain is: measured
and verified first. What is not published stays as files of the job.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.db.tables import ChainRow, DatasetRow
from app.errors import JobPermanentlyFailed
from app.services.job_requests import FROZEN, check_license
from app.terms import Rights, rights_of, strictest
from app.worker.context import StepContext
from app.worker.sandbox import run_sandboxed
from app.worker.training import (
    CHAIN,
    REPORT,
    RUN,
    chain_row,
    data_of,
    dataset_row,
    fetch_object,
    kept_chain,
    run_stage,
    teacher_row,
    verified,
    weights_of,
    without_folders,
)

CALIBRATED = "calibrated.safetensors"
TABLES = (REPORT, "widths.csv", "frontier.png", "cross_width.png")
LONGEST_S = 24 * 3600.0  # of an uploaded ONNX file over a whole data set


def calibrate(context: StepContext) -> dict[str, Any]:
    """New statistics for every width, on training images."""
    context.report(stage="calibrate")
    request, settled = context.request, _settled(context)
    out = context.folder / CALIBRATED
    task = {"do": "calibrate", **_on_chain(context, settled), "out": str(out), "images": request["images"]}
    made = run_stage(context, task)
    context.keep_file(out, CALIBRATED)
    return {**settled, **made}


def measure_calibrated(context: StepContext) -> dict[str, Any]:
    """The new chain's frontier on the same data set's test images."""
    context.report(stage="evaluate")
    out = context.folder / CALIBRATED
    if not out.exists() and not context.fetch_file(CALIBRATED, out):
        raise JobPermanentlyFailed("the calibrated chain is not kept any more; start a new job")
    settled = context.outputs["calibrate"]
    return _measured(context, settled, out, rerank=False)


def evaluate(context: StepContext) -> dict[str, Any]:
    """Of a chain its frontier, of a teacher its accuracy."""
    context.report(stage="evaluate")
    if context.request["teacher"] is not None:
        return _measured_teacher(context)
    settled = _settled(context)
    chain = fetch_object(context, settled["chain_digest"], context.folder / "subject.safetensors")
    return {**settled, **_measured(context, settled, chain, rerank=context.request["rerank"])}


def verify(context: StepContext) -> dict[str, Any]:
    """Only of a chain that will be published."""
    settled = _first(context)
    if context.request["name"] is None:
        return {}
    context.report(stage="verify")
    return verified(context, data_of(context, settled["dataset_digest"]), context.outputs["evaluate"]["digest"])


def publish(context: StepContext) -> dict[str, Any]:
    """The job's result. Publishing the same file again changes nothing."""
    measured = context.outputs["evaluate"]
    shown = {name: value for name, value in measured.items() if name not in ("rights", "made_from", "license")}
    if context.request["name"] is None:
        return {**shown, "published": False}
    context.report(stage="publish")
    rights = Rights(**_first(context)["rights"])
    row = context.registry.publish(kept_chain(context).read_bytes(), rights=rights, job=context.job_id)
    return {**shown, "chain": row.name, "digest": row.digest, "published": True}


CALIBRATE = (("calibrate", calibrate), ("evaluate", measure_calibrated), ("verify", verify), ("publish", publish))
EVALUATE = (("evaluate", evaluate), ("verify", verify), ("publish", publish))


def inherited(chain: ChainRow, dataset: DatasetRow) -> Rights:
    """What may be done with something made from both. Raises `JobImpossible` for a licence no chain file can hold."""
    rights = strictest([rights_of(chain), rights_of(dataset)])
    check_license(rights.license)
    return rights


def _settled(context: StepContext) -> dict[str, Any]:
    """What decides the result, of rows that may have changed when the step runs again on another worker."""
    chain, dataset = chain_row(context), dataset_row(context)
    rights = inherited(chain, dataset)
    made_from = {"job": context.job_id, "chain": chain.name, "dataset": dataset.name}
    return {
        "chain_digest": chain.digest,
        "dataset_digest": str(dataset.digest),
        "rights": asdict(rights),
        "made_from": {**made_from, "dataset_digest": str(dataset.digest)},
    }


def _first(context: StepContext) -> Mapping[str, Any]:
    """The output of the step that settled what decides the result."""
    settled: Mapping[str, Any] = context.outputs.get("calibrate") or context.outputs["evaluate"]
    return settled


def _on_chain(context: StepContext, settled: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a stage's task that says on which chain, and how a new one is to be called."""
    request = context.request
    chain = fetch_object(context, settled["chain_digest"], context.folder / "subject.safetensors")
    renamed = {"license": settled["rights"]["license"], "made_from": settled["made_from"]}
    return {
        "chain": str(chain),
        "data": data_of(context, settled["dataset_digest"]),
        "seed": request["seed"],
        "device": request["device"],
        "name": request["name"],
        **(renamed if request["name"] is not None else {}),
    }


def _measured(context: StepContext, settled: Mapping[str, Any], chain: Path, *, rerank: bool) -> dict[str, Any]:
    """The report in figures; it, its table, its pictures and the chain with the frontier are kept with the job."""
    folder = context.folder / RUN
    task = {"do": "evaluate", **_on_chain(context, settled), "chain": str(chain), "folder": str(folder)}
    report = run_stage(context, {**task, "rerank": rerank})
    for name in (CHAIN, *TABLES):
        context.keep_file(folder / name, name)
    kept = ("chain", "digest", "size_bytes", "embedding_space", "dataset", "queries", "gallery", "widths", "cross_map")
    return {name: report[name] for name in kept}


def _measured_teacher(context: StepContext) -> dict[str, Any]:
    teacher, dataset = teacher_row(context), dataset_row(context)
    is_frozen = FROZEN in (teacher.format, teacher.architecture)
    # In a folder of its own: an ONNX file of somebody else's runs where nothing but that can be written.
    folder = context.folder / "teacher"
    path = fetch_object(context, weights_of(teacher), folder / ("teacher.onnx" if is_frozen else "teacher.safetensors"))
    data = data_of(context, str(dataset.digest))
    task = {
        "do": "evaluate-teacher",
        "teacher": str(path),
        "data": data,
        "input": {name: (teacher.input or {})[name] for name in ("height", "width", "mean", "std")},
        "rerank": context.request["rerank"],
        "seed": context.request["seed"],
        "device": context.request["device"],
    }
    figures = _confined(context, task, folder) if is_frozen else run_stage(context, task)
    (folder / REPORT).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    context.keep_file(folder / REPORT, REPORT)
    return {"teacher": teacher.name, "dataset_digest": str(dataset.digest), **figures}


def _confined(context: StepContext, task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """As `run_stage`, without network, with little memory, in a process that can write nowhere but in `folder`."""
    task_file, result_file = folder / "task.json", folder / "result.json"
    result_file.unlink(missing_ok=True)
    task_file.write_text(json.dumps(task), encoding="utf-8")
    done = run_sandboxed(
        [sys.executable, "-m", "chains.stages", str(task_file), str(result_file)],
        folder=folder,
        memory_bytes=context.settings.teacher_check_memory_bytes,
        seconds=LONGEST_S,
        readable=[Path(task["data"]["root"])],
        on_line=lambda line: context.log(without_folders(line, context)),
        tick=context.check_cancelled,
    )
    result: dict[str, Any] = json.loads(result_file.read_bytes()) if result_file.exists() else {}
    if done.returncode != 0 or "refused" in result:
        said = result.get("refused") or (done.lines[-1] if done.lines else "it said nothing")
        why = f"was stopped for {done.stopped}" if done.stopped else f"failed: {said}"
        raise JobPermanentlyFailed(without_folders(f"the ONNX file {why}"[:2000], context))
    return result
