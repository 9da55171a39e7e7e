"""What can be asked of workers by `POST /jobs`: a model per kind of job, and what must hold before one is queued.

A request is checked twice. Its form, alone, by the models here: unknown fields are mistakes, and every default is
spelt out in what is stored, so that a later version's defaults do not change a job that waits. What it names, by
`JobRequests.check_in`, in the transaction that queues the job: a teacher that is not ready or a name that is taken
fails now, not after hours of training. An alias then becomes the chain it points at, so that a waiting job is about the
chain that was meant, which cannot be deleted meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from sqlalchemy.orm import Session

from app.db.job_requests import OpenRequests
from app.db.repositories import Chains
from app.db.tables import ChainRow, DatasetRow, TeacherRow
from app.db.teachers import FUSE, TeacherRows
from app.errors import (
    ChainExists,
    InvalidJobRequest,
    JobImpossible,
    ReservedName,
    TeacherExists,
    TeacherNotReady,
    UnknownChain,
    UnknownJobKind,
    UnknownTeacher,
)
from app.services.datasets import Datasets
from app.services.limits import LimitsIn
from app.services.names import PATTERN
from app.services.registry import RESERVED_NAMES
from app.services.teachers import READY, require_unclaimed
from app.terms import Rights, rights_of, strictest
from chains.arch import Architecture
from chains.architectures import architecture, architecture_names
from chains.architectures.vit import refined_name
from chains.chain import InputSpec
from chains.compress.selection import budget_of
from chains.errors import ArchitectureError, WidthError
from chains.fuse.views import PAPER_VIEWS
from chains.width import Width, default_narrowest, even_ladder

MAX_LICENSE = 200  # characters that a chain file's licence may have
MAX_STEPS = 10_000_000
SMALL_STEPS = 300  # of the preset "small": every stage of a run within minutes
FINETUNE_SHARE = 6  # of a compression: steps with pruners to one of finetuning, as its 90 epochs are to 15
RUNGS = 7
WHOLE_SCHEDULES = frozenset({"paper", "usual"})  # presets that give all that a request does not name
FROZEN = "onnx"  # the architecture of a teacher that came as ONNX


def _width(text: str) -> str:
    """As it is: what a lone number means, the teacher or the chain tells. Raises `ValueError`."""
    try:
        Width.parse(text)
    except WidthError as error:
        raise ValueError(str(error)) from error
    return text


def _architecture(name: str) -> str:
    """As its table has it. Raises `ValueError`."""
    try:
        return architecture(name).name
    except ArchitectureError as error:
        raise ValueError(str(error)) from error


def _view(name: str) -> str:
    if name not in PAPER_VIEWS:
        raise ValueError(f"'{name[:40]}' is none of {', '.join(PAPER_VIEWS)}; or give top and bottom")
    return name


Name = Annotated[str, Field(pattern=PATTERN)]
WidthText = Annotated[str, Field(max_length=40), AfterValidator(_width)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Side = Annotated[int, Field(ge=16, le=1024)]  # of an image, in pixels
Weight = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class JobRequest(BaseModel):
    """What every request has. seed: of everything random. device: of the worker's child processes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dataset: Annotated[Name, Field(description="a data set that is ready")]
    seed: Annotated[Seed, Field(description="of everything random")] = 0
    device: Annotated[Literal["cpu", "cuda"], Field(description="`cuda`: the workers have GPUs")] = "cpu"

    @property
    def new_chain(self) -> str | None:
        """The name under which the job publishes a chain; `None`: it publishes none."""
        return None

    @property
    def new_teacher(self) -> str | None:
        """The name of the teacher that the job makes; `None`: it makes none."""
        return None


class BatchIn(BaseModel):
    """A batch: people, and images of each."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    identities: Annotated[int, Field(ge=2, le=512)] = 16
    images_per_identity: Annotated[int, Field(ge=2, le=64)] = 4


class EvaluationIn(BaseModel):
    """What is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    calibration_images: Annotated[
        int, Field(ge=256, le=65536, description="training images that give the statistics")
    ] = 1024
    validation_identities: Annotated[
        int, Field(ge=0, le=100_000, description="test people whose mAP is measured while training; 0: none")
    ] = 50


