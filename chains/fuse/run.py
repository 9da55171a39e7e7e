"""A fusion as a run with a directory: log, checkpoint, the fused teacher, and what it measures. In it:

    config.toml                    the resolved configuration
    metrics.jsonl, tensorboard/    what happened
    checkpoint-fuse.safetensors    to go on from after a kill
    teacher.safetensors            the fused teacher and its classifier: `[teacher] source` of a refinement
    report.json, curves.png        accuracy of the teacher, of each input and of all together; sha256 of every file

A teacher that ranks worse than the best of its inputs is reported and not written, unless that is asked for: then, with
`resume`, nothing is trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from chains import plots
from chains.atomic import write_whole
from chains.chain import InputSpec
from chains.data.readers import detect
from chains.errors import DataError
from chains.evaluate import evaluate_model
from chains.export import origin, save_trained
from chains.fuse.answering import Answerer, Confinement, confined
from chains.fuse.config import FusionConfig, difference, fusion_toml, read_fusion
from chains.fuse.measure import Measured, measure
from chains.fuse.objective import fuse, shows_map, usual_recipe
from chains.fuse.partials import Partial, open_partial, run_here
from chains.importers.pretraining import read_start
from chains.model import ReIDModel
from chains.pipeline import (
    CONFIG,
    IMAGENET_MEAN,
    IMAGENET_STD,
    REPORT,
    TEACHER,
    Recorder,
    changed,
    require_answers,
    require_room,
)
from chains.processes import joined
from chains.ranking import Ranking
from chains.runlog import RunLog
from chains.sources import Source, first_identities, open_source
from chains.tables import text_table
from chains.train import Run, Trained, TrainRecipe, epoch_steps, require_startable

Say = Callable[[str], None]
STAGE = "fuse"


@dataclass(frozen=True, eq=False)
class _Task:
    """A fusion with everything open. recipe: the configuration's. input: the student's. notes: for the user."""

    config: FusionConfig
    recipe: TrainRecipe
    source: Source
    partials: tuple[Partial, ...]
    input: InputSpec
    notes: tuple[str, ...]


def run_fusion(
    config: FusionConfig,
    folder: Path,
    *,
    resume: bool,
    keep_worse: bool,
    say: Say,
    steps: int | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
    moved: bool = False,
    confinement: Confinement | None = None,
) -> Mapping[str, Any] | None:
    """Fuse in `folder`; the report, `None` in every process but the first. Its `is_kept` says whether there is a
    `teacher.safetensors`. steps: instead of the recipe's; changes: of other fields of it. moved: the folder may come
    from another machine, so that its paths mean nothing here. confinement: how graphs are run, each in a process of its
    own; `None`: in this one.

    Raises `DataError` when the folder holds something and `resume` was not asked for, or when what it holds is another
    run, and what `open_partial` and the engine raise.
    """
    with ExitStack() as stack:
        with joined(config.device) as team:
            if team.is_first:
                require_room(folder, CONFIG, resume=resume)
            task = _opened(config, steps, changes, stack, confinement)
            if team.is_first:
                _claim(folder, task.config, moved=moved)
                for note in (*(f"{task.source.name}: {note}" for note in task.source.notes), *task.notes):
                    say(note)
            team.wait()
            if (known := _done(folder, keep_worse=keep_worse)) is not None:
                if team.is_first:
                    say(f"{folder} is complete; nothing is left to do")
                return known if team.is_first else None
            log = stack.enter_context(RunLog(folder)) if team.is_first else None
            trained = _train(task, folder, log, say)
        # Outside of the group: how long the others wait in it is limited, and graphs may take long to measure.
        return None if log is None else _finish(task, folder, trained, log, keep_worse=keep_worse)


def report_text(report: Mapping[str, Any]) -> str:
    """A report in words."""
    rows = [[one["file"], _rows_of(one["view"]), str(one["embedding_dim"]), *_cells(one)] for one in report["inputs"]]
    everything, fused = report["ensemble"], report["teacher"]
    rows.append(["all inputs, joined", "", str(everything["embedding_dim"]), *_cells(everything)])
    rows.append(["fused teacher", "whole", str(fused["embedding_dim"]), *_cells(fused)])
    head = f"{report['name']} on {report['dataset']}: {report['queries']} queries, {report['gallery']} gallery images"
    return f"{head}\n\n{text_table([['network', 'view', 'dim', 'mAP %', 'Rank-1'], *rows])}"


def verdict(report: Mapping[str, Any]) -> str | None:
    """What is to be said of a fused teacher that is worse than its best input; `None` of any other."""
    if not report["is_worse"]:
        return None
    best = report["inputs"][report["best_input"]]
    text = (
        f"the fused teacher is worse than its best input: mAP {report['teacher']['map']:.2f} %, and "
        f"{best['file']} alone has {best['map']:.2f} %"
    )
    if report["is_kept"]:
        return f"{text}. It was written all the same, as asked"
    return (
        f"{text}. It was not written. Train longer or a wider student, weigh the losses otherwise, leave out weak "
        "inputs; --resume --keep-worse writes it as it is, without training again"
    )


def _notes(config: FusionConfig, partials: Sequence[Partial], spec: InputSpec) -> tuple[str, ...]:
    """What was taken as known of the inputs, and where no feature maps are learnt from."""
    found = tuple(f"{partial.name}: {note}" for partial in partials for note in partial.notes)
    student = config.student
    if config.loss.map <= 0:
        return found
    if not shows_map(ReIDModel(student.architecture, student.width), spec):
        own = f"{student.architecture} pools by itself and shows no feature map"
        return (*found, f"{own}: it learns from retrieval features alone")
    silent = [partial.name for partial in partials if partial.map_shape is None]
    return (*found, *(f"{name} shows no feature map: its retrieval feature alone is learnt" for name in silent))


def _opened(
    config: FusionConfig,
    steps: int | None,
    changes: Mapping[str, Any],
    stack: ExitStack,
    confinement: Confinement | None,
) -> _Task:
    """Raises what the stages would, before anything is written. The programs that it starts end with `stack`."""
    source = open_source(config.data)
    data = config.data
    if data.kind == "auto" and data.root is not None:
        data = data.model_copy(update={"kind": detect(data.root).kind})
    data = data.model_copy(update={"height": data.size[0], "width": data.size[1]})
    recipe = changed(config.train or usual_recipe(source.train), steps, changes)
    config = config.model_copy(update={"data": data, "train": recipe})
    require_startable(source.train, recipe, config.device)
    require_answers(source)
    run = run_here if confinement is None else lambda file: _run_confined(file, confinement, stack)
    partials = tuple(open_partial(one.file, one.view, one.pixels, data.size, run) for one in config.inputs)
    spec = InputSpec(*data.size, IMAGENET_MEAN, IMAGENET_STD)
    return _Task(config, recipe, source, partials, spec, _notes(config, partials, spec))


def _run_confined(file: Path, how: Confinement, stack: ExitStack) -> Answerer:
    return stack.enter_context(confined(file, torch.get_num_threads(), how))


def _claim(folder: Path, config: FusionConfig, *, moved: bool) -> None:
    """Make `folder` the directory of this run; `moved`: wherever its paths lead. Raises `DataError` when it is
    another's."""
    folder.mkdir(parents=True, exist_ok=True)
    known = read_fusion(folder / CONFIG) if (folder / CONFIG).exists() else config
    if (different := difference(known, config, moved=moved)) is not None:
        raise DataError(f"{folder} holds another run: {different}; name another --out, or the same options")
    write_whole(folder / CONFIG, fusion_toml(config, folder).encode())


