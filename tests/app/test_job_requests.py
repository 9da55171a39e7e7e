"""What may be asked of workers: the form of the requests, and what is looked at before a job is queued."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from app.api.errors import row_of
from app.db.tables import DatasetRow, JobRow, TeacherRow
from app.errors import (
    AppError,
    ChainExists,
    DatasetNotReady,
    InvalidJobRequest,
    JobImpossible,
    LatencyNotMeasurable,
    ReservedName,
    TeacherExists,
    TeacherNotReady,
    UnknownChain,
    UnknownDataset,
    UnknownJobKind,
    UnknownTeacher,
)
from app.services.job_requests import JOB_REQUESTS, FinetuneIn, FuseIn, JobRequest, RefineIn, parse
from app.worker.kinds import KINDS
from app.worker.training import recipe_of
from chains.architectures import architecture
from chains.errors import BudgetTooSmall, ChainsError, LimitsError, WidthError
from chains.width import Width

REFINE = {"name": "new", "teacher": "r18", "dataset": "site", "preset": "small"}
CALIBRATE = {"chain": "pico", "dataset": "site"}
EVALUATE = {"chain": "pico", "dataset": "site"}
FINETUNE = {"chain": "pico", "width": "4", "dataset": "site"}
TEACHER = {"chain": None, "width": None}
COMPRESS = {"name": "new", "chain": "pico", "width": "8x2-4-8", "dataset": "site"}
FUSE = {
    "name": "new",
    "inputs": [{"teacher": "frozen"}, {"teacher": "r18", "view": {"top": 0.0, "bottom": 0.5}}],
    "image": {"height": 256, "width": 128},
    "dataset": "site",
    "preset": "usual",
}
BODIES = {
    "refine": REFINE,
    "calibrate": CALIBRATE,
    "evaluate": EVALUATE,
    "finetune": FINETUNE,
    "compress": COMPRESS,
    "fuse": FUSE,
}


# --- the form


@pytest.mark.parametrize("kind", BODIES)
def test_a_request_is_stored_with_its_defaults_and_read_again(kind: str) -> None:
    request = parse(kind, BODIES[kind])
    values = request.model_dump(mode="json")
    assert all(is_within(value, values[name]) for name, value in BODIES[kind].items())
    assert parse(kind, values) == request


def is_within(part: object, whole: object) -> bool:
    """Whether all that `part` says stands in `whole`, however deep."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and is_within(value, whole[name]) for name, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) == len(whole) and all(map(is_within, part, whole))
    return part == whole


def test_every_kind_that_can_be_asked_for_is_one_that_workers_know() -> None:
    assert JOB_REQUESTS.keys() == BODIES.keys()
    assert JOB_REQUESTS.keys() <= KINDS.keys()