class _Training(JobRequest):
    """How a training goes. Every process takes `micro_batches / processes` of a step's batches."""

    preset: Literal["small", "paper", "usual"] | None = None
    steps: Annotated[Steps | None, Field(description="of the optimiser; required without a preset")] = None
    learning_rate: Annotated[Rate | None, Field(description="default 0.002, or the paper's")] = None
    batch: Annotated[BatchIn | None, Field(description="default 16 × 4; the preset `paper` has its own")] = None
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], Field(description="of the forward passes; `float16`: on a GPU")
    ] = "float32"
    processes: Annotated[int, Field(ge=1, le=1024, description="torchrun processes on the worker's machine")] = 1
    micro_batches: Annotated[
        int | None, Field(ge=1, le=4096, description="batches per step; a multiple of `processes`, and by default that")
    ] = None

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        if self.preset is None and self.steps is None:
            raise ValueError("give steps, or a preset: how long to train")
        if self.preset in WHOLE_SCHEDULES and self.batch is not None:
            raise ValueError(f"the preset '{self.preset}' has a batch of its own; leave batch or the preset out")
        if (self.micro_batches or self.processes) % self.processes:
            raise ValueError(
                f"{self.micro_batches} micro_batches cannot be shared out among {self.processes} processes; "
                f"make them a multiple of {self.processes}"
            )
        if self.precision == "float16" and self.device != "cuda":
            raise ValueError("precision float16 needs device 'cuda'; 'bfloat16' runs everywhere")
        return self


class RefineIn(_Training):
    """A teacher becomes a chain: cluster → refine → calibrate → evaluate → verify → publish."""

    name: Annotated[Name, Field(description="of the new chain")]
    teacher: Annotated[Name, Field(description="a teacher that is ready")]
    preset: Annotated[
        Literal["small", "paper"] | None,
        Field(
            description=f"`small`: {SMALL_STEPS} steps, to see every stage; `paper`: the schedule of OSKT (ICCV 2025) "
            "for as many images; null: Adam with warm-up and a cosine, as long as `steps` says"
        ),
    ] = None
    mode: Annotated[Literal["nested", "oskt"], Field(description="`oskt`: the paper's chain")] = "nested"
    ladder: Annotated[
        list[WidthText] | None,
        Field(min_length=2, max_length=256, description="the widths on offer, narrow to wide, up to the teacher's"),
    ] = None
    narrowest: Annotated[
        WidthText | None, Field(description="instead of `ladder`: its first width; default a quarter of the teacher's")
    ] = None
    rungs: Annotated[
        int | None,
        Field(
            ge=2,
            le=256,
            description=f"even steps from `narrowest` to the teacher's width; default {RUNGS} or what fits",
        ),
    ] = None
    evaluation: EvaluationIn = EvaluationIn()

    @property
    def new_chain(self) -> str:
        return self.name

    @model_validator(mode="after")
    def _check_ladder(self) -> Self:
        if self.ladder is not None and self.narrowest is not None:
            raise ValueError("give ladder or narrowest, not both: the widths on offer")
        return self

    def spelt_out(self, full: Width) -> RefineIn:
        """With every width in full, as `16x2-4-8`: a lone number has the multipliers of the teacher's width `full`."""
        ladder = None if self.ladder is None else [_in_full(text, full) for text in self.ladder]
        narrowest = None if self.narrowest is None else _in_full(self.narrowest, full)
        return self.model_copy(update={"ladder": ladder, "narrowest": narrowest})

    def widths(self, full: Width, table: Architecture) -> tuple[Width, ...]:
        """The ladder under a teacher of width `full`. Raises `WidthError` where there is none that can be refined."""
        asked = self.spelt_out(full)
        if asked.ladder is not None:
            ladder = tuple(map(Width.parse, asked.ladder))
        else:
            narrowest = Width.parse(asked.narrowest) if asked.narrowest else default_narrowest(full, table.step)
            ladder = _even(narrowest, full, self.rungs, table.step)
        for width in ladder:
            table.require_within(width, full)
        if ladder[-1] != full or list(ladder) != sorted(set(ladder)):
            raise WidthError(f"the ladder {', '.join(map(str, ladder))} must rise to the teacher's width, {full}")
        if self.mode == "nested" and len(ladder) < 3:
            raise WidthError(f"a nested chain needs at least three widths, not {', '.join(map(str, ladder))}")
        if self.mode == "oskt":
            refined_name(table, full)
        return ladder


