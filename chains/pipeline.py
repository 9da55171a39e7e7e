"""A whole run: teacher, refinement, calibration, frontier, and the directory that holds what came of it.

    config.toml                         the resolved configuration; running it again gives the same chain
    metrics.jsonl, tensorboard/         what happened, see `chains.runlog`
    checkpoint-teacher.safetensors      to go on from after a kill, one per stage
    checkpoint-refinement.safetensors
    teacher.safetensors                 the teacher and its classifier, see `chains.export`
    stage-*.safetensors                 the chain as `STAGES` left it, while the run is not complete
    chain.safetensors, report.json      the result
    frontier.png, cross_width.png, curves.png

Every stage starts from its checkpoint where there is one, and a stage that is complete only loads what it left. So a
run that was killed anywhere and started again with `resume` ends with the same chain, digest for digest, on the same
machine and number of threads. A run may also be done a stage at a time (`until`), each on another machine, as long as
the directory comes along. Under torchrun all processes train and the first one writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from chains import plots
from chains.architectures import architecture
from chains.artifact import StoredChain, load, save
from chains.atomic import write_whole
from chains.calibrate import BATCH, calibrate
from chains.chain import Chain, Frontier, InputSpec
from chains.classifier import with_classifier
from chains.compatible import (
    Anchor,
    anchor_in,
    compatibility_of,
    joined_space,
    measure_compatibility,
    require_fit,
)
from chains.config import Config, TeacherConfig, differences, dumps, read_config
from chains.cost import count_macs, count_params
from chains.data.images import Images
from chains.data.readers import detect
from chains.data.validation import unmatched_queries
from chains.errors import ChainFileError, ChainMismatch, DataError
from chains.evaluate import evaluate_model, measure_frontier
from chains.export import Exported, load_trained, origin, read_exported, save_trained
from chains.importers.pretraining import read_start
from chains.losses import PAPER_LOSS
from chains.model import ReIDModel, load_student
from chains.nested import without_later
from chains.oskt import projected
from chains.processes import Processes, joined, local_device
from chains.refine import Refined, clustered, refine
from chains.runlog import RunLog
from chains.sources import Source, choose, first_identities, open_source
from chains.train import (
    Progress,
    Run,
    Trained,
    TrainRecipe,
    epoch_steps,
    line_of,
    paper_recipe,
    require_startable,
    train_alone,
)
from chains.width import Width

Say = Callable[[str], None]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG, CHAIN, TEACHER, REPORT = "config.toml", "chain.safetensors", "teacher.safetensors", "report.json"
Stage = Literal["cluster", "refine", "calibrate", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
LEFT: Mapping[str, str] = {stage: f"stage-{stage}.safetensors" for stage in STAGES[:-1]}  # the last leaves `CHAIN`


def run_refinement(
    config: Config,
    folder: Path,
    *,
    resume: bool,
    say: Say,
    steps: int | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
    until: Stage = "evaluate",
    moved: bool = False,
) -> StoredChain | None:
    """Do the run in `folder` up to the stage `until`, by default the whole of it, and return the chain as it is then;
    `None` in every process but the first. `steps`: of the refinement, instead of its recipe's; `changes`: of
    other fields of that recipe. `moved`: the folder may
    come from another machine, so that its paths mean nothing here.

    Raises `DataError` when the folder holds something and `resume` was not asked for, or when what it holds is another
    run; and what the stages raise.
    """
    with joined(config.device) as team, ExitStack() as stack:
        if team.is_first:
            require_room(folder, CONFIG, resume=resume)
        source = open_source(config.data)
        config = resolve(config, source.train, steps, changes)
        require_feasible(config, source)
        if team.is_first:
            claim_folder(folder, config, moved=moved)
            for note in source.notes:
                say(f"{source.name}: {note}")
        team.wait()
        if (folder / REPORT).exists():
            if team.is_first:
                say(f"{folder} is complete; nothing is left to do")
            return load(folder / CHAIN) if team.is_first else None
        log = stack.enter_context(RunLog(folder)) if team.is_first else None
        return _Stages(config, folder, source, team, log, say).run(until)


def resolve(
    config: Config, train: Images, steps: int | None = None, changes: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """`config` with everything spelt out that depends on the images or on presets, so that it stands for itself;
    `steps` replaces those of the refinement, `changes` other fields of its recipe."""
    data, teacher, refinement = config.data, config.teacher, config.refinement
    if data.kind == "auto" and data.root is not None:
        data = data.model_copy(update={"kind": detect(data.root).kind})
    height, width = data.size
    if teacher.preset is not None:
        spelt_out = {"preset": None, "train": paper_recipe(train, "teacher"), "loss": PAPER_LOSS}
        teacher = teacher.model_copy(update=spelt_out)
    recipe = refinement.train or paper_recipe(train, "refine")
    spelt: dict[str, Any] = {
        "ladder": config.ladder,
        "narrowest": None,
        "preset": None,
        "train": changed(recipe, steps, changes),
    }
    if refinement.mode == "oskt" and refinement.loss is None:
        spelt["loss"] = PAPER_LOSS
    return config.model_copy(
        update={
            "data": data.model_copy(update={"height": height, "width": width}),
            "teacher": teacher,
            "refinement": refinement.model_copy(update=spelt),
        }
    )


def changed(recipe: TrainRecipe, steps: int | None, changes: Mapping[str, Any]) -> TrainRecipe:
    """`recipe` with other `steps`, unless `None`, and other values of the fields in `changes`."""
    return replace(recipe, **{**changes, **({} if steps is None else {"steps": steps})})


def require_feasible(config: Config, source: Source) -> None:
    """Raises what the stages would for images, recipes or an old chain that do not go together: now, before anything is
    written, not after hours of training."""
    if len(source.train) < BATCH:
        raise DataError(f"{len(source.train)} training images cannot calibrate a chain; at least {BATCH} are needed")
    for recipe in (config.teacher.train, config.refinement.train):
        if recipe is not None:
            require_startable(source.train, recipe, config.device)
    if config.compatible_with is not None:
        require_fit(load_chain(config.compatible_with.chain).chain, source.train, embedding_dim(config.teacher))
    require_answers(source)


def require_answers(source: Source) -> None:
    """Raises `DataError` when no query of `source` can be answered, so that nothing could be measured."""
    if len(unmatched_queries(source.query, source.gallery)) == len(source.query):
        raise DataError(
            f"{source.name}: no query has a gallery image of the same identity from another camera; nothing can be "
            "measured"
        )


def require_room(folder: Path, mark: str, *, resume: bool) -> None:
    """Raises `DataError` for a run directory that holds something, unless it is a run that shall be resumed: one with
    the file `mark`."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise DataError(f"{folder} is not empty; go on with what it holds by --resume, or name another --out")
    if not (folder / mark).exists():
        raise DataError(f"{folder} holds no {mark}, so it is no run to resume; name another --out")


