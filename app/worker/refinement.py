"""The job `refine`: from a checked teacher and a checked data set to a published chain.

    cluster    what is refined: the teacher, its classifier, the partition of every channel group
    refine     training, under torchrun; its checkpoints travel with the job
    calibrate  the statistics of every width
    evaluate   the frontier, the cut-offs, the report
    verify     the file loads, was measured, and its students run in onnxruntime
    publish    the chain becomes visible

Each step is `chains.pipeline` up to a stage, in the run directory, which any worker can put together again. What
decides the result is settled in the first step and kept in its output; so a job that was killed anywhere, however
often, ends with the same chain, digest for digest, on machines of one kind and number of threads.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.db.tables import DatasetRow, TeacherRow
from app.errors import JobPermanentlyFailed
from app.services.job_requests import RefineIn, network_of, parse
from app.terms import Rights, rights_of, strictest
from app.worker.context import StepContext
from app.worker.training import (
    CHAIN,
    METRICS,
    REPORT,
    RUN,
    RunFiles,
    data_of,
    dataset_row,
    fetch_object,
    kept_chain,
    output_of,
    recipe_of,
    run_stage,
    teacher_row,
    verified,
)

CONFIG, TEACHER, CHECKPOINT = "config.toml", "teacher.safetensors", "checkpoint-refinement.safetensors"
PICTURES = ("frontier.png", "cross_width.png", "curves.png")
LASTING = (
    *(CONFIG, TEACHER, "stage-cluster.safetensors", CHECKPOINT, METRICS),
    *("stage-refine.safetensors", "stage-calibrate.safetensors", CHAIN, REPORT, *PICTURES),
)
PASSING = ("stage-cluster.safetensors", CHECKPOINT, "stage-refine.safetensors", "stage-calibrate.safetensors")


def cluster(context: StepContext) -> dict[str, Any]:
    """Settles what decides the result; then the teacher's clusters."""
    context.report(stage="cluster")
    settled = settle(context, teacher_row(context), dataset_row(context))
    return {**settled, **_stage(context, "cluster", settled)}


def refine(context: StepContext) -> dict[str, Any]:
    return _stage(context, "refine", context.outputs["cluster"], processes=context.request["processes"])


def calibrate(context: StepContext) -> dict[str, Any]:
    return _stage(context, "calibrate", context.outputs["cluster"])


def evaluate(context: StepContext) -> dict[str, Any]:
    """The report, in figures."""
    report = _stage(context, "evaluate", context.outputs["cluster"])
    return {name: report[name] for name in ("chain", "digest", "size_bytes", "embedding_space", "teacher", "widths")}


def verify(context: StepContext) -> dict[str, Any]:
    """Raises `JobPermanentlyFailed` for a chain that must not be published, and where the images are not those that the
    data set's digest names any more."""
    context.report(stage="verify")
    data = data_of(context, context.outputs["cluster"]["dataset_digest"])
    return verified(context, data, context.outputs["evaluate"]["digest"])


def publish(context: StepContext) -> dict[str, Any]:
    """The job's result. Publishing the same file again changes nothing."""
    context.report(stage="publish")
    rights = Rights(**context.outputs["cluster"]["rights"])
    row = context.registry.publish(kept_chain(context).read_bytes(), rights=rights, job=context.job_id)
    context.drop_files(PASSING)
    measured = context.outputs["evaluate"]
    return {
        "chain": row.name,
        "digest": row.digest,
        "size_bytes": row.size_bytes,
        "embedding_space": row.embedding_space,
        "terms": row.terms,
        "consent_basis": row.consent_basis,
        "teacher": measured["teacher"],
        "widths": [{name: width[name] for name in ("width", "macs", "map", "rank1")} for width in measured["widths"]],
    }


STEPS = (
    ("cluster", cluster),
    ("refine", refine),
    ("calibrate", calibrate),
    ("evaluate", evaluate),
    ("verify", verify),
    ("publish", publish),
)


def settle(context: StepContext, teacher: TeacherRow, dataset: DatasetRow) -> dict[str, Any]:
    """What the chain is made from and by which configuration, with no path in it."""
    request = parse("refine", context.request)
    assert isinstance(request, RefineIn)  # noqa: S101 - by its kind
    rights = strictest([rights_of(teacher), rights_of(dataset)])
    weights = (teacher.report or {}).get("teacher_sha256")
    if not isinstance(weights, str) or teacher.input is None:
        raise JobPermanentlyFailed(f"teacher '{teacher.name}' has no weights that can be refined")
    made_from = {
        "job": context.job_id,
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "dataset": dataset.name,
        "dataset_digest": str(dataset.digest),
    }
    return {
        "rights": asdict(rights),
        "teacher_weights": weights,
        "dataset_digest": str(dataset.digest),
        "config": configuration(request, teacher, rights, made_from),
    }


def configuration(request: RefineIn, teacher: TeacherRow, rights: Rights, made_from: dict[str, str]) -> dict[str, Any]:
    """The run's configuration, as `chains.config` has it, without images and teacher, which lie elsewhere on every
    worker; what it asks of the recipe beyond its preset is the stage's business."""
    steps, changes = recipe_of(request.model_dump(mode="json"))
    table, full = network_of(teacher)
    ladder = request.widths(full, table)
    recipe: dict[str, Any] = {"preset": "paper"} if request.preset == "paper" else {"train": {"steps": steps}}
    return {
        "name": request.name,
        "license": rights.license,
        "seed": request.seed,
        "device": request.device,
        "made_from": made_from,
        "teacher": {"architecture": teacher.architecture, "width": teacher.width, "classifier": "auto"},
        "refinement": {"mode": request.mode, "ladder": [str(width) for width in ladder], **recipe},
        "evaluation": {"seed": request.seed, **request.evaluation.model_dump()},
        "output": output_of(steps),
        "data": {"height": (teacher.input or {})["height"], "width": (teacher.input or {})["width"]},
        "recipe": {"steps": steps, "changes": changes},
    }


def _stage(
    context: StepContext, stage: str, settled: dict[str, Any], *, processes: int | None = None
) -> dict[str, Any]:
    """The pipeline up to `stage`, in the run directory as the job knows it; what it leaves is kept."""
    context.report(stage=stage)
    files = RunFiles(context, context.folder / RUN, LASTING, ["refinement"])
    files.fetch()
    config = dict(settled["config"])
    recipe = config.pop("recipe")
    weights = fetch_object(context, settled["teacher_weights"], context.folder / "weights.safetensors")
    config["teacher"] = {**config["teacher"], "source": str(weights)}
    config["data"] = {**data_of(context, settled["dataset_digest"]), **config["data"]}
    task = {"do": "refine", "config": config, "folder": str(files.folder), "until": stage, **recipe}
    result = run_stage(context, task, processes=processes, watch=files)
    files.keep()
    return result