def _in_full(text: str, like: Width) -> str:
    return str(Width.parse(text, like.multipliers))


def _even(narrowest: Width, full: Width, rungs: int | None, step: int) -> tuple[Width, ...]:
    """Even steps, as many as were asked for, else `RUNGS` or as many as there are. Raises `WidthError`."""
    for count in range(RUNGS, 3, -1) if rungs is None else ():
        with suppress(WidthError):
            return even_ladder(narrowest, full, count, step=step)
    return even_ladder(narrowest, full, rungs or 3, step=step)


class CalibrateIn(JobRequest):
    """The statistics of every width of a chain, measured anew on other images, without labels. The new chain stays in
    the embedding space of the old one."""

    chain: Annotated[Name, Field(description="name or alias of a chain")]
    name: Annotated[Name | None, Field(description="of the new chain; null: it stays a file of the job")] = None
    images: Annotated[int, Field(ge=256, le=65536, description="training images to use")] = 1024

    @property
    def new_chain(self) -> str | None:
        return self.name


class EvaluateIn(JobRequest):
    """The accuracy of a chain at every width, or of a teacher, on the test images of a data set."""

    chain: Annotated[Name | None, Field(description="name or alias of a chain")] = None
    teacher: Annotated[Name | None, Field(description="instead of a chain: a teacher that is ready")] = None
    rerank: Annotated[bool, Field(description="rank by k-reciprocal re-ranking (Zhong et al., CVPR 2017)")] = False
    name: Annotated[
        Name | None, Field(description="publish the chain under this name, with this frontier; null: a report only")
    ] = None

    @property
    def new_chain(self) -> str | None:
        return self.name

    @model_validator(mode="after")
    def _check_subject(self) -> Self:
        if (self.chain is None) == (self.teacher is None):
            raise ValueError("give one of chain and teacher: what is measured")
        if self.teacher is not None and self.name is not None:
            raise ValueError("name is for chains; a teacher has no frontier to publish")
        return self


class FinetuneIn(_Training):
    """One student of a chain, trained on a data set as the OSKT paper does. It leaves the chain's embedding space; its
    files stay with the job."""

    chain: Annotated[Name, Field(description="name or alias of a chain")]
    width: Annotated[WidthText, Field(description="of the student; one of the chain's ladder")]
    preset: Annotated[
        Literal["small", "paper"] | None, Field(description="as for `refine`; default the paper's schedule")
    ] = "paper"


class CompressIn(_Training):
    """One network for one target: a teacher, or a student of a chain, pruned while it is distilled (DEAP). It becomes a
    chain of one width."""

    name: Annotated[Name, Field(description="of the new chain")]
    chain: Annotated[Name | None, Field(description="name or alias of a chain; one width of it is compressed")] = None
    width: Annotated[WidthText | None, Field(description="of the chain's ladder; default its widest")] = None
    teacher: Annotated[Name | None, Field(description="instead of a chain: a teacher that is ready, a ResNet")] = None
    limits: Annotated[
        LimitsIn | None, Field(description="what the target can bear; null: what vanishes by itself goes")
    ] = None
    preset: Annotated[
        Literal["small", "paper"] | None,
        Field(
            description=f"`small`: {SMALL_STEPS} steps with pruners and {SMALL_STEPS // FINETUNE_SHARE} of finetuning, "
            "to see every stage; `paper`: 90 epochs of DEAP, then 15; null: as long as `steps` says"
        ),
    ] = "paper"
    steps: Annotated[Steps | None, Field(description="with pruners; required without a preset")] = None
    finetune_steps: Annotated[
        Steps | None, Field(description=f"after pruning; default the preset's, or 1/{FINETUNE_SHARE} of `steps`")
    ] = None
    learning_rate: Annotated[Rate | None, Field(description="with pruners; default 0.00035")] = None
    batch: Annotated[BatchIn | None, Field(description="default 16 × 6; the preset `paper` has its own")] = None
    compatible_with: Annotated[
        Name | None, Field(description="name or alias of a chain, whose embedding space is to be met")
    ] = None

    @property
    def new_chain(self) -> str:
        return self.name

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.chain is None) == (self.teacher is None):
            raise ValueError("give one of chain and teacher: what is compressed")
        if self.width is not None and self.chain is None:
            raise ValueError("width is for chains; a teacher has only one")
        return self


