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

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy.orm import Session

from app.db.job_requests import OpenRequests
from app.db.repositories import Chains
from app.db.tables import ChainRow, DatasetRow, TeacherRow
from app.db.teachers import TeacherRows
from app.errors import (
    ChainExists,
    InvalidJobRequest,
    JobImpossible,
    ReservedName,
    TeacherNotReady,
    UnknownChain,
    UnknownJobKind,
    UnknownTeacher,
)
from app.services.datasets import Datasets
from app.services.names import PATTERN
from app.services.registry import RESERVED_NAMES
from app.services.teachers import READY
from app.terms import rights_of, strictest
from chains.arch import Architecture
from chains.architectures import architecture, architecture_names
from chains.architectures.vit import refined_name
from chains.errors import ArchitectureError, WidthError
from chains.width import Width, default_narrowest, even_ladder

MAX_LICENSE = 200  # characters that a chain file's licence may have
MAX_STEPS = 10_000_000
SMALL_STEPS = 300  # of the preset "small": every stage of a run within minutes
RUNGS = 7
FROZEN = "onnx"  # the architecture of a teacher that came as ONNX


def _width(text: str) -> str:
    """As it is: what a lone number means, the teacher or the chain tells. Raises `ValueError`."""
    try:
        Width.parse(text)
    except WidthError as error:
        raise ValueError(str(error)) from error
    return text


Name = Annotated[str, Field(pattern=PATTERN)]
WidthText = Annotated[str, Field(max_length=40), AfterValidator(_width)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
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

    preset: Annotated[
        Literal["small", "paper"] | None,
        Field(
            description=f"`small`: {SMALL_STEPS} steps, to see every stage; `paper`: the schedule of OSKT (ICCV 2025) "
            "for as many images; null: Adam with warm-up and a cosine, as long as `steps` says"
        ),
    ] = None
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
        if self.preset == "paper" and self.batch is not None:
            raise ValueError("the preset 'paper' has a batch of its own; leave batch or the preset out")
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


JOB_REQUESTS: Mapping[str, type[JobRequest]] = {
    "refine": RefineIn,
    "calibrate": CalibrateIn,
    "evaluate": EvaluateIn,
    "finetune": FinetuneIn,
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

        Raises `UnknownTeacher`, `TeacherNotReady`, `UnknownDataset`, `DatasetNotReady`, `UnknownChain`, `ChainExists`,
        `ReservedName`, `WidthError`, and `JobImpossible` for what no worker could do."""
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
        elif isinstance(request, CalibrateIn | EvaluateIn | FinetuneIn):
            chain = _kept_chain(session, str(request.chain))
            named = {"chain": chain.name}
            if isinstance(request, FinetuneIn):
                named["width"] = _rung(chain, request.width)
            request = request.model_copy(update=named)
        if request.new_chain is not None:
            _check_name(session, request.new_chain)
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


def _kept_chain(session: Session, name: str) -> ChainRow:
    """The chain of that name or alias; until the transaction ends nobody deletes it."""
    chains = Chains(session)
    if (found := chains.find(name)) is not None:
        chains.lock(found.name)
        found = chains.find(found.name)
    if found is None:
        raise UnknownChain(name)
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
            f"teacher '{teacher.name}' is an ONNX file, whose weights are frozen; refining from one comes with "
            "importing ONNX teachers. Upload its safetensors or torch weights instead"
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


def check_license(text: str) -> None:
    """Raises `JobImpossible` for a licence that no chain file can hold."""
    if len(text) > MAX_LICENSE:
        raise JobImpossible(
            f"the licences of teacher and data set together have {len(text)} characters, and a chain file holds "
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
    return [kind for kind, model in JOB_REQUESTS.items() if "name" in model.model_fields]
