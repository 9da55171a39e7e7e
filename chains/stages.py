"""One piece of work in a process of its own, described by a file: what the service's workers start.

    python -m chains.stages TASK.json RESULT.json
    torchrun --nproc-per-node 4 -m chains.stages TASK.json RESULT.json

TASK.json says what to `do` and with which files; the first process writes what came of it to RESULT.json. The work is
that of `chains.pipeline` and of the research commands, nothing is done differently here. A refusal is one line on
standard error, the same text as `refused` in RESULT.json, and status 2.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from chains import pipeline
from chains.artifact import StoredChain, save
from chains.atomic import write_whole
from chains.budget import Limits
from chains.calibrate import calibrate
from chains.chain import Chain, Floats, InputSpec
from chains.commands import comparison_csv, figures, rank_embedded, with_frontier, write_plots
from chains.compress.folder import Asked, compress_run
from chains.compress.objective import DEAP_BATCH
from chains.compress.run import Stage as Training
from chains.config import DataConfig, parse_config
from chains.data.batches import BatchRecipe
from chains.data.images import Images, chunks
from chains.downstream import Downstream, finetune_run
from chains.errors import ChainsError, DataError
from chains.evaluate import evaluate_model
from chains.export import read_exported
from chains.fuse.answering import Confinement
from chains.fuse.config import parse_fusion
from chains.fuse.run import run_fusion
from chains.importers.frozen import embed_frozen, read_graph
from chains.model import normalise
from chains.onnxfile import EmitOptions
from chains.onnxfile import write as write_onnx
from chains.pipeline import Stage, load_chain, report_of
from chains.processes import local_device
from chains.rerank import Reranking
from chains.sources import Source, choose, open_source, sized
from chains.train import TrainRecipe, paper_recipe
from chains.verify import verify
from chains.width import Width

Result = Mapping[str, Any]
TABLE = "widths.csv"
USUAL_BATCH = BatchRecipe()
FROZEN_BATCH = 64  # images that an ONNX teacher gets at once


class _Task(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RefineTask(_Task):
    """`chains.pipeline.run_refinement` with these arguments; `folder` may come from another machine. config: as in the
    TOML file, with absolute paths. changes: fields of the refinement's recipe."""

    do: Literal["refine"] = "refine"
    config: dict[str, Any]
    folder: Path
    until: Stage
    steps: int | None = None
    changes: dict[str, Any] = Field(default_factory=dict)


class _OnChain(_Task):
    """`chain`: its file. `name`, `license`, `made_from`: of the chain that is written, where it gets others."""

    chain: Path
    data: DataConfig
    seed: int = 0
    device: str = "cpu"
    name: str | None = None
    license: str | None = None
    made_from: dict[str, str] = Field(default_factory=dict)


class CalibrateTask(_OnChain):
    """A chain with new statistics, at `out`."""

    do: Literal["calibrate"] = "calibrate"
    out: Path
    images: int = 1024


class EvaluateTask(_OnChain):
    """A chain measured: report, table and pictures in `folder`, and there the chain with its frontier."""

    do: Literal["evaluate"] = "evaluate"
    folder: Path
    rerank: bool = False


class EvaluateTeacherTask(_Task):
    """A teacher measured: an exported network, or an ONNX file that wants to see `input`."""

    do: Literal["evaluate-teacher"] = "evaluate-teacher"
    teacher: Path
    data: DataConfig
    input: dict[str, Any]
    rerank: bool = False
    seed: int = 0
    device: str = "cpu"


class VerifyTask(_Task):
    """`chains.verify.verify` on some gallery images."""

    do: Literal["verify"] = "verify"
    chain: Path
    data: DataConfig
    images: int = 8
    seed: int = 0


class FinetuneTask(_OnChain):
    """A student trained in `folder`, see `chains.downstream`. preset: "paper", or none and then `steps`."""

    do: Literal["finetune"] = "finetune"
    folder: Path
    width: str
    preset: Literal["paper"] | None = "paper"
    steps: int | None = None
    changes: dict[str, Any] = Field(default_factory=dict)


class CompressTask(_Task):
    """`chains.compress.folder.compress_run` with these arguments. limits: those that are stated; `None`: none. changes:
    fields of the recipe's trainings, by stage."""

    do: Literal["compress"] = "compress"
    source: Path
    data: DataConfig
    folder: Path
    name: str
    license: str
    made_from: dict[str, str]
    limits: dict[str, int] | None = None
    width: str | None = None
    changes: dict[Training, dict[str, Any]] = Field(default_factory=dict)
    compatible_with: Path | None = None
    seed: int = 0
    device: str = "cpu"