class SizeIn(BaseModel):
    """Of images, in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    height: Side
    width: Side


class ViewIn(BaseModel):
    """The rows of the image that a network sees, as fractions of its height, at the size it wants."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    top: Annotated[float, Field(ge=0, lt=1)]
    bottom: Annotated[float, Field(gt=0, le=1)]
    height: Annotated[Side | None, Field(description="of the teacher's images; by default as it is registered")] = None
    width: Side | None = None

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if not self.top < self.bottom:
            raise ValueError(f"a view runs down from top to bottom, not from {self.top:g} to {self.bottom:g}")
        return self


View = Annotated[
    Annotated[str, AfterValidator(_view), Tag("name")] | Annotated[ViewIn, Tag("rows")],
    Discriminator(lambda given: "name" if isinstance(given, str) else "rows"),
]


class FuseInputIn(BaseModel):
    """A teacher that is learnt from; it only has to answer, so an ONNX file will do."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    teacher: Annotated[Name, Field(description="a teacher that is ready, an ONNX file too")]
    view: Annotated[
        View | None, Field(description=f"what it sees: {', '.join(PAPER_VIEWS)}, or rows; null: the whole image")
    ] = None


class FusionLossIn(BaseModel):
    """Weights of the two losses by which a student learns from teachers; 0 is without."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    map: Annotated[Weight, Field(description="of their feature maps")] = 1.0
    retrieval: Annotated[Weight, Field(description="of their embeddings")] = 1.0


class FuseIn(_Training):
    """Teachers that see a part of the person each, or one foreign network, become one teacher that a chain can be made
    of (Factorized Distillation): settle → fuse → register."""

    name: Annotated[Name, Field(description="of the new teacher")]
    inputs: Annotated[list[FuseInputIn], Field(min_length=1, max_length=16, description="whom it learns from")]
    image: Annotated[SizeIn, Field(description="what the new teacher sees; its mean and std are ImageNet's")]
    architecture: Annotated[
        str, Field(max_length=64), AfterValidator(_architecture), Field(description="of the new teacher")
    ] = "resnet50"
    width: Annotated[WidthText | None, Field(description="of the new teacher; default its architecture's usual")] = None
    start_from: Annotated[
        Name | None, Field(description="a teacher of that architecture and width, whose weights training begins with")
    ] = None
    loss: FusionLossIn = FusionLossIn()
    preset: Annotated[
        Literal["small", "usual"] | None,
        Field(
            description=f"`small`: {SMALL_STEPS} steps, to see every stage; `usual`: 120 epochs of Adam in three "
            "stairs; null: Adam with warm-up and a cosine, as long as `steps` says"
        ),
    ] = None
    learning_rate: Annotated[Rate | None, Field(description="default 0.002, or 0.00035 of the preset `usual`")] = None
    validation_identities: Annotated[
        int, Field(ge=0, le=100_000, description="test people whose mAP is measured while training; 0: none")
    ] = 50
    keep_worse: Annotated[
        bool, Field(description="register the new teacher also where it ranks worse than its best input")
    ] = False

    @property
    def new_teacher(self) -> str:
        return self.name

    @model_validator(mode="after")
    def _check_student(self) -> Self:
        table, seen = architecture(self.architecture), (self.image.height, self.image.width)
        if table.input_size not in (None, seen):
            raise ValueError(
                f"{table.name} is for images of {table.input_size[0]} × {table.input_size[1]} (height × width), and "
                f"image says {seen[0]} × {seen[1]}"
            )
        try:
            table.group_sizes(self.student_width)
        except WidthError as error:
            raise ValueError(f"width: {error}") from error
        return self

    @property
    def student_width(self) -> Width:
        """A lone number has the multipliers of the architecture. Raises `WidthError`."""
        table = architecture(self.architecture)
        return table.usual_width if self.width is None else Width.parse(self.width, table.multipliers)