def claim_folder(folder: Path, config: Config, *, moved: bool = False) -> None:
    """Make `folder` the directory of this run; `moved`: whatever its paths are. Raises `DataError` when it is
    another's."""
    folder.mkdir(parents=True, exist_ok=True)
    known = read_config(folder / CONFIG) if (folder / CONFIG).exists() else config
    if different := differences(known, config, moved=moved):
        raise DataError(f"{folder} holds another run: {different[0]}; name another --out, or the same options")
    write_whole(folder / CONFIG, dumps(config, folder).encode())


class Recorder:
    """Hands the progress of a stage to the terminal and to the log, every so many steps. epoch: in steps, if known."""

    def __init__(self, stage: str, log: RunLog, steps: int, say: Say, epoch: int | None = None) -> None:
        self.stage, self.log, self.steps, self.say, self.epoch = stage, log, steps, say, epoch
        self.has_begun = False

    def __call__(self, progress: Progress) -> None:
        if not self.has_begun:  # the first news are of the checkpoint's step, if validated, or of the one after it
            self.log.rewind(self.stage, progress.step if progress.metrics else progress.step - 1)
            self.has_begun = True
        if progress.metrics:
            self._write_validation(progress)
        elif progress.step % self.steps == 0 or progress.step == progress.steps:
            self.say(f"{self.stage}: {line_of(progress)}")
            where: dict[str, float] = {"step": progress.step, "steps": progress.steps}
            if self.epoch:
                where["epoch"] = round(progress.step / self.epoch, 2)
            self.log.write(self.stage, **where, losses=dict(progress.losses), **_pace(progress))

    def _write_validation(self, progress: Progress) -> None:
        """A resumed run validates its checkpoint again; the log has it already, unless the kill came in between."""
        self.say(f"{self.stage}: {line_of(progress)}")
        known = (event for event in self.log.events() if event["stage"] == self.stage and "validation" in event)
        if all(event["step"] != progress.step for event in known):
            self.log.write(self.stage, step=progress.step, validation=dict(progress.metrics))


