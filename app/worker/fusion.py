"""The job `fuse`: from checked teachers and a checked data set to a teacher that a chain can be made of.

    settle    what decides the result: weights of the inputs, images, rights
    fuse      training, under torchrun; its checkpoint travels with the job. Then everybody is measured
    register  the new teacher becomes visible, unless it is worse than the best of its inputs

The work is that of `chains.fuse.run`, in its run directory, which any worker can put together again. An ONNX input is
somebody else's program: it answers from a process of its own, confined as the check of a teacher is, while the training
that asks it may use GPUs, the network of torchrun and all of the machine's memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError

from app.actor import WORKER
from app.db.audit import Audit
from app.db.tables import TeacherRow
from app.db.teachers import TeacherRows
from app.errors import JobPermanentlyFailed
from app.services.job_requests import FROZEN, FuseIn, check_license, fused_rights, parse
from app.services.stored import put_and_name, require_stored
from app.services.teachers import READY
from app.worker.context import StepContext
from app.worker.datasets import verify as verify_dataset
from app.worker.sandbox import confinement
from app.worker.training import (
    METRICS,
    REPORT,
    RUN,
    RunFiles,
    data_of,
    dataset_row,
    fetch_object,
    output_of,
    recipe_of,
    run_stage,
    teacher_row,
    weights_of,
)

CONFIG, TEACHER, CHECKPOINT = "config.toml", "teacher.safetensors", "checkpoint-fuse.safetensors"
LASTING = (CONFIG, CHECKPOINT, METRICS, TEACHER, "curves.png", REPORT)
GRAPHS, NETWORKS = "graphs", "networks"  # folders of inputs; the program of an ONNX file sees the first alone
FIGURES = ("teacher", "ensemble", "best_input", "is_worse", "queries", "gallery", "notes")
ACCURACY = ("map", "rank1")
SEEN = ("view", *ACCURACY)
LONGEST_S = 30 * 24 * 3600.0  # of an ONNX input at work on every core


def settle(context: StepContext) -> dict[str, Any]:
    """What decides the result, with no path in it."""
    context.report(stage="settle")
    request, dataset = _asked(context), dataset_row(context)
    inputs = [teacher_row(context, one.teacher) for one in request.inputs]
    start = [] if request.start_from is None else [teacher_row(context, request.start_from)]
    rights = fused_rights([*inputs, *start], dataset)
    check_license(rights.license)
    return {
        "rights": asdict(rights),
        "dataset_digest": str(dataset.digest),
        "inputs": [_named(row) for row in inputs],
        "start_from": _named(start[0]) if start else None,
    }


def fuse(context: StepContext) -> dict[str, Any]:
    """The report, in figures. A run that is complete already is only read."""
    context.report(stage="fuse")
    files = RunFiles(context, context.folder / RUN, LASTING, ["fuse"])
    files.fetch()
    if not (files.folder / REPORT).exists():
        task = {**_task(context, _asked(context), context.outputs["settle"]), "folder": str(files.folder)}
        run_stage(context, task, processes=context.request["processes"], watch=files)
        files.keep()
    report = json.loads((files.folder / REPORT).read_text(encoding="utf-8"))
    named = zip(context.outputs["settle"]["inputs"], report["inputs"], strict=True)
    return {
        **{name: report[name] for name in FIGURES},
        "inputs": [{"teacher": one["teacher"], **{name: seen[name] for name in SEEN}} for one, seen in named],
    }


def register(context: StepContext) -> dict[str, Any]:
    """The job's result. Registering the same teacher again changes nothing.

    Raises `JobPermanentlyFailed` for a teacher that is worse than its best input, for a name that somebody else has
    taken, and where the images are not those that the data set's digest names any more."""
    context.report(stage="register")
    verify_dataset(context, dataset_row(context))
    fused = context.outputs["fuse"]
    if fused["is_worse"] and not context.request["keep_worse"]:
        raise JobPermanentlyFailed(_verdict(fused, context.outputs["settle"]["rights"]))
    path = context.folder / RUN / TEACHER
    if not path.exists() and not context.fetch_file(TEACHER, path):
        raise JobPermanentlyFailed("the fused teacher is not kept any more; start a new job")

    def put() -> None:
        context.keep_file(path, TEACHER)

    put_and_name(put, lambda: _record(context, _row(context, path)), again=(IntegrityError,))
    context.drop_files([CHECKPOINT])
    return {
        "teacher": context.request["name"],
        "sha256": fused["teacher"]["sha256"],
        "architecture": fused["teacher"]["architecture"],
        "width": fused["teacher"]["width"],
        "terms": context.outputs["settle"]["rights"]["terms"],
        "consent_basis": context.outputs["settle"]["rights"]["consent_basis"],
        "accuracy": {name: fused["teacher"][name] for name in ACCURACY},
        "inputs": [{name: one[name] for name in ("teacher", *ACCURACY)} for one in fused["inputs"]],
        "ensemble": {name: fused["ensemble"][name] for name in ACCURACY},
        "is_worse": fused["is_worse"],
    }


STEPS = (("settle", settle), ("fuse", fuse), ("register", register))


def _asked(context: StepContext) -> FuseIn:
    request = parse("fuse", context.request)
    assert isinstance(request, FuseIn)  # noqa: S101 - by its kind
    return request