def test_the_page_on_jobs_has_the_steps_of_every_kind_that_can_be_asked_for() -> None:
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "jobs.md").read_text()
    documented = [re.findall("`([a-z-]+)`", line) for line in page.splitlines() if line.startswith("| `")]
    expected = [[kind, *(name for name, _ in KINDS[kind].steps)] for kind in JOB_REQUESTS]
    assert sorted(documented) == sorted(expected)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("refine", {"nmae": "x"}, "nmae: Extra inputs are not permitted"),
        ("refine", {"name": "My Chain"}, "name: String should match pattern"),
        ("refine", {"name": None}, "name: Input should be a valid string"),
        ("refine", {"preset": None}, "give steps, or a preset: how long to train"),
        ("refine", {"preset": "large"}, "preset: Input should be 'small' or 'paper'"),
        ("refine", {"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ("refine", {"steps": "300"}, "steps: Input should be a valid integer"),
        ("refine", {"learning_rate": float("nan")}, "learning_rate: Input should be a finite number"),
        ("refine", {"narrowest": "wide"}, "narrowest: 'wide' is no width"),
        ("refine", {"narrowest": "4", "ladder": ["4", "16"]}, "give ladder or narrowest, not both"),
        ("refine", {"processes": 2, "micro_batches": 3}, "3 micro_batches cannot be shared out among 2 processes"),
        ("refine", {"precision": "float16"}, "precision float16 needs device 'cuda'"),
        ("refine", {"preset": "paper", "batch": {}}, "the preset 'paper' has a batch of its own"),
        ("refine", {"evaluation": {"calibration_images": 255}}, "evaluation/calibration_images: Input should be gr"),
        ("refine", {"batch": {"identities": 1}}, "batch/identities: Input should be greater than or equal to 2"),
        ("calibrate", {"images": 100}, "images: Input should be greater than or equal to 256"),
        ("evaluate", {"chain": None}, "give one of chain and teacher"),
        ("evaluate", {"teacher": "r18"}, "give one of chain and teacher"),
        ("evaluate", {"chain": None, "teacher": "r18", "name": "x"}, "name is for chains"),
        ("finetune", {"width": "0"}, "width: '0' is no width"),
        ("finetune", {"preset": None}, "give steps, or a preset"),
        ("compress", {"teacher": "r18"}, "give one of chain and teacher: what is compressed"),
        ("compress", {"chain": None}, "give one of chain and teacher: what is compressed"),
        ("compress", {"chain": None, "teacher": "r18"}, "width is for chains; a teacher has only one"),
        ("compress", {"preset": None}, "give steps, or a preset"),
        ("compress", {"batch": {}}, "the preset 'paper' has a batch of its own"),
        ("compress", {"limits": {"max_macs": 0}}, "limits/max_macs: Input should be greater than or equal to 1"),
        ("compress", {"limits": {"max_mac": 1}}, "limits/max_mac: Extra inputs are not permitted"),
        ("compress", {"finetune_steps": 0}, "finetune_steps: Input should be greater than or equal to 1"),
        ("fuse", {"inputs": []}, "inputs: List should have at least 1 item"),
        ("fuse", {"inputs": [{"teacher": "r18"}] * 17}, "inputs: List should have at most 16 items"),
        ("fuse", {"inputs": [{"teacher": "r18", "view": "up3"}]}, "'up3' is none of holistic, up1, mid1, dn1, up2"),
        ("fuse", {"inputs": [{"teacher": "r18", "view": {"top": 0.5}}]}, "bottom: Field required"),
        ("fuse", {"inputs": [{"teacher": "r18", "view": {"top": 0.5, "bottom": 0.5}}]}, "not from 0.5 to 0.5"),
        ("fuse", {"inputs": [{"teacher": "r18", "view": {"top": 0, "bottom": 1.5}}]}, "less than or equal to 1"),
        ("fuse", {"inputs": [{"teacher": "r18", "rows": 3}]}, "rows: Extra inputs are not permitted"),
        ("fuse", {"image": None}, "image: Input should be"),
        ("fuse", {"image": {"height": 256, "width": 8}}, "width: Input should be greater than or equal to 16"),
        ("fuse", {"architecture": "swin"}, "architecture: no architecture 'swin'"),
        (
            "fuse",
            {"architecture": "vit_small", "image": {"height": 128, "width": 64}},
            "256 × 128 (height × width), and image says 128 × 64",
        ),
        ("fuse", {"width": "w168"}, "width: w168 is no width of resnet50"),
        ("fuse", {"loss": {"map": -1.0}}, "loss/map: Input should be greater than or equal to 0"),
        ("fuse", {"preset": None}, "give steps, or a preset"),
        ("fuse", {"preset": "paper"}, "preset: Input should be 'small' or 'usual'"),
        ("fuse", {"batch": {}}, "the preset 'usual' has a batch of its own"),
        ("fuse", {"processes": 2, "micro_batches": 3}, "make them a multiple of 2"),
    ],
)
def test_a_mistake_is_named_with_its_field(kind: str, change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidJobRequest) as refused:
        parse(kind, {**BODIES[kind], **change})
    assert message in str(refused.value)
    assert row_of(refused.value).status == 422


