"""A finetuning as a run with a directory: log, checkpoint, the student and a chain of its one width. In it:

recipe.toml                       the training recipe, as `--recipe` takes it
metrics.jsonl, tensorboard/       what happened
checkpoint-finetune.safetensors   to go on from after a kill
student.safetensors               the student, its classifier and statistics, to train on
chain.safetensors                 the student as a chain of one width: to publish, to export as ONNX
report.json, curves.png
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from chains import plots
from chains.artifact import StoredChain, save
from chains.atomic import write_whole
from chains.chain import STATISTICS, Chain
from chains.config import to_toml
from chains.cut import NestedTree
from chains.evaluate import evaluate_model, measure_frontier
from chains.export import numpy_state, origin, save_trained
from chains.finetune import finetune
from chains.model import load_student
from chains.pipeline import CHAIN, REPORT, Recorder, report_of, require_answers, require_room
from chains.processes import joined, local_device
from chains.ranking import Ranking
from chains.refine import fingerprint
from chains.runlog import RunLog
from chains.sources import Source, first_identities
from chains.train import Run, Trained, TrainRecipe, epoch_steps, require_startable
from chains.width import Width

Say = Callable[[str], None]
RECIPE, STUDENT, STAGE = "recipe.toml", "student.safetensors", "finetune"
VALIDATION_IDENTITIES = 50
REPORT_STEPS = 50


@dataclass(frozen=True, eq=False)
class Downstream:
    """What is trained on what."""

    stored: StoredChain
    width: Width
    source: Source
    recipe: TrainRecipe
    seed: int
    device: str


def finetune_run(task: Downstream, folder: Path, *, resume: bool, say: Say) -> tuple[Ranking, Ranking] | None:
    """Finetune in `folder`; accuracy before and after, `None` in every process but the first. Raises `DataError` for a
    folder that is taken, `NotCalibrated` for a width that cannot be measured before."""
    task.stored.chain.require_calibrated(task.width)
    with joined(task.device) as team, ExitStack() as stack:
        if team.is_first:
            _prepare(task, folder, resume=resume)
        team.wait()
        log = stack.enter_context(RunLog(folder)) if team.is_first else None
        trained = _train(task, folder, log, say)
        return None if log is None else _finish(task, folder, trained, log)


def chain_of(task: Downstream, trained: Trained) -> Chain:
    """The trained student as a chain that offers this one width. It has left the old chain's space."""
    old, state = task.stored.chain, numpy_state(trained.model)
    statistics = {name: values for name, values in state.items() if name.rpartition(".")[2] in STATISTICS}
    tensors = {name: values for name, values in state.items() if name not in statistics}
    sizes = old.table.group_sizes(task.width)
    return Chain(
        name=f"{old.name[:52]}-finetuned",
        architecture=old.architecture,
        mode="nested",
        teacher=task.width,
        ladder=(task.width,),
        input=old.input,
        embedding_space=f"es-{fingerprint(tensors)}",
        license=old.license,
        tensors=tensors,
        partitions={group: NestedTree(np.arange(size), np.arange(1, size)) for group, size in sizes.items()},
        statistics={task.width: statistics},
        sizes=old.sizes,
        provenance={
            "made_by": "widthwise finetune",
            "chain": old.name,
            "chain_digest": task.stored.digest,
            "images": task.source.name,
            "seed": task.seed,
            "recipe": json.loads(json.dumps(asdict(task.recipe))),
        },
    )


def _prepare(task: Downstream, folder: Path, *, resume: bool) -> None:
    require_room(folder, RECIPE, resume=resume)
    require_answers(task.source)
    require_startable(task.source.train, task.recipe, task.device)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECIPE).exists():  # a resumed run keeps its own; the engine refuses another recipe
        write_whole(folder / RECIPE, tomli_w.dumps(to_toml(asdict(task.recipe))).encode())


def _train(task: Downstream, folder: Path, log: RunLog | None, say: Say) -> Trained:
    validation = first_identities(task.source.query, task.source.gallery, VALIDATION_IDENTITIES)

    def validate(trained: Trained) -> Mapping[str, float]:
        ranking = evaluate_model(trained.model, *validation, task.stored.chain.input)
        return {"map": ranking.map, "rank1": ranking.rank(1)}

    epoch = epoch_steps(task.source.train, task.recipe.batch)
    run = Run(
        device=task.device,
        report=None if log is None else Recorder(STAGE, log, REPORT_STEPS, say, epoch),
        checkpoint=folder / f"checkpoint-{STAGE}.safetensors",
    )
    chain = task.stored.chain
    return finetune(chain, task.width, task.source.train, task.recipe, task.seed, run, validate=validate)


def _finish(task: Downstream, folder: Path, trained: Trained, log: RunLog) -> tuple[Ranking, Ranking]:
    """Measure and write what came of it."""
    place = local_device(task.device)
    old, source = task.stored.chain, task.source
    sets = (source.query, source.gallery, old.input)
    before, after = (evaluate_model(model, *sets) for model in (load_student(old, task.width).to(place), trained.model))
    chain = chain_of(task, trained)
    frontier = measure_frontier(chain, source.query, source.gallery, source.name, 0, device=task.device)
    stored = save(replace(chain, frontier=replace(frontier, trained_after_expansion=True)), folder / CHAIN)
    mark = origin("finetuned", trained.model, old.input, old.license)
    made_from: dict[str, Any] = {
        "chain": old.name,
        "chain_digest": task.stored.digest,
        "embedding_space": chain.embedding_space,
    }
    made_from["sizes"] = None if old.sizes is None else dict(old.sizes)
    save_trained(trained, mark.model_copy(update=made_from), folder / STUDENT)
    write_whole(folder / "curves.png", plots.training_curves_png(log.events()))
    report: dict[str, Any] = {"before": {"map": round(before.map, 2), "rank1": round(before.rank(1), 2)}}
    write_whole(folder / REPORT, (json.dumps({**report, **report_of(stored)}, indent=2) + "\n").encode())
    return before, after