def _pace(progress: Progress) -> dict[str, float]:
    return {
        "lr": progress.learning_rate,
        "images_per_s": round(progress.images_per_s, 1),
        "eta_s": round(progress.eta_s, 1),
    }


@dataclass(frozen=True, eq=False)
class _Stages:
    """The stages of one run, in order. log: in the first process only."""

    config: Config
    folder: Path
    source: Source
    team: Processes
    log: RunLog | None
    say: Say

    def run(self, until: Stage) -> StoredChain | None:
        """The chain as `until` leaves it. All processes cluster and train; what comes after, the first does alone."""
        chain = self.left("cluster", self.cluster)
        if until != "cluster":
            start = chain
            chain = self.left("refine", lambda: self.refine(start))
        if self.log is None:
            return None
        if until in ("calibrate", "evaluate"):
            refined = chain
            chain = self.left("calibrate", lambda: self.calibrate(refined))
        return self.evaluate(chain, self.log) if until == "evaluate" else load_chain(self.folder / LEFT[until])

    def left(self, stage: Stage, make: Callable[[], Chain]) -> Chain:
        """What `stage` left in the folder, else what `make` makes, left there."""
        path = self.folder / LEFT[stage]
        if path.exists():
            return load_chain(path).chain
        chain = make()
        if self.team.is_first:
            save(chain, path)
        return chain

    def cluster(self) -> Chain:
        """The teacher as a chain before refinement: its own tensors, and the partitions by which widths are cut."""
        _, spec, classifier = self.teacher
        config = self.config.refinement
        start = clustered(self.refined_teacher, self.ladder, config.mode, config.nested)
        known = provenance(self.config, self.source.name)
        noted = {} if self.config.teacher.classifier == "own" else {"classifier": classifier}
        return self.new_chain(start, self.ladder, spec, {**known, **noted})

    def calibrate(self, chain: Chain) -> Chain:
        self.say("calibration of every width")
        images = self.calibration_images(self.config.evaluation.calibration_images)
        return calibrate(chain, images, self.config.device)

    def evaluate(self, chain: Chain, log: RunLog) -> StoredChain:
        """The chain with its frontier, and everything that tells of it."""
        self.say("evaluation of the teacher and of every width")
        teacher, spec, _ = self.teacher
        ranking = evaluate_model(teacher.model, self.source.query, self.source.gallery, spec)
        chain = replace(chain, provenance={**chain.provenance, "teacher_map": round(ranking.map, 2)})
        device = self.config.device
        if self.old is not None and self.anchor is not None:
            measured = measure_compatibility(self.old.chain, chain, self.source.query, self.source.gallery)
            chain = joined_space(chain, self.anchor, measured)
        seed = self.config.evaluation.seed
        frontier = measure_frontier(
            chain, self.source.query, self.source.gallery, self.source.name, seed, device=device
        )
        stored = save(replace(chain, frontier=frontier), self.folder / CHAIN)
        log.rewind("frontier", -1)
        log.write("frontier", map={str(measured.width): measured.map for measured in frontier.widths})
        write_pictures(self.folder, stored.chain, frontier, log)
        report = {"teacher": {"map": round(ranking.map, 2), "rank1": round(ranking.rank(1), 2)}, **report_of(stored)}
        if (compatibility := compatibility_of(stored.chain)) is not None:
            report["compatible_with"] = dict(compatibility)
        write_whole(self.folder / REPORT, _json(report))
        for name in LEFT.values():
            (self.folder / name).unlink(missing_ok=True)
        return stored

    @cached_property
    def old(self) -> StoredChain | None:
        """The chain with which the new one shall be compatible."""
        config = self.config.compatible_with
        return None if config is None else load_chain(config.chain)

    @cached_property
    def anchor(self) -> Anchor | None:
        config, teacher = self.config.compatible_with, self.config.teacher
        if config is None or self.old is None:
            return None
        return anchor_in(self.old, self.source.train, embedding_dim(teacher), config.weight, config.scale)

    @property
    def ladder(self) -> tuple[Width, ...]:
        return self.config.ladder

    @cached_property
    def teacher(self) -> tuple[Trained, InputSpec, str]:
        """The teacher, from its file or trained, what it wants to see, and whose classifier it has: its own, or one of
        centroids. A run that goes on takes it as it left it."""
        config, path = self.config.teacher, self.folder / TEACHER
        if path.exists() and (config.source is None or (self.folder / LEFT["cluster"]).exists()):
            return load_trained(path), read_exported(path).origin.input, "own"
        spec, classifier = InputSpec(*self.config.data.size, IMAGENET_MEAN, IMAGENET_STD), "own"
        if config.source is None:
            trained = self.train_teacher(config, spec)
        elif config.classifier == "own":
            exported = _taken(config, config.source, self.config.data.size)
            trained, spec = load_trained(_file_of(config.source)), exported.origin.input
        else:
            exported = _taken(config, config.source, self.config.data.size)
            spec = exported.origin.input
            trained, classifier = with_classifier(
                exported, config.classifier, self.source.train, spec, self.config.device
            )
        if self.team.is_first:
            save_trained(trained, origin("teacher", trained.model, spec, self.config.license), path)
        return trained, spec, classifier

    @cached_property
    def refined_teacher(self) -> Trained:
        """The teacher as it is refined: in mode oskt a ViT has the paper's projection in front."""
        teacher = self.teacher[0]
        return projected(teacher) if self.config.refinement.mode == "oskt" else teacher

    def train_teacher(self, config: TeacherConfig, input: InputSpec) -> Trained:
        if config.train is None:
            raise DataError("the teacher has neither a source nor a recipe")
        count = self.config.evaluation.validation_identities
        query, gallery = self.validation_images()

        def validate(trained: Trained) -> Mapping[str, float]:
            ranking = evaluate_model(trained.model, query, gallery, input)
            return {"map": ranking.map, "rank1": ranking.rank(1)}

        return train_alone(
            config.architecture,
            config.width,
            self.source.train,
            input,
            config.train,
            self.config.seed,
            self.engine("teacher", epoch_steps(self.source.train, config.train.batch)),
            validate=validate if count else None,
            loss=config.loss,
            start=None if config.start is None else _even(read_start(config.start, config.architecture), config.start),
            compatible=self.anchor,
        )

    def refine(self, start: Chain) -> Chain:
        """`start` refined; not calibrated yet."""
        teacher, spec = self.refined_teacher, self.teacher[1]
        config, count = self.config.refinement, self.config.evaluation.validation_identities
        query, gallery = self.validation_images()
        if config.train is None:
            raise DataError("the refinement has no recipe")

        def validate(refined: Refined) -> Mapping[str, float]:
            """mAP of the chain's two ends, as it would be served now."""
            ends = (self.ladder[0], self.ladder[-1])
            device = self.config.device
            chain = self.new_chain(refined, ends, spec, start.provenance)
            chain = calibrate(chain, self.calibration_images(BATCH), device)
            students = (load_student(chain, width).to(local_device(device)) for width in ends)
            rankings = (evaluate_model(student, query, gallery, spec) for student in students)
            return {f"map {name}": r.map for name, r in zip(("narrowest", "full"), rankings, strict=True)}

        refined = refine(
            teacher,
            self.ladder,
            self.source.train,
            spec,
            config.train,
            self.config.seed,
            self.engine("refinement", epoch_steps(self.source.train, config.train.batch)),
            mode=config.mode,
            validate=validate if count else None,
            nested=config.nested,
            oskt_loss=config.loss or PAPER_LOSS,
            compatible=self.anchor,
            partitions=start.partitions,
        )
        return self.new_chain(refined, self.ladder, spec, start.provenance)

    def engine(self, stage: str, epoch: int) -> Run:
        """`epoch`: in steps."""
        output = self.config.output
        return Run(
            device=self.config.device,
            report=None if self.log is None else Recorder(stage, self.log, output.report_steps, self.say, epoch),
            checkpoint=self.folder / f"checkpoint-{stage}.safetensors",
            checkpoint_steps=output.checkpoint_steps,
            validate_steps=output.validate_steps,
        )

    def validation_images(self) -> tuple[Images, Images]:
        """Queries and gallery to look at while training."""
        count = self.config.evaluation.validation_identities
        return first_identities(self.source.query, self.source.gallery, count)

    def calibration_images(self, count: int) -> Images:
        return choose(self.source.train, count, self.config.evaluation.seed)

    def new_chain(
        self, refined: Refined, ladder: tuple[Width, ...], input: InputSpec, provenance: Mapping[str, Any]
    ) -> Chain:
        return refined.chain(
            name=self.config.name,
            architecture=self.refined_teacher.model.table.name,
            ladder=ladder,
            teacher=self.config.teacher.width,
            input=input,
            license=self.config.license,
            provenance=provenance,
        )