class FuseTask(_Task):
    """`chains.fuse.run.run_fusion` with these arguments; `folder` may come from another machine. config: as in the TOML
    file, with absolute paths. changes: fields of the recipe. The teacher is written also where it is worse than its
    best input: the report says so, and whoever asked decides."""

    do: Literal["fuse"] = "fuse"
    config: dict[str, Any]
    folder: Path
    steps: int | None = None
    changes: dict[str, Any] = Field(default_factory=dict)
    confinement: Confinement | None = None


class ExportTask(_Task):
    """The student of one width as an ONNX file, at `out`."""

    do: Literal["export"] = "export"
    chain: Path
    width: str
    out: Path


Task = Annotated[
    RefineTask
    | CalibrateTask
    | EvaluateTask
    | EvaluateTeacherTask
    | VerifyTask
    | FinetuneTask
    | CompressTask
    | FuseTask
    | ExportTask,
    Field(discriminator="do"),
]
_TASK: TypeAdapter[Task] = TypeAdapter(Task)


def refine(task: RefineTask) -> Result | None:
    """Name, size and digest of the chain as the stage leaves it; of a complete run its report."""
    config = parse_config(task.config, "the request", task.folder)
    stored = pipeline.run_refinement(
        config,
        task.folder,
        resume=True,
        say=_say,
        steps=task.steps,
        changes=_recipe_changes(task.changes),
        until=task.until,
        moved=True,
    )
    if stored is None:
        return None
    if task.until == "evaluate":
        report: Result = json.loads((task.folder / pipeline.REPORT).read_text())
        return report
    return _described(stored)


def calibrate_chain(task: CalibrateTask) -> Result:
    stored = load_chain(task.chain)
    source = _images_for(stored.chain, task.data)
    chain = calibrate(stored.chain, choose(source.train, task.images, task.seed), task.device)
    note = {"images": source.name, "count": task.images, "seed": task.seed, "chain_digest": stored.digest}
    return _described(save(_renamed(chain, task, {"calibrated_on": note}), task.out))


