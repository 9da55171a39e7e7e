"""A compression as a run with a directory: what was asked, log, checkpoints, the terminal chain. In it:

compression.toml                  what was asked; a run that goes on must ask the same
metrics.jsonl, tensorboard/       what happened
start.safetensors                 what each training starts from: computed once, for on another kind of machine it would
pruned.safetensors                come out otherwise
checkpoint-prune.safetensors      to go on from after a kill, one per training
checkpoint-finetune.safetensors
student.safetensors               the network, its classifier and statistics, to train on
chain.safetensors                 the terminal chain, calibrated and measured: to publish, to export as ONNX
report.json, curves.png

The source is a teacher's file, as a run or an importer left it, or a chain, of which one width is compressed.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from chains import export, plots
from chains.artifact import NAME, StoredChain, save
from chains.atomic import write_whole
from chains.budget import Limits
from chains.calibrate import calibrate
from chains.chain import Chain, InputSpec
from chains.classifier import with_classifier
from chains.compatible import (
    Anchor,
    anchor_in,
    compatibility_of,
    joined_space,
    measure_compatibility,
    require_fit,
    rival_width,
)
from chains.compress.objective import DeapRecipe
from chains.compress.run import (
    Compressed,
    Once,
    Stage,
    Start,
    Tensors,
    compress,
    deap_recipe,
    from_student,
    from_teacher,
    terminal_chain,
)
from chains.compress.selection import budget_of
from chains.config import DataConfig, from_toml, mistake_in, to_toml
from chains.cost import count_macs
from chains.errors import ChainsError, DataError
from chains.evaluate import evaluate_model, measure_frontier
from chains.export import Exported, origin, read_exported, save_trained
from chains.importers.pretraining import read_start
from chains.model import ReIDModel
from chains.onnxfile import plan
from chains.pipeline import CHAIN, REPORT, Recorder, changed, load_chain, report_of, require_answers, require_room
from chains.processes import Processes, joined, local_device
from chains.ranking import Ranking
from chains.runlog import RunLog
from chains.sources import Source, choose, first_identities, open_source, sized
from chains.train import Run, Trained, digest, epoch_steps, require_startable
from chains.width import Width

Say = Callable[[str], None]
ASKED, STUDENT = "compression.toml", "student.safetensors"
VALIDATION_IDENTITIES = 50
CALIBRATION_IMAGES = 1024
REPORT_STEPS, CHECKPOINT_STEPS = 50, 500  # at most so many from one to the next
LOG_LINES, CHECKPOINTS = 200, 20  # of a training that is short
MAX_NAME = 63  # of a chain, in characters


@dataclass(frozen=True)
class Asked:
    """What the user asks for. source: a teacher's file or a chain. width: of the chain's student; default: its widest.
    limits: `None`: prune what vanishes. recipe: a TOML file. start: weights to begin with instead of the teacher's.
    compatible_with: an old chain, whose embedding space is to be met. name: of the new chain. changes: other fields of
    the recipe's two trainings. license: of the new chain; default: the source's. made_from: for its provenance."""

    source: Path
    data: DataConfig
    limits: Limits | None = None
    width: str | None = None
    recipe: Path | None = None
    steps: int | None = None
    finetune_steps: int | None = None
    start: Path | None = None
    compatible_with: Path | None = None
    name: str | None = None
    seed: int = 0
    device: str = "cpu"
    changes: Mapping[Stage, Mapping[str, Any]] = field(default_factory=dict)
    license: str | None = None
    made_from: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Opened:
    """The source, read: where the compression starts, and the images. made_from: what the provenance says of it."""

    start: Start
    input: InputSpec
    license: str
    made_from: Mapping[str, Any]
    source: Source


@dataclass(frozen=True, eq=False)
class Task:
    """What was asked, with every file read."""

    opened: Opened
    name: str
    recipe: DeapRecipe
    limits: Limits | None
    old: StoredChain | None
    seed: int
    device: str
    made_from: Mapping[str, str]

    @property
    def start(self) -> Start:
        return self.opened.start

    @property
    def source(self) -> Source:
        return self.opened.source

    @property
    def asked(self) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        return {
            "name": self.name,
            "source": dict(self.opened.made_from),
            "images": self.source.name,
            "seed": self.seed,
            "limits": {} if self.limits is None else dict(self.limits.stated()),
            "recipe": json.loads(json.dumps(asdict(self.recipe))),
            **({} if self.old is None else {"compatible_with": self.old.digest}),
            **({"made_from": dict(self.made_from)} if self.made_from else {}),
        }


def compress_run(asked: Asked, folder: Path, *, resume: bool, say: Say) -> dict[str, Any] | None:
    """Compress in `folder`; the report, `None` in every process but the first.

    Raises `DataError` for a folder that is taken, or that holds a compression which was asked for otherwise;
    `ChainFileError` for a source that is neither; and what `chains.compress.run.compress` raises."""
    with joined(asked.device) as team, ExitStack() as stack:
        if team.is_first:
            require_room(folder, ASKED, resume=resume)
        task = read_task(asked)
        if team.is_first:
            _prepare(task, folder)
        team.wait()
        log = stack.enter_context(RunLog(folder)) if team.is_first else None
        done, anchor = _train(task, folder, log, say, _once(folder, team))
        return None if log is None else _finish(task, folder, done, anchor, log)


def read_task(asked: Asked) -> Task:
    """Everything that `asked` names. Raises as `compress_run`."""
    opened = _of_teacher(asked) if _is_network(asked.source) else _of_chain(asked)
    opened = replace(opened, license=asked.license or opened.license)
    start, source = opened.start, opened.source
    old = None if asked.compatible_with is None else load_chain(asked.compatible_with)
    recipe = read_deap_recipe(asked.recipe, source)
    recipe = replace(
        recipe,
        prune=changed(recipe.prune, asked.steps, asked.changes.get("prune", {})),
        finetune=changed(recipe.finetune, asked.finetune_steps, asked.changes.get("finetune", {})),
    )
    if start.student.width != start.tutor.trained.model.width and recipe.gap_weight and asked.recipe is None:
        recipe = replace(recipe, gap_weight=0.0)  # its maps have other channels than the teacher's
    name = asked.name or f"{_as_name(start.name)[:52]}-deap"
    if re.fullmatch(NAME, name) is None:
        raise DataError(f"--name is '{name[:80]}'; write it as in '{_as_name(name)[:MAX_NAME]}'")
    return Task(opened, name, recipe, asked.limits, old, asked.seed, asked.device, asked.made_from)


def _of_teacher(asked: Asked) -> Opened:
    if asked.width is not None:
        raise DataError(f"'{asked.source}' is a single network, so --width has nothing to choose from; leave it out")
    exported = read_exported(asked.source)
    mark = exported.origin
    source = open_source(sized(asked.data, mark.height, mark.image_width))
    teacher, _ = with_classifier(exported, "auto", source.train, mark.input, asked.device)
    begun = None if asked.start is None else _like(read_start(asked.start, mark.architecture), exported)
    start = from_teacher(asked.source.stem, teacher, begun)
    own = {} if exported.classifier is None else {"classifier": exported.classifier}
    made_from = {
        "kind": mark.kind,
        "architecture": mark.architecture,
        "width": mark.width,
        "weights": digest({**exported.model.state_dict(), **own}),
        **({} if begun is None else {"start": digest(begun.state_dict())}),
    }
    return Opened(start, mark.input, mark.license, made_from, source)


def _like(begun: ReIDModel, exported: Exported) -> ReIDModel:
    """`begun`, where it is the teacher's architecture."""
    if (begun.table.name, begun.width) != (exported.model.table.name, exported.model.width):
        raise DataError(
            f"the start is a {begun.table.name} of {begun.width}, the teacher a {exported.model.table.name} of "
            f"{exported.model.width}; a student has its teacher's architecture"
        )
    return begun