def test_a_kind_nobody_knows_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownJobKind, match="no kind of job 'cook'; there are refine, calibrate, evaluate, finetune"):
        parse("cook", {})


@pytest.mark.parametrize(
    ("name", "full", "asked", "stems"),
    [
        ("resnet50", "64", {}, [16, 24, 32, 40, 48, 56, 64]),
        ("resnet50", "32", {}, [8, 16, 24, 32]),  # steps of eight: seven do not fit
        ("resnet18", "16", {}, [4, 6, 8, 10, 12, 14, 16]),
        ("resnet18", "4", {}, [1, 2, 3, 4]),
        ("resnet18", "16", {"narrowest": "8", "rungs": 3}, [8, 12, 16]),
        ("resnet18", "16", {"ladder": ["5", "9", "16"]}, [5, 9, 16]),
        ("resnet18", "16x2-3-4", {"ladder": ["5", "9", "16"]}, [5, 9, 16]),
        ("resnet18_ibn_a", "16", {}, [4, 6, 8, 10, 12, 14, 16]),  # halves: even stems
        ("resnet18_ibn_a", "12", {}, [2, 4, 6, 8, 10, 12]),  # a quarter is 3, and no width
        ("osnet", "64x4-6-8", {"narrowest": "16"}, [16, 24, 32, 40, 48, 56, 64]),
        ("vit_small", "w384", {}, [96, 144, 192, 240, 288, 336, 384]),  # 6 heads, steps of eight
        ("vit_small", "w384", {"ladder": ["120", "168", "384"]}, [120, 168, 384]),
    ],
)
def test_the_ladder_rises_to_the_teacher_s_width(
    name: str, full: str, asked: Mapping[str, Any], stems: list[int]
) -> None:
    request, width = parse("refine", {**REFINE, **asked}), Width.parse(full)
    assert isinstance(request, RefineIn)
    assert request.widths(width, architecture(name)) == tuple(Width(stem, width.multipliers) for stem in stems)


@pytest.mark.parametrize(
    ("name", "full", "asked", "message"),
    [
        ("resnet18", "16", {"ladder": ["4", "8"]}, "must rise to the teacher's width"),
        ("resnet18", "16", {"ladder": ["8", "4", "16"]}, "must rise to the teacher's width"),
        ("resnet18", "16", {"ladder": ["4", "16"]}, "at least three widths"),
        ("resnet18", "16", {"ladder": ["4", "8", "w16"]}, "w16 is no width of resnet18; write it as in '16x2-4-8'"),
        ("resnet18", "16", {"narrowest": "16"}, "from a narrower to a wider width"),
        ("resnet50", "64", {"narrowest": "32", "rungs": 20}, "20 rungs from 32x2-4-8 to 64x2-4-8 collide"),
        ("resnet18_ibn_a", "16", {"narrowest": "5"}, "multiples of 2, and 5 is none; the nearest is 4x2-4-8"),
        ("vit_small", "w384", {"narrowest": "100"}, "multiples of 6, and 100 is none; the nearest is w102"),
        ("vit_small", "w384", {"rungs": 20}, "20 rungs from w96 to w384 collide at steps of 24; ask for fewer"),
        ("vit_small", "w384", {"ladder": ["96", "100", "384"]}, "must be a multiple of 6"),
        (
            "vit_small",
            "w192",
            {"mode": "oskt"},
            "vit_small_dw, whose tokens have 384 channels; a teacher of w192 is no",
        ),
    ],
)
def test_a_ladder_that_cannot_be_refined_is_refused(
    name: str, full: str, asked: Mapping[str, Any], message: str
) -> None:
    request = parse("refine", {**REFINE, **asked})
    assert isinstance(request, RefineIn)
    with pytest.raises(WidthError, match=message):
        request.widths(Width.parse(full), architecture(name))