JOB_REQUESTS: Mapping[str, type[JobRequest]] = {
    "refine": RefineIn,
    "calibrate": CalibrateIn,
    "evaluate": EvaluateIn,
    "finetune": FinetuneIn,
    "compress": CompressIn,
    "fuse": FuseIn,
}


def parse(kind: str, body: Mapping[str, Any]) -> JobRequest:
    """The request for a job of `kind`. Raises `UnknownJobKind`, and `InvalidJobRequest` with every mistake in it."""
    model = JOB_REQUESTS.get(kind)
    if model is None:
        raise UnknownJobKind(kind, tuple(JOB_REQUESTS))
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise InvalidJobRequest(kind, error.errors(include_url=False, include_context=False)) from error


class JobRequests:
    """Looks whether a job could succeed as far as anybody can tell beforehand."""

    def __init__(self, datasets: Datasets, max_processes: int) -> None:
        self._datasets = datasets
        self._max_processes = max_processes

    def check_in(self, session: Session, request: JobRequest) -> JobRequest:
        """The request as it is to be done, in the transaction that queues the job: with chains by their own names.

        Raises `UnknownTeacher`, `TeacherNotReady`, `TeacherExists`, `UnknownDataset`, `DatasetNotReady`,
        `UnknownChain`, `ChainExists`, `ReservedName`, `WidthError`, `LatencyNotMeasurable`, `LimitsError`,
        `BudgetTooSmall`, and `JobImpossible` for what no worker could do."""
        dataset = self._datasets.require_ready_in(session, request.dataset)
        if isinstance(request, _Training) and request.processes > self._max_processes:
            raise JobImpossible(
                f"{request.processes} processes were asked for; workers start up to {self._max_processes} "
                "(WIDTHWISE_MAX_TRAIN_PROCESSES)"
            )
        if isinstance(request, RefineIn):
            request = _feasible(_ready_teacher(session, request.teacher), dataset, request)
        elif isinstance(request, EvaluateIn) and request.teacher is not None:
            _ready_teacher(session, request.teacher)
        elif isinstance(request, CompressIn):
            request = _compressible(session, dataset, request)
        elif isinstance(request, FuseIn):
            request = _fusible(session, dataset, request)
        elif isinstance(request, CalibrateIn | EvaluateIn | FinetuneIn):
            (chain,) = _kept_chains(session, str(request.chain))
            named = {"chain": chain.name}
            if isinstance(request, FinetuneIn):
                named["width"] = _rung(chain, request.width)
            request = request.model_copy(update=named)
        if request.new_chain is not None:
            _check_name(session, request.new_chain)
        if request.new_teacher is not None:
            _check_teacher_name(session, request.new_teacher)
        return request


def _ready_teacher(session: Session, name: str) -> TeacherRow:
    """The teacher of that name; until the transaction ends nobody deletes it."""
    rows = TeacherRows(session)
    rows.lock(name)
    teacher = rows.find(name)
    if teacher is None:
        raise UnknownTeacher(name)
    if teacher.state != READY:
        raise TeacherNotReady(name, teacher.state)
    return teacher


def _kept_chains(session: Session, *names: str) -> list[ChainRow]:
    """The chains of these names or aliases; until the transaction ends nobody deletes them."""
    chains = Chains(session)
    own = {name: _found(chains, name, name).name for name in names}
    for each in sorted(set(own.values())):  # so that two requests for the same two do not wait for each other
        chains.lock(each)
    return [_found(chains, own[name], name) for name in names]


def _found(chains: Chains, name: str, asked: str) -> ChainRow:
    """Raises `UnknownChain` with the name that was asked for."""
    if (found := chains.find(name)) is None:
        raise UnknownChain(asked)
    return found


def _rung(chain: ChainRow, text: str) -> str:
    """The width of `chain` that is meant, in full. Raises `JobImpossible` where it is none of the ladder's."""
    ladder = [row.width for row in chain.widths]
    width = _in_full(text, Width.parse(ladder[0]))
    if width not in ladder:
        raise JobImpossible(f"chain '{chain.name}' has no width {width}; its ladder is {', '.join(ladder)}")
    return width