def _of_chain(asked: Asked) -> Opened:
    if asked.start is not None:
        raise DataError("--start is for a teacher's file; a chain's student starts as expansion makes it")
    stored = load_chain(asked.source)
    chain = stored.chain
    width = chain.ladder[-1] if asked.width is None else Width.parse(asked.width, chain.teacher.multipliers)
    source = open_source(sized(asked.data, chain.input.height, chain.input.width))
    start = from_student(stored, width, source.train, asked.device)
    made_from = {"kind": "chain", "chain": chain.name, "chain_digest": stored.digest, "width": str(width)}
    return Opened(start, chain.input, chain.license, made_from, source)


def _is_network(path: Path) -> bool:
    """Whether `path` is a network of its own, not a chain."""
    try:
        with safe_open(path, framework="numpy") as file:
            return export.METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # then reading it as a chain says what is wrong


def _as_name(text: str) -> str:
    """`text` as a chain may be called."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "network"


class _RecipeFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: DeapRecipe


def read_deap_recipe(path: Path | None, source: Source) -> DeapRecipe:
    """The recipe in a TOML file, or the default one; so is what the file leaves out. Raises `DataError` that names the
    file and the field."""
    usual = deap_recipe(source.train)
    if path is None:
        return usual
    try:
        content = from_toml(tomllib.loads(path.read_text(encoding="utf-8")))
        given = {"prune": usual.prune, "finetune": usual.finetune, **content}
        return _RecipeFile.model_validate({"recipe": given}).recipe
    except ValidationError as error:
        raise DataError(f"{path}: {mistake_in(error).removeprefix('recipe.')}") from error
    except (OSError, ValueError, ChainsError) as error:
        raise DataError(f"{path}: {error}") from error


def _prepare(task: Task, folder: Path) -> None:
    """Claim the folder, once nothing is left that would be refused before the first step."""
    require_answers(task.source)
    student = task.start.student
    budget_of(task.start.name, student.table, student.width, task.opened.input, task.limits)
    if task.old is not None:
        require_fit(task.old.chain, task.source.train, student.backbone.channels)
    for recipe in (task.recipe.prune, task.recipe.finetune):
        require_startable(task.source.train, recipe, task.device)
    text = tomli_w.dumps(to_toml(task.asked))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ASKED).exists():
        write_whole(folder / ASKED, text.encode())
    elif (folder / ASKED).read_text(encoding="utf-8") != text:
        raise DataError(
            f"{folder} holds a compression that was asked for otherwise, see its {ASKED}; name another --out"
        )


def _once(folder: Path, team: Processes) -> Once:
    """Made by the first process, kept in `folder`, and read from there by all: on every machine that goes on."""

    def once(name: str, make: Callable[[], Tensors]) -> Tensors:
        path = folder / f"{name}.safetensors"
        if team.is_first and not path.exists():
            write_whole(path, serialise({key: tensor.contiguous() for key, tensor in make().items()}))
        team.wait()
        return load_file(path)

    return once


def _train(task: Task, folder: Path, log: RunLog | None, say: Say, once: Once) -> tuple[Compressed, Anchor | None]:
    train, spec = task.source.train, task.opened.input
    validation = first_identities(task.source.query, task.source.gallery, VALIDATION_IDENTITIES)
    anchor = None
    if task.old is not None:
        anchor = anchor_in(task.old, train, task.start.student.backbone.channels)

    def validate(trained: Trained) -> Mapping[str, float]:
        ranking = evaluate_model(trained.model, *validation, spec)
        return {"map": ranking.map, "rank1": ranking.rank(1)}

    def runs(stage: Stage) -> Run:
        recipe = task.recipe.prune if stage == "prune" else task.recipe.finetune
        told = max(1, min(REPORT_STEPS, recipe.steps // LOG_LINES))
        report = None if log is None else Recorder(stage, log, told, say, epoch_steps(train, recipe.batch))
        kept = max(1, min(CHECKPOINT_STEPS, recipe.steps // CHECKPOINTS))
        return Run(task.device, report, folder / f"checkpoint-{stage}.safetensors", kept)

    settling = choose(train, CALIBRATION_IMAGES, task.seed)
    done = compress(
        task.start,
        train,
        spec,
        task.recipe,
        task.limits,
        task.seed,
        runs,
        once,
        settling=settling,
        validate=validate,
        compatible=anchor,
    )
    return done, anchor


def _finish(task: Task, folder: Path, done: Compressed, anchor: Anchor | None, log: RunLog) -> dict[str, Any]:
    """Calibrate, measure and write what came of it."""
    before = _measured(task)
    provenance = {
        "made_by": "widthwise compress",
        **{name: value for name, value in task.asked.items() if name not in ("name", "compatible_with")},
        "vanished": round(done.vanished, 4),
        "teacher_map": round(before["teacher"].map, 2),
    }
    chain = terminal_chain(
        done.trained.model,
        task.opened.input,
        name=task.name,
        license=task.opened.license,
        provenance=provenance,
        order=task.start.order,
    )
    source = task.source
    chain = calibrate(chain, choose(source.train, CALIBRATION_IMAGES, task.seed), task.device)
    chain = _in_its_space(task, chain, anchor)
    frontier = measure_frontier(chain, source.query, source.gallery, source.name, task.seed, device=task.device)
    stored = save(replace(chain, frontier=replace(frontier, trained_after_expansion=True)), folder / CHAIN)
    _save_student(task, done.trained, stored, folder / STUDENT)
    write_whole(folder / "curves.png", plots.training_curves_png(log.events()))
    report = _report(task, done, stored, before)
    write_whole(folder / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    return report


def _measured(task: Task) -> dict[str, Ranking]:
    """Accuracy of the teacher, and of the student before it was pruned."""
    place, sets = local_device(task.device), (task.source.query, task.source.gallery, task.opened.input)
    networks = {"teacher": task.start.tutor.trained.model, "before": task.start.student}
    if networks["teacher"] is networks["before"]:
        return dict.fromkeys(networks, evaluate_model(networks["teacher"].to(place), *sets))
    return {name: evaluate_model(network.to(place), *sets) for name, network in networks.items()}


def _in_its_space(task: Task, chain: Chain, anchor: Anchor | None) -> Chain:
    """`chain` in the old chain's embedding space, where that was asked for and measured to work: its queries find no
    less in the old full-width gallery than those of the student that a device of its size would else get."""
    if task.old is None or anchor is None:
        return chain
    rival = rival_width(task.old.chain, count_macs(chain.table, chain.teacher, chain.input))
    measured = measure_compatibility(task.old.chain, chain, task.source.query, task.source.gallery, rival)
    return joined_space(chain, anchor, measured)


def _save_student(task: Task, trained: Trained, stored: StoredChain, path: Path) -> None:
    """The network as it was trained; calibration changes the statistics of the chain's."""
    mark = origin("finetuned", trained.model, task.opened.input, task.opened.license)
    made_from = {"embedding_space": stored.chain.embedding_space, "sizes": dict(stored.chain.sizes or {})}
    save_trained(trained, mark.model_copy(update=made_from), path)


def _report(task: Task, done: Compressed, stored: StoredChain, before: Mapping[str, Ranking]) -> dict[str, Any]:
    costs = plan(stored, stored.chain.teacher).costs
    report = {
        **{name: {"map": round(r.map, 2), "rank1": round(r.rank(1), 2)} for name, r in before.items()},
        "limits": task.asked["limits"],
        "costs": {**asdict(costs), "memory_bytes_bound": costs.memory_bytes_bound},
        "vanished": round(done.vanished, 4),
        "pruned_to": dict(done.pruned_to),
        **report_of(stored),
    }
    if (compatibility := compatibility_of(stored.chain)) is not None:
        report["compatible_with"] = dict(compatibility)
    return report