def test_a_mode_oskt_chain_may_have_two_widths() -> None:
    request = parse("refine", {**REFINE, "mode": "oskt", "ladder": ["4", "16"]})
    assert isinstance(request, RefineIn)
    assert len(request.widths(Width(16), architecture("resnet18"))) == 2


@pytest.mark.parametrize(
    ("asked", "steps", "changes"),
    [
        ({"preset": "small"}, 300, {"lr": 2e-3, "warmup_steps": 30, "micro_batches": 1}),
        ({"preset": "small", "steps": 50}, 50, {"lr": 2e-3, "warmup_steps": 5, "micro_batches": 1}),
        ({"preset": None, "steps": 5000}, 5000, {"lr": 2e-3, "warmup_steps": 100, "micro_batches": 1}),
        ({"preset": "paper"}, None, {"micro_batches": 1}),
        ({"preset": "paper", "processes": 4, "learning_rate": 0.1}, None, {"micro_batches": 4, "lr": 0.1}),
        ({"preset": "small", "processes": 2, "micro_batches": 8}, 300, {"micro_batches": 8}),
    ],
)
def test_a_preset_gives_what_the_request_leaves_open(
    asked: Mapping[str, Any], steps: int | None, changes: Mapping[str, Any]
) -> None:
    found_steps, found = recipe_of(parse("refine", {**REFINE, **asked}).model_dump(mode="json"))
    assert found_steps == steps
    assert found.items() >= changes.items()


def test_finetuning_follows_the_paper_unless_told_otherwise() -> None:
    request = parse("finetune", FINETUNE)
    assert isinstance(request, FinetuneIn)
    assert (request.preset, recipe_of(request.model_dump())[0]) == ("paper", None)


def test_reading_requests_loads_no_torch() -> None:
    code = "import sys, app.services.job_requests, app.worker.kinds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what it names


@pytest.fixture
def check(app: FastAPI) -> Callable[[str, Mapping[str, Any]], JobRequest]:
    """Look at a request as `POST /jobs` does, with a teacher and a data set for every state there is."""
    services = app.state.services
    with services.database.transaction() as session:
        session.add(teacher("r18", "ready", "resnet18", "16x2-4-8"))
        session.add(teacher("awaiting", "awaiting-weights"))
        session.add(teacher("checking", "checking"))
        session.add(teacher("refused", "refused"))
        session.add(teacher("frozen", "ready", "onnx", None))
        session.add(teacher("odd", "ready", "swin", "w96"))
        session.add(teacher("os", "ready", "osnet", "16x4-6-8"))
        session.add(teacher("tall", "ready", "vit_small@384x128", "w384"))
        session.add(teacher("r18-8", "ready", "resnet18", "8x2-4-8"))
        session.add(teacher("wordy", "ready", "resnet18", "16x2-4-8", license="x" * 195))
        for state in ("ready", "checking", "refused", "deleted"):
            session.add(dataset("site" if state == "ready" else state, state))

    def look(kind: str, body: Mapping[str, Any]) -> JobRequest:
        with services.database.transaction() as session:
            checked: JobRequest = services.job_requests.check_in(session, parse(kind, body))
        return checked

    return look