def embedding_dim(teacher: TeacherConfig) -> int:
    """Length of the teacher's embeddings."""
    table = architecture(teacher.architecture)
    return table.embedding_dim(teacher.width)


def load_chain(path: Path) -> StoredChain:
    """The chain in `path`; errors name the file."""
    try:
        return load(path)
    except (OSError, ChainFileError) as error:
        raise ChainFileError(f"{path}: {error}") from error


def provenance(config: Config, data: str) -> dict[str, Any]:
    """How a chain came to be, as JSON values: what decides the result, and no path, device or clock. A teacher that was
    not trained here is named by the sha256 of its file, by which the report of its own making is found."""
    values = config.model_dump(mode="json")
    source, start = config.teacher.source, config.teacher.start
    values["teacher"]["source"] = source is not None and _sha256(_file_of(source))
    values["teacher"]["start"] = start is not None
    values["data"].pop("root")
    # Options that came later are left out where they say nothing, so that older runs, done again, give the same bytes.
    for section, name, nothing in (("teacher", "classifier", "own"), ("data", "name", None)):
        if values[section][name] == nothing:
            del values[section][name]
    values["refinement"]["nested"] = without_later(values["refinement"]["nested"])
    kept = ["seed", "data", "teacher", "refinement", "evaluation", *(["made_from"] if config.made_from else [])]
    return {"made_by": "widthwise refine", "images": data, **{name: values[name] for name in kept}}