def network_of(teacher: TeacherRow) -> tuple[Architecture, Width]:
    """The teacher's architecture and width. Raises `JobImpossible` where no chain can be made of them."""
    with suppress(ArchitectureError):
        if teacher.width is not None:
            return architecture(str(teacher.architecture)), Width.parse(teacher.width)
    raise JobImpossible(
        f"teacher '{teacher.name}' is a {teacher.architecture}, which no chain can be made of; there are "
        f"{', '.join(architecture_names())}"
    )


def _feasible(teacher: TeacherRow, dataset: DatasetRow, request: RefineIn) -> RefineIn:
    """The request with every width in full. Raises `JobImpossible`, and `WidthError` for a ladder that the teacher
    cannot have."""
    if FROZEN in (teacher.format, teacher.architecture):
        raise JobImpossible(
            f"teacher '{teacher.name}' is an ONNX file, whose weights are frozen; fuse it into a teacher that can be "
            f'refined, by a job \'fuse\' with "inputs": [{{"teacher": "{teacher.name}"}}], or upload its safetensors '
            "or torch weights"
        )
    table, full = network_of(teacher)
    seen = tuple((teacher.input or {}).get(side) for side in ("height", "width"))
    if table.input_size not in (None, seen):
        raise JobImpossible(
            f"teacher '{teacher.name}' was registered for images of {seen[0]} × {seen[1]} (height × width), and the "
            f"position embeddings of a {table.name} are for {table.input_size[0]} × {table.input_size[1]}; register it "
            "for those"
        )
    request.widths(full, table)
    check_license(strictest([rights_of(teacher), rights_of(dataset)]).license)
    return request.spelt_out(full)


def _compressible(session: Session, dataset: DatasetRow, request: CompressIn) -> CompressIn:
    """The request with chains by their own names and the width in full. Raises `JobImpossible`, and `BudgetTooSmall`
    for limits below what pruning can reach."""
    limits = None if request.limits is None else request.limits.parse()
    named = {field: name for field in ("chain", "compatible_with") if (name := getattr(request, field)) is not None}
    rows = dict(zip(named, _kept_chains(session, *named.values()), strict=True))
    settled = {field: row.name for field, row in rows.items()}
    source: TeacherRow | ChainRow
    if request.teacher is not None:
        source = _ready_teacher(session, request.teacher)
        table, width = _prunable_teacher(source)
    else:
        source = rows["chain"]
        settled["width"] = source.widths[-1].width if request.width is None else _rung(source, request.width)
        table, width = architecture(source.architecture), Width.parse(settled["width"])
    try:
        budget_of(source.name, table, width, _input_of(source), limits)
    except ArchitectureError as error:
        raise JobImpossible(f"'{source.name}' cannot be compressed: {error}") from error
    if (old := rows.get("compatible_with")) is not None:
        _require_same_embeddings(old, source, table.embedding_dim(width))
    check_license(strictest([rights_of(row) for row in (source, dataset, *rows.values())]).license)
    return request.model_copy(update=settled)


def _prunable_teacher(teacher: TeacherRow) -> tuple[Architecture, Width]:
    """The teacher's architecture and width. Raises `JobImpossible` where its weights cannot be read."""
    if FROZEN in (teacher.format, teacher.architecture):
        raise JobImpossible(
            f"teacher '{teacher.name}' is an ONNX file, whose weights are frozen; make a teacher of it first by a job "
            "'fuse', or upload its safetensors or torch weights"
        )
    return network_of(teacher)


def _input_of(row: TeacherRow | ChainRow) -> InputSpec:
    """What its networks want to see."""
    seen = row.input or {}
    return InputSpec(seen["height"], seen["width"], tuple(seen["mean"]), tuple(seen["std"]))