def _done(folder: Path, *, keep_worse: bool) -> Mapping[str, Any] | None:
    """The report of a run that is complete; one whose teacher shall now be written after all is not."""
    if not (folder / REPORT).exists():
        return None
    report: Mapping[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return None if keep_worse and not report["is_kept"] else report


def _train(task: _Task, folder: Path, log: RunLog | None, say: Say) -> Trained:
    config, student, output = task.config, task.config.student, task.config.output
    query, gallery = first_identities(task.source.query, task.source.gallery, config.validation_identities)

    def validate(trained: Trained) -> Mapping[str, float]:
        ranking = evaluate_model(trained.model, query, gallery, task.input)
        return {"map": ranking.map, "rank1": ranking.rank(1)}

    epoch = epoch_steps(task.source.train, task.recipe.batch)
    return fuse(
        student.architecture,
        student.width,
        task.partials,
        task.source.train,
        task.input,
        task.recipe,
        config.seed,
        Run(
            device=config.device,
            report=None if log is None else Recorder(STAGE, log, output.report_steps, say, epoch),
            checkpoint=folder / f"checkpoint-{STAGE}.safetensors",
            checkpoint_steps=output.checkpoint_steps,
            validate_steps=output.validate_steps,
        ),
        validate=validate if config.validation_identities else None,
        loss=config.loss,
        start=None if student.start is None else read_start(student.start, student.architecture),
    )


def _finish(task: _Task, folder: Path, trained: Trained, log: RunLog, *, keep_worse: bool) -> Mapping[str, Any]:
    """Measure, and write what came of it; the report last, because it makes the run complete."""
    source = task.source
    measured = measure(trained.model, task.partials, source.query, source.gallery, task.input, task.config.device)
    path, is_kept = folder / TEACHER, keep_worse or not measured.is_worse
    if is_kept:
        save_trained(trained, origin("teacher", trained.model, task.input, task.config.license), path)
    write_whole(folder / "curves.png", plots.training_curves_png(log.events()))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if is_kept else None
    report = {**_report(task, measured, trained), "is_kept": is_kept}
    report["teacher"]["sha256"] = sha256
    write_whole(folder / REPORT, (json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())
    return report


def _report(task: _Task, measured: Measured, trained: Trained) -> dict[str, Any]:
    """All figures, as JSON values, and what the teacher was made from."""
    inputs = [
        {
            "file": partial.name,
            "sha256": partial.sha256,
            "view": asdict(partial.view),
            "mean": list(partial.pixels[0]),
            "std": list(partial.pixels[1]),
            "embedding_dim": partial.embedding_dim,
            "map_shape": partial.map_shape and list(partial.map_shape),
            **_figures(ranking),
        }
        for partial, ranking in zip(task.partials, measured.inputs, strict=True)
    ]
    student = task.config.student
    return {
        "made_by": "widthwise fuse",
        "name": task.config.name,
        "dataset": task.source.name,
        "queries": len(task.source.query),
        "gallery": len(task.source.gallery),
        "teacher": {
            "architecture": student.architecture,
            "width": str(student.width),
            "embedding_dim": trained.model.backbone.channels,
            "parameters": sum(values.numel() for values in trained.model.tensors().values()),
            "identities": len(trained.classifier),
            "mean": list(task.input.mean),
            "std": list(task.input.std),
            **_figures(measured.student),
        },
        "inputs": inputs,
        "ensemble": {
            "embedding_dim": sum(partial.embedding_dim for partial in task.partials),
            **_figures(measured.ensemble),
        },
        "best_input": measured.best_input,
        "is_worse": measured.is_worse,
        "notes": list(task.notes),
    }


def _figures(ranking: Ranking) -> dict[str, float]:
    return {"map": round(ranking.map, 2), "rank1": round(ranking.rank(1), 2)}


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [f"{figures['map']:.1f}", f"{figures['rank1']:.1f}"]


def _rows_of(view: Mapping[str, Any]) -> str:
    if (view["top"], view["bottom"]) == (0, 1):
        return "whole"
    return f"rows {view['top']:.3g} to {view['bottom']:.3g}"