def write_pictures(folder: Path, chain: Chain, frontier: Frontier, log: RunLog | None) -> None:
    """The plots of a chain, and of its training where there is a log with steps."""
    curve = plots.curve_of(chain, frontier)
    write_whole(folder / "frontier.png", plots.frontier_png([curve], frontier.dataset))
    write_whole(folder / "cross_width.png", plots.cross_width_png(frontier))
    if log is not None and plots.series(log.events(), "losses"):
        write_whole(folder / "curves.png", plots.training_curves_png(log.events()))


def report_of(stored: StoredChain) -> dict[str, Any]:
    """A measured chain in figures, as JSON values."""
    chain, frontier = stored.chain, stored.chain.frontier
    if frontier is None:
        raise ChainMismatch(f"chain '{chain.name}' has no frontier to report")
    return {
        "chain": chain.name,
        "digest": stored.digest,
        "size_bytes": stored.size_bytes,
        "embedding_space": chain.embedding_space,
        "dataset": frontier.dataset,
        "protocol": frontier.protocol,
        "queries": frontier.queries,
        "gallery": frontier.gallery,
        "trained_after_expansion": frontier.trained_after_expansion,
        "widths": [
            {
                "width": str(measured.width),
                "macs": count_macs(chain.table, measured.width, chain.input),
                "params": count_params(chain.table, measured.width),
                "map": measured.map,
                "map_ci95": list(measured.map_ci95),
                "rank1": measured.rank1,
                "rank5": measured.rank5,
                "rank10": measured.rank10,
                "minp": measured.minp,
            }
            for measured in frontier.widths
        ],
        "cross_map": [list(row) for row in frontier.cross_map],
        "thresholds": {
            at.rate_name: [[None if t is None else t.cosine for t in row] for row in at.matrix]
            for at in frontier.thresholds
        },
    }


def _file_of(source: Path) -> Path:
    """The teacher's file: `source` itself, or in a run directory."""
    return source / TEACHER if source.is_dir() else source


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _taken(config: TeacherConfig, source: Path, size: tuple[int, int]) -> Exported:
    """The teacher in a file, or in a run directory. Raises `ChainMismatch` where the configuration says another."""
    path = _file_of(source)
    exported = read_exported(path)
    mark = exported.origin
    there = (mark.architecture, mark.width, (mark.height, mark.image_width))
    here = (config.architecture, str(config.width), size)
    if there != here:
        raise ChainMismatch(
            f"teacher '{path}' is a {there[0]} of width {there[1]} for {there[2][0]} × {there[2][1]} images; "
            f"the configuration says {here[0]}, {here[1]}, {here[2][0]} × {here[2][1]}"
        )
    _even(exported.model, path)
    return exported


def _even(model: ReIDModel, path: Path) -> ReIDModel:
    """`model`. Raises `ChainMismatch` for one whose layers were pruned unevenly: no ladder leads up to it."""
    if model.table.groups != architecture(model.table.name).groups:
        raise ChainMismatch(
            f"'{path}' is a compressed network whose layers have sizes of their own; a chain is made of a "
            f"{model.table.name} as its width says"
        )
    return model


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