def _require_same_embeddings(old: ChainRow, source: TeacherRow | ChainRow, embedding_dim: int) -> None:
    """Raises `JobImpossible` where embeddings of `embedding_dim` numbers cannot meet the space of `old`."""
    if old.embedding_dim != embedding_dim:
        raise JobImpossible(
            f"chain '{old.name}' embeds into {old.embedding_dim} numbers, what is compressed into {embedding_dim}; "
            "compatible_with needs a width and an architecture whose embeddings are as long"
        )
    sizes = [(row.input or {}).get(side) for row in (old, source) for side in ("height", "width")]
    if sizes[:2] != sizes[2:]:
        raise JobImpossible(
            f"chain '{old.name}' sees images of {sizes[0]} × {sizes[1]} (height × width), '{source.name}' of "
            f"{sizes[2]} × {sizes[3]}; compatible_with needs one size"
        )


def _fusible(session: Session, dataset: DatasetRow, request: FuseIn) -> FuseIn:
    """The request with the student's width and every view in full. Raises `JobImpossible`."""
    named = [one.teacher for one in request.inputs] + ([] if request.start_from is None else [request.start_from])
    # Sorted, so that two requests for the same two do not wait for each other.
    rows = {name: _ready_teacher(session, name) for name in sorted(set(named))}
    if request.start_from is not None:
        _require_student(rows[request.start_from], request)
    check_license(fused_rights([rows[name] for name in named], dataset).license)
    inputs = [_seen(rows[one.teacher], one) for one in request.inputs]
    return request.model_copy(update={"width": str(request.student_width), "inputs": inputs})


def fused_rights(teachers: Sequence[TeacherRow], dataset: DatasetRow) -> Rights:
    """What may be done with a teacher made of these."""
    return strictest([*map(rights_of, teachers), rights_of(dataset)])


def _require_student(start: TeacherRow, request: FuseIn) -> None:
    """Raises `JobImpossible` for weights of another network than the one that is trained."""
    if (start.architecture, start.width) != (request.architecture, str(request.student_width)):
        what = "an ONNX file" if start.architecture == FROZEN else f"a {start.architecture} of width {start.width}"
        raise JobImpossible(
            f"teacher '{start.name}' is {what}; start_from needs weights of the {request.architecture} of width "
            f"{request.student_width} that is trained"
        )


def _seen(teacher: TeacherRow, given: FuseInputIn) -> FuseInputIn:
    """With the view as rows and size. Raises `JobImpossible` for another size than the teacher is registered for."""
    size = {side: (teacher.input or {})[side] for side in ("height", "width")}
    view = PAPER_VIEWS[given.view] if isinstance(given.view, str) else given.view
    if view is None:
        return given.model_copy(update={"view": ViewIn(top=0, bottom=1, **size)})
    asked = {side: getattr(view, side) or size[side] for side in size}
    if asked != size:
        raise JobImpossible(
            f"teacher '{teacher.name}' is registered for images of {size['height']} × {size['width']} (height × "
            f"width), and its view says {asked['height']} × {asked['width']}; give top and bottom alone, or register "
            "it for those"
        )
    return given.model_copy(update={"view": ViewIn(top=view.top, bottom=view.bottom, **size)})


def check_license(text: str) -> None:
    """Raises `JobImpossible` for a licence that no chain file can hold."""
    if len(text) > MAX_LICENSE:
        raise JobImpossible(
            f"the licences of teachers and data set together have {len(text)} characters, and a chain file holds "
            f"{MAX_LICENSE}; register them with shorter ones"
        )


def _check_name(session: Session, name: str) -> None:
    """Raises `ReservedName`, and `ChainExists` for a name that is taken, or will be by a job that has not ended."""
    if name in RESERVED_NAMES:
        raise ReservedName(name)
    if Chains(session).find(name) is not None:
        raise ChainExists(f"chain '{name}' exists already, and chains are never overwritten; choose another name")
    if (job := OpenRequests(session).naming(name, _publishing())) is not None:
        raise ChainExists(f"job {job} is making a chain '{name}'; wait for it, cancel it, or choose another name")


def _publishing() -> Sequence[str]:
    return [kind for kind, model in JOB_REQUESTS.items() if "name" in model.model_fields and kind != FUSE]


def _check_teacher_name(session: Session, name: str) -> None:
    """Raises `TeacherExists` for a name that is taken, or will be by a job that has not ended."""
    if TeacherRows(session).find(name) is not None:
        raise TeacherExists(f"teacher '{name}' exists already, and teachers are never overwritten; choose another name")
    require_unclaimed(session, name)