def _named(teacher: TeacherRow) -> dict[str, Any]:
    """A teacher that goes into the new one. sha256: of what was uploaded; weights: of the file that is read."""
    return {
        "teacher": teacher.name,
        "sha256": teacher.sha256,
        "weights": weights_of(teacher),
        "is_frozen": FROZEN in (teacher.format, teacher.architecture),
        "input": {name: (teacher.input or {})[name] for name in ("mean", "std")},
    }


def _task(context: StepContext, request: FuseIn, settled: Mapping[str, Any]) -> dict[str, Any]:
    """What the stage is told to do, with the files it needs on this worker."""
    steps, changes = recipe_of(request.model_dump(mode="json"))
    student: dict[str, Any] = {"architecture": request.architecture, "width": request.width}
    if settled["start_from"] is not None:
        student["start"] = _fetched(context, settled["start_from"])
    data = data_of(context, settled["dataset_digest"])
    config = {
        "name": request.name,
        "license": settled["rights"]["license"],
        "seed": request.seed,
        "device": request.device,
        "validation_identities": request.validation_identities,
        "data": {**data, "height": request.image.height, "width": request.image.width},
        "student": student,
        "inputs": [
            {"file": _fetched(context, one), "view": asked.model_dump()["view"], "input": one["input"]}
            for one, asked in zip(settled["inputs"], request.inputs, strict=True)
        ],
        "loss": request.loss.model_dump(),
        "output": output_of(steps),
        **({} if request.preset == "usual" else {"train": {"steps": steps}}),
    }
    return {"do": "fuse", "config": config, "steps": steps, "changes": changes, "confinement": _confined(context)}


def _confined(context: StepContext) -> dict[str, Any]:
    """How the stage runs graphs. Always given: it tells a graph by its content, whatever the file was registered as."""
    memory_bytes = context.settings.teacher_check_memory_bytes
    command, environment = confinement(context.folder / GRAPHS, memory_bytes, LONGEST_S)
    return {"command": command, "environment": environment}


def _fetched(context: StepContext, named: Mapping[str, Any]) -> str:
    """A teacher's file on this worker, called as the teacher is."""
    folder, kind = (GRAPHS, "onnx") if named["is_frozen"] else (NETWORKS, "safetensors")
    return str(fetch_object(context, named["weights"], context.folder / folder / f"{named['teacher']}.{kind}"))


def _verdict(fused: Mapping[str, Any], rights: Mapping[str, str]) -> str:
    best = fused["inputs"][fused["best_input"]]
    return (
        f"the fused teacher is worse than its best input: mAP {fused['teacher']['map']:.2f} %, and teacher "
        f"'{best['teacher']}' alone has {best['map']:.2f} %. It was not registered. Train longer or a wider "
        "student, weigh the losses otherwise, leave out weak inputs, or ask with keep_worse. The file stays with this "
        f"job as {TEACHER} and can be uploaded as a teacher with {_stated(rights)}"
    )


def _stated(rights: Mapping[str, str]) -> str:
    """The rights of what was made, for whoever registers it by hand."""
    return f"license '{rights['license']}', terms '{rights['terms']}' and consent_basis '{rights['consent_basis']}'"


def _row(context: StepContext, path: Path) -> TeacherRow:
    """The new teacher, with a report as a check leaves it, and what it was made from."""
    request, settled, fused = _asked(context), context.outputs["settle"], context.outputs["fuse"]
    made, now = fused["teacher"], datetime.now(UTC)
    traced = ("teacher", "sha256", "weights")
    start = settled["start_from"]
    return TeacherRow(
        name=request.name,
        state=READY,
        sha256=made["sha256"],
        size_bytes=path.stat().st_size,
        format="safetensors",
        architecture=made["architecture"],
        width=made["width"],
        input={"height": request.image.height, "width": request.image.width, "mean": made["mean"], "std": made["std"]},
        report={
            "declared": {},
            "job": context.job_id,
            "teacher_sha256": made["sha256"],
            **{name: made[name] for name in ("embedding_dim", "parameters", "identities")},
            "neck": "own",
            "notes": fused["notes"],
            "accuracy": {
                "dataset": request.dataset,
                **{name: fused[name] for name in ("queries", "gallery")},
                **{name: made[name] for name in ACCURACY},
            },
            "made_from": {
                "job": context.job_id,
                "inputs": [
                    {**{name: one[name] for name in traced}, **{name: seen[name] for name in SEEN}}
                    for one, seen in zip(settled["inputs"], fused["inputs"], strict=True)
                ],
                "start_from": start and {name: start[name] for name in traced},
                "dataset": request.dataset,
                "dataset_digest": settled["dataset_digest"],
            },
        },
        **settled["rights"],
        created_at=now,
        updated_at=now,
    )


def _record(context: StepContext, row: TeacherRow) -> None:
    """Raises `JobPermanentlyFailed` for a name that is another's, and `ObjectNotFound` when the file was taken for
    garbage before its row could protect it."""
    with context.database.transaction() as session:
        rows = TeacherRows(session)
        known = rows.find(row.name)
        if known is None:
            rows.add(row)
            require_stored(session, context.store, row.sha256)
            Audit(session).add(WORKER, "teacher.fuse", row.name, sha256=row.sha256, job=context.job_id)
        elif (known.sha256, (known.report or {}).get("job")) != (row.sha256, context.job_id):
            raise JobPermanentlyFailed(
                f"somebody else has registered a teacher '{row.name}' meanwhile. This one stays with the job as "
                f"{TEACHER}: upload it under another name, with {_stated(context.outputs['settle']['rights'])}"
            )