def teacher(
    name: str, state: str, architecture: str | None = None, width: str | None = None, license: str = "MIT"
) -> TeacherRow:
    now = datetime.now(UTC)
    return TeacherRow(
        name=name, state=state, sha256="0" * 64, size_bytes=1, format=None, architecture=architecture, width=width,
        input={"height": 256, "width": 128, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        license=license, terms="any", consent_basis="synthetic", created_at=now, updated_at=now,
    )  # fmt: skip


def dataset(name: str, state: str) -> DatasetRow:
    now = datetime.now(UTC)
    return DatasetRow(
        name=name, state=state, source="folder", location="/data", options={}, digest="1" * 64, license="CC0-1.0",
        terms="any", consent_basis="synthetic", created_at=now, updated_at=now,
    )  # fmt: skip


@pytest.mark.parametrize("kind", BODIES)
def test_a_request_whose_parts_are_ready_passes(check: Callable[..., JobRequest], kind: str) -> None:
    check(kind, BODIES[kind])


@pytest.mark.parametrize(
    ("kind", "change", "expected", "message"),
    [
        ("refine", {"teacher": "nobody"}, UnknownTeacher, "no teacher 'nobody'"),
        ("refine", {"teacher": "awaiting"}, TeacherNotReady, "awaiting-weights"),
        ("refine", {"teacher": "checking"}, TeacherNotReady, "checking"),
        ("refine", {"teacher": "refused"}, TeacherNotReady, "refused"),
        (
            "refine",
            {"teacher": "frozen"},
            JobImpossible,
            "fuse it into a teacher that can be refined, by a job 'fuse' with",
        ),
        ("refine", {"teacher": "odd"}, JobImpossible, "is a swin, which no chain can be made of"),
        (
            "refine",
            {"teacher": "tall"},
            JobImpossible,
            "for images of 256 × 128 .height × width., and the .* 384 × 128",
        ),
        ("refine", {"teacher": "wordy"}, JobImpossible, "together have 207 characters"),
        ("refine", {"dataset": "nothing"}, UnknownDataset, "no data set 'nothing'"),
        ("refine", {"dataset": "checking"}, DatasetNotReady, "checking"),
        ("refine", {"dataset": "deleted"}, DatasetNotReady, "deleted"),
        ("refine", {"name": "pico"}, ChainExists, "chain 'pico' exists already"),
        ("refine", {"name": "stable"}, ReservedName, "is the name of an alias"),
        ("refine", {"processes": 9}, JobImpossible, "workers start up to 8"),
        ("refine", {"ladder": ["4", "8"]}, WidthError, "must rise to the teacher's width, 16x2-4-8"),
        ("calibrate", {"chain": "nothing"}, UnknownChain, "no chain or alias 'nothing'"),
        ("calibrate", {"name": "pico"}, ChainExists, "exists already"),
        ("calibrate", {"dataset": "refused"}, DatasetNotReady, "refused"),
        ("evaluate", {"chain": None, "teacher": "checking"}, TeacherNotReady, "checking"),
        ("evaluate", {"name": "pico"}, ChainExists, "exists already"),
        ("finetune", {"width": "5"}, JobImpossible, "no width 5x2-4-8; its ladder is 2x2-4-8"),
        ("finetune", {"chain": "nothing"}, UnknownChain, "nothing"),
        ("compress", {"chain": "nothing"}, UnknownChain, "no chain or alias 'nothing'"),
        ("compress", {"compatible_with": "nothing"}, UnknownChain, "no chain or alias 'nothing'"),
        ("compress", {"width": "5"}, JobImpossible, "no width 5x2-4-8; its ladder is 2x2-4-8"),
        ("compress", {"name": "pico"}, ChainExists, "exists already"),
        ("compress", {"dataset": "refused"}, DatasetNotReady, "refused"),
        ("compress", {"processes": 9}, JobImpossible, "workers start up to 8"),
        ("compress", {**TEACHER, "teacher": "nobody"}, UnknownTeacher, "no teacher 'nobody'"),
        ("compress", {**TEACHER, "teacher": "checking"}, TeacherNotReady, "checking"),
        ("compress", {**TEACHER, "teacher": "frozen"}, JobImpossible, "make a teacher of it first by a job 'fuse'"),
        ("compress", {**TEACHER, "teacher": "odd"}, JobImpossible, "is a swin, which no chain can be made of"),
        ("compress", {**TEACHER, "teacher": "os"}, JobImpossible, "'os' cannot be compressed: .* osnet is no ResNet"),
        ("compress", {**TEACHER, "teacher": "wordy"}, JobImpossible, "together have 207 characters"),
        ("compress", {"limits": {}}, LimitsError, "state at least one limit"),
        ("compress", {"limits": {"max_latency_ms": 9.0}}, LatencyNotMeasurable, "max_latency_ms"),
        ("compress", {"limits": {"max_macs": 1000}}, BudgetTooSmall, "no compression of 'pico' fits"),
        ("compress", {"limits": {"max_artifact_bytes": 1000}}, BudgetTooSmall, "no compression of 'pico' fits"),
        ("fuse", {"inputs": [{"teacher": "nobody"}]}, UnknownTeacher, "no teacher 'nobody'"),
        ("fuse", {"inputs": [{"teacher": "frozen"}, {"teacher": "checking"}]}, TeacherNotReady, "checking"),
        ("fuse", {"name": "r18"}, TeacherExists, "teacher 'r18' exists already"),
        ("fuse", {"dataset": "refused"}, DatasetNotReady, "refused"),
        ("fuse", {"processes": 9}, JobImpossible, "workers start up to 8"),
        ("fuse", {"start_from": "nobody"}, UnknownTeacher, "no teacher 'nobody'"),
        (
            "fuse",
            {"start_from": "r18"},
            JobImpossible,
            "'r18' is a resnet18 of width 16x2-4-8; start_from needs weights of the resnet50 of width 64x2-4-8",
        ),
        ("fuse", {"start_from": "frozen"}, JobImpossible, "'frozen' is an ONNX file; start_from needs weights"),
        (
            "fuse",
            {"inputs": [{"teacher": "frozen", "view": "up1"}]},
            JobImpossible,
            "'frozen' is registered for images of 256 × 128 .height × width., and its view says 224 × 224",
        ),
        (
            "fuse",
            {"inputs": [{"teacher": "r18", "view": {"top": 0, "bottom": 1, "width": 64}}]},
            JobImpossible,
            "256 × 128 .height × width., and its view says 256 × 64",
        ),
        ("fuse", {"inputs": [{"teacher": "wordy"}]}, JobImpossible, "licences of teachers and data set together"),
        ("fuse", {"start_from": "wordy", "architecture": "resnet18", "width": "16"}, JobImpossible, "215 characters"),
        (
            "compress",
            {"width": "4", "compatible_with": "stable"},
            JobImpossible,
            "'pico' embeds into 64 numbers, what is compressed into 32",
        ),
        (
            "compress",
            {**TEACHER, "teacher": "r18-8", "compatible_with": "pico"},
            JobImpossible,
            "'pico' sees images of 64 × 32 .height × width., 'r18-8' of 256 × 128",
        ),
    ],
)
def test_a_job_that_could_not_succeed_is_refused_at_once(
    check: Callable[..., JobRequest], kind: str, change: Mapping[str, Any], expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message) as refused:
        check(kind, {**BODIES[kind], **change})
    assert isinstance(refused.value, AppError | ChainsError)
    assert row_of(refused.value).status in (404, 409, 422)


def test_an_onnx_teacher_may_be_measured(check: Callable[..., JobRequest]) -> None:
    check("evaluate", {"teacher": "frozen", "dataset": "site"})


@pytest.mark.parametrize("kind", ["calibrate", "evaluate", "finetune", "compress"])
def test_an_alias_becomes_the_chain_it_points_at(check: Callable[..., JobRequest], kind: str) -> None:
    asked, written = {**BODIES[kind], "chain": "stable"}, {"width": "4x2-4-8"} if kind == "finetune" else {}
    assert check(kind, asked) == parse(kind, {**BODIES[kind], **written})
    assert check(kind, BODIES[kind]) == parse(kind, {**BODIES[kind], **written})


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({}, {}),
        ({"width": None}, {"width": "8x2-4-8"}),
        ({"width": "4"}, {"width": "4x2-4-8"}),
        ({"chain": "stable", "compatible_with": "stable"}, {"chain": "pico", "compatible_with": "pico"}),
        ({**TEACHER, "teacher": "r18"}, {}),
    ],
)
def test_what_a_compression_starts_from_is_written_in_full(
    check: Callable[..., JobRequest], asked: Mapping[str, Any], written: Mapping[str, Any]
) -> None:
    assert check("compress", {**COMPRESS, **asked}) == parse("compress", {**COMPRESS, **asked, **written})