def evaluate_chain(task: EvaluateTask) -> Result:
    stored = load_chain(task.chain)
    source = _images_for(stored.chain, task.data)
    measured = with_frontier(stored, source, (), rerank=task.rerank, seed=task.seed, device=task.device)
    chain = _renamed(measured.chain, task, {})
    task.folder.mkdir(parents=True, exist_ok=True)
    written = save(chain, task.folder / pipeline.CHAIN)
    report = report_of(written)
    write_whole(task.folder / pipeline.REPORT, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    write_whole(task.folder / TABLE, comparison_csv([report]).encode())
    write_plots(task.folder, chain)
    return report


def evaluate_teacher(task: EvaluateTeacherTask) -> Result:
    source = open_source(sized(task.data, task.input["height"], task.input["width"]))
    pipeline.require_answers(source)
    if task.teacher.suffix == ".onnx":
        spec = InputSpec(task.input["height"], task.input["width"], tuple(task.input["mean"]), tuple(task.input["std"]))
        graph = read_graph(task.teacher)

        def embedded(images: Images) -> Floats:
            rows = (embed_frozen(graph, normalise(pixels, spec).numpy()) for pixels in chunks(images, FROZEN_BATCH))
            whole: Floats = np.concatenate(list(rows))
            return whole

        ranking = rank_embedded(embedded, source, rerank=task.rerank)
    else:
        exported = read_exported(task.teacher)
        model = exported.model.to(local_device(task.device))
        reranking = Reranking() if task.rerank else None
        ranking = evaluate_model(model, source.query, source.gallery, exported.origin.input, reranking)
    counts = {"queries": len(source.query), "gallery": len(source.gallery)}
    return {"dataset": source.name, **counts, "reranked": task.rerank, **figures(ranking, task.seed)}


def verify_chain(task: VerifyTask) -> Result:
    stored = load_chain(task.chain)
    source = _images_for(stored.chain, task.data)
    found = verify(stored, choose(source.gallery, task.images, task.seed))
    differences = {str(width): difference for width, difference in found.largest_difference.items()}
    return {**_described(stored), "images": found.images, "largest_difference": differences}


def finetune(task: FinetuneTask) -> Result | None:
    """The run's report."""
    stored = load_chain(task.chain)
    stored = replace(stored, chain=replace(stored.chain, license=task.license or stored.chain.license))
    source = _images_for(stored.chain, task.data)
    recipe = _finetune_recipe(task, source)
    chosen = Downstream(stored, Width.parse(task.width), source, recipe, task.seed, task.device)
    if finetune_run(chosen, task.folder, resume=True, say=_say) is None:
        return None
    report: Result = json.loads((task.folder / pipeline.REPORT).read_text())
    return report


def compress(task: CompressTask) -> Result | None:
    """The run's report."""
    asked = Asked(
        task.source,
        task.data,
        limits=None if task.limits is None else Limits(**task.limits),
        width=task.width,
        compatible_with=task.compatible_with,
        name=task.name,
        seed=task.seed,
        device=task.device,
        changes={stage: _recipe_changes(values, DEAP_BATCH) for stage, values in task.changes.items()},
        license=task.license,
        made_from=task.made_from,
    )
    return compress_run(asked, task.folder, resume=True, say=_say)


def fuse(task: FuseTask) -> Result | None:
    """The run's report."""
    return run_fusion(
        parse_fusion(task.config, "the request", task.folder),
        task.folder,
        resume=True,
        keep_worse=True,
        say=_say,
        steps=task.steps,
        changes=_recipe_changes(task.changes),
        moved=True,
        confinement=task.confinement,
    )


def export(task: ExportTask) -> Result:
    stored = load_chain(task.chain)
    write_whole(task.out, write_onnx(stored, Width.parse(task.width), EmitOptions()))
    return {"size_bytes": task.out.stat().st_size}


WORK: Mapping[str, Callable[[Any], Result | None]] = {
    "refine": refine,
    "calibrate": calibrate_chain,
    "evaluate": evaluate_chain,
    "evaluate-teacher": evaluate_teacher,
    "verify": verify_chain,
    "finetune": finetune,
    "compress": compress,
    "fuse": fuse,
    "export": export,
}


def main(arguments: list[str]) -> int:
    """The status: 0, or 2 for an expected failure."""
    task_file, result_file = (Path(argument) for argument in arguments)
    try:
        task = _TASK.validate_json(task_file.read_bytes())
        result = WORK[task.do](task)
        if result is not None:
            write_whole(result_file, json.dumps(result, allow_nan=False).encode())
    except (ValidationError, ChainsError) as error:
        _say(str(error))
        write_whole(result_file.with_suffix(f".{os.getpid()}"), json.dumps({"refused": str(error)}).encode())
        result_file.with_suffix(f".{os.getpid()}").replace(result_file)
        return 2
    except OSError as error:  # a disk that is full: it may be another time
        _say(str(error))
        return 2
    return 0


def _recipe_changes(changes: Mapping[str, Any], usual: BatchRecipe = USUAL_BATCH) -> dict[str, Any]:
    """Fields of a `TrainRecipe` from JSON values; those of its batch replace some of `usual`. Raises `DataError`."""
    try:
        given = {"batch": replace(usual, **changes["batch"])} if "batch" in changes else {}
        known = {name: value for name, value in changes.items() if name in TrainRecipe.__dataclass_fields__}
        if unknown := changes.keys() - known.keys():
            raise DataError(f"a recipe has no field '{min(unknown)}'")
        return {**known, **given}
    except TypeError as error:
        raise DataError(f"a batch cannot be {changes['batch']}: {error}") from error


def _finetune_recipe(task: FinetuneTask, source: Source) -> TrainRecipe:
    changes = _recipe_changes(task.changes)
    if task.preset is None and task.steps is None:
        raise DataError("give steps, or the preset 'paper': how long to train")
    start = TrainRecipe(task.steps or 1) if task.preset is None else paper_recipe(source.train, "finetune")
    return pipeline.changed(start, task.steps, changes)


def _renamed(chain: Chain, task: _OnChain, notes: Mapping[str, Any]) -> Chain:
    """`chain` under the task's name and licence, its provenance longer by `notes` and what it was made from."""
    made_from = {"made_from": {**chain.provenance.get("made_from", {}), **task.made_from}} if task.made_from else {}
    return replace(
        chain,
        name=task.name or chain.name,
        license=task.license or chain.license,
        provenance={**chain.provenance, **notes, **made_from},
    )


def _images_for(chain: Chain, data: DataConfig) -> Source:
    return open_source(sized(data, chain.input.height, chain.input.width))


def _described(stored: StoredChain) -> Result:
    return {"chain": stored.chain.name, "digest": stored.digest, "size_bytes": stored.size_bytes}


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