def test_a_budget_is_refused_with_the_floor_and_taken_at_it(check: Callable[..., JobRequest]) -> None:
    asked = {**COMPRESS, **TEACHER, "teacher": "r18"}
    for limit in ("max_macs", "max_params", "max_artifact_bytes", "max_memory_bytes"):
        with pytest.raises(BudgetTooSmall) as refused:
            check("compress", {**asked, "limits": {limit: 1000}})
        assert (refused.value.limit, refused.value.chain) == (limit, "r18")
        check("compress", {**asked, "limits": {limit: refused.value.smallest_available}})


@pytest.mark.parametrize(
    ("view", "written"),
    [
        (None, (0, 1)),
        ("holistic", (0, 1)),
        ({"top": 0.25, "bottom": 0.75}, (0.25, 0.75)),
        ({"top": 0, "bottom": 1, "height": 256, "width": 128}, (0, 1)),
    ],
)
def test_views_and_widths_of_a_fusion_are_written_in_full(
    check: Callable[..., JobRequest], view: object, written: tuple[float, float]
) -> None:
    request = check("fuse", {**FUSE, "inputs": [{"teacher": "frozen", "view": view}]})
    assert isinstance(request, FuseIn)
    seen = {"top": written[0], "bottom": written[1], "height": 256, "width": 128}
    assert [one.model_dump() for one in request.inputs] == [{"teacher": "frozen", "view": seen}]
    assert (request.architecture, request.width) == ("resnet50", "64x2-4-8")


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({"teacher": "os", "narrowest": "4"}, {"narrowest": "4x4-6-8"}),
        ({"teacher": "os", "ladder": ["4", "8", "16"]}, {"ladder": ["4x4-6-8", "8x4-6-8", "16x4-6-8"]}),
        ({"teacher": "r18", "narrowest": "4"}, {"narrowest": "4x2-4-8"}),
    ],
)
def test_a_lone_number_is_a_width_of_the_teacher_s_family(
    check: Callable[..., JobRequest], asked: Mapping[str, Any], written: Mapping[str, Any]
) -> None:
    assert check("refine", {**REFINE, **asked}) == parse("refine", {**REFINE, **asked, **written})


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_of_two_jobs_one_gets_the_name(
    engine: str, make_app: Callable[..., FastAPI], request: pytest.FixtureRequest
) -> None:
    url = {"database_url": request.getfixturevalue("postgres_url")} if engine == "postgres" else {}
    services = make_app(**url).state.services
    with services.database.transaction() as session:
        session.add_all([teacher("r18", "ready", "resnet18", "16x2-4-8"), dataset("site", "ready"), refining("new")])

    def check(kind: str, body: Mapping[str, Any]) -> None:
        with services.database.transaction() as session:
            services.job_requests.check_in(session, parse(kind, body))

    with pytest.raises(ChainExists, match="job first is making a chain 'new'"):
        check("refine", REFINE)
    with pytest.raises(ChainExists, match="job first"):
        check("calibrate", {**CALIBRATE, "name": "new"})
    check("refine", {**REFINE, "name": "newer"})
    with services.database.transaction() as session:
        session.get_one(JobRow, "first").state = "failed"
    check("refine", REFINE)


def refining(chain: str) -> JobRow:
    now = datetime.now(UTC)
    return JobRow(
        id="first", kind="refine", state="running", priority=0, request={**REFINE, "name": chain},
        request_sha256="0" * 64, attempts=1, cancel_requested=False, created_at=now, updated_at=now,
    )  # fmt: skip
