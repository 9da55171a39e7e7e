"""The configuration of a run: a TOML file, checked, resolved, and written back so that it reproduces the run.

    [data]        which images                   [refinement]   ladder, mode, recipe
    [teacher]     architecture, width, recipe    [evaluation]   what is measured        [output]   how often is written
    [compatible_with]   an old chain, whose galleries shall stay searchable; may be left out

Recipes are the dataclasses of the engine itself (`TrainRecipe`, `BatchRecipe`, …), field by field, so the file can say
all that Python can. TOML has no null: where an option may be absent (`clip_norm`), write "none". Paths are relative to
the folder of the file that names them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from chains.arch import Architecture
from chains.architectures import architecture
from chains.architectures.vit import refined_name
from chains.artifact import NAME
from chains.data.readers import KINDS
from chains.data.readers.dataset import Boxes, Camera
from chains.errors import ArchitectureError, ChainsError, DataError, WidthError
from chains.losses import LossRecipe
from chains.nested import NestedRecipe, require_sandwich
from chains.train import TrainRecipe
from chains.width import Multipliers, Width, even_ladder

NULL = "none"
SYNTHETIC = ("synthetic", "synthetic:station")
DATA_KINDS = ("auto", *SYNTHETIC, *KINDS)


def _width(value: object) -> object:
    """`16x2-4-8`, `"16"` and `16` are all a width."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return Width.parse(str(value))
        except ChainsError as error:
            raise ValueError(str(error)) from error
    return value


def _spelt_out(value: object, multipliers: Multipliers) -> object:
    """A lone number as the width that it is in a family with these multipliers. What is no width is left to the check
    of its own field, which names it."""
    if isinstance(value, list | tuple):
        return [_spelt_out(one, multipliers) for one in value]
    if isinstance(value, str | int) and not isinstance(value, bool):
        with suppress(WidthError):
            return Width.parse(str(value), multipliers)
    return value


def _architecture(name: str) -> str:
    try:
        return architecture(name).name
    except ArchitectureError as error:
        raise ValueError(str(error)) from error


def _known(names: tuple[str, ...]) -> BeforeValidator:
    def check(value: object) -> object:
        if value not in names:
            raise ValueError(f"'{value}' is none of {', '.join(names)}")
        return value

    return BeforeValidator(check)


WidthText = Annotated[Width, BeforeValidator(_width), PlainSerializer(str, return_type=str)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Strict):
    """Which images. `kind`: a layout, "auto" (found out from `root`), "synthetic" or "synthetic:station". `name`: what
    results call them; default: as their reader does. `height`, `width`: of the crops; default 256 × 128, for synthetic
    people 128 × 64. `people`: fields of `PeopleSettings`, for
    synthetic people. The others are those of `chains.data.readers.ReadOptions`."""

    kind: Annotated[str, _known(DATA_KINDS)] = "auto"
    root: Path | None = None
    name: str | None = Field(None, min_length=1, max_length=64)
    height: int | None = Field(None, ge=16, le=4096)
    width: int | None = Field(None, ge=16, le=4096)
    seed: int = Field(0, ge=0)
    boxes: Boxes = "detected"
    has_val_in_train: bool = False
    query_camera: Camera = "a"
    queries_per_identity: int = Field(1, ge=1)
    people: dict[str, int] = Field(default_factory=dict)

    @property
    def is_synthetic(self) -> bool:
        return self.kind in SYNTHETIC

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crops."""
        height, width = (128, 64) if self.is_synthetic else (256, 128)
        return self.height or height, self.width or width

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_synthetic == (self.root is not None):
            raise ValueError("root is the folder or CSV file of the images; every kind but the synthetic ones needs it")
        if self.people and not self.is_synthetic:
            raise ValueError("people are settings of the synthetic kinds")
        if self.people.keys() & {"height", "width"}:
            raise ValueError("the size of crops is set by data.height and data.width, not people")
        return self


class TeacherConfig(_Strict):
    """The teacher: trained by `train` (or the `preset`), or taken as it is from `source`, a run directory or its
    `teacher.safetensors`. `width`: by default the architecture's usual one. `classifier`: of a teacher from `source`,
    see `chains.classifier`. `start`: whose weights training begins with, a student or teacher file or any checkpoint
    that is recognised, ImageNet's too (`chains.importers.pretraining`)."""

    architecture: Annotated[str, AfterValidator(_architecture)] = "resnet50"
    width: WidthText = Field(default_factory=lambda known: architecture(known["architecture"]).usual_width)
    source: Path | None = None
    classifier: Literal["own", "centroids", "auto"] = "own"
    start: Path | None = None
    preset: Literal["paper"] | None = None
    train: TrainRecipe | None = None
    loss: LossRecipe = Field(default_factory=LossRecipe)

    @property
    def table(self) -> Architecture:
        return architecture(self.architecture)

    @field_validator("width", mode="before")
    @classmethod
    def _as_the_family(cls, value: object, info: ValidationInfo) -> object:
        """A lone number has the multipliers of the architecture."""
        name = info.data.get("architecture")
        return value if name is None else _spelt_out(value, architecture(name).multipliers)

    @field_validator("width")
    @classmethod
    def _require_whole(cls, value: Width, info: ValidationInfo) -> Width:
        if (name := info.data.get("architecture")) is not None:
            try:
                architecture(name).group_sizes(value)
            except WidthError as error:
                raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(given is not None for given in (self.source, self.preset, self.train)) != 1:
            raise ValueError("give one of source, preset and train: where the teacher comes from")
        if self.source is not None and self.start is not None:
            raise ValueError("start is for a teacher that is trained; one from source is taken as it is")
        if self.source is None and self.classifier != "own":
            raise ValueError("classifier is for a teacher from source; one that is trained has its own")
        return self


class RefinementConfig(_Strict):
    """The ladder, as a list or as `rungs` even steps from `narrowest` to the teacher's width, and how it is refined.
    `nested`: of that mode; `loss`: of mode "oskt", where the preset takes the paper's."""

    mode: Literal["nested", "oskt"] = "nested"
    ladder: tuple[WidthText, ...] | None = None
    narrowest: WidthText | None = None
    rungs: int = Field(7, ge=2, le=256)
    preset: Literal["paper"] | None = None
    train: TrainRecipe | None = None
    nested: NestedRecipe = Field(default_factory=NestedRecipe)
    loss: LossRecipe | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.train is None) == (self.preset is None):
            raise ValueError("give one of preset and train: how long and how fast to refine")
        if (self.ladder is None) == (self.narrowest is None):
            raise ValueError("give one of ladder and narrowest: the widths on offer")
        if self.loss is not None and self.mode != "oskt":
            raise ValueError("loss belongs to mode 'oskt'; in mode 'nested' it is nested.loss")
        return self

    def rungs_to(self, full: Width, table: Architecture) -> tuple[Width, ...]:
        """The ladder under a teacher of width `full`. Raises `WidthError` where there is none that can be refined."""
        ladder = self.ladder or ()
        if self.narrowest is not None:
            ladder = even_ladder(self.narrowest, full, self.rungs, step=table.step)
        for width in ladder:
            table.require_within(width, full)
        if not ladder or ladder[-1] != full or list(ladder) != sorted(set(ladder)):
            rungs = ", ".join(str(width) for width in ladder) or "(none)"
            raise WidthError(f"refinement: the ladder {rungs} must rise to the teacher's width, {full}")
        if self.mode == "nested":
            require_sandwich(ladder, full, self.nested)
        else:
            refined_name(table, full)
        return ladder


class CompatibleConfig(_Strict):
    """An old chain into whose embedding space teacher and chain are trained. `weight`, `scale`: see
    `chains.compatible.Anchor`."""

    chain: Path
    weight: float = Field(1.0, gt=0)
    scale: float = Field(30.0, gt=0)


class EvaluationConfig(_Strict):
    """What is measured. `calibration_images`: how many training images give the statistics. `validation_identities`:
    how many of the test identities are looked at while training; 0: none. `seed`: of the bootstrap and the choices."""

    seed: int = Field(0, ge=0)
    calibration_images: int = Field(1024, ge=256)
    validation_identities: int = Field(50, ge=0)


class OutputConfig(_Strict):
    """How often, in steps, a line is reported, a checkpoint written, the validation made."""

    report_steps: int = Field(50, ge=1)
    checkpoint_steps: int = Field(500, ge=1)
    validate_steps: int = Field(1000, ge=1)


class DataFile(_Strict):
    """A file that names images and nothing else."""

    data: DataConfig


class RecipeFile(_Strict):
    """A recipe alone in a file of its own: an unknown field is a mistake there too."""

    train: TrainRecipe


class Config(_Strict):
    """A run. `name` becomes the chain's. `made_from`: words of the user's own, which the chain's provenance repeats."""

    name: str = Field(pattern=NAME)
    license: str = Field(min_length=1, max_length=200)
    seed: int = Field(0, ge=0)
    device: Literal["cpu", "cuda"] = "cpu"
    made_from: dict[str, str] = Field(default_factory=dict)
    data: DataConfig
    teacher: TeacherConfig
    refinement: RefinementConfig
    compatible_with: CompatibleConfig | None = None
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    @property
    def ladder(self) -> tuple[Width, ...]:
        """The widths of the chain, narrow to wide."""
        return self.refinement.rungs_to(self.teacher.width, self.teacher.table)

    @field_validator("refinement", mode="before")
    @classmethod
    def _as_the_teacher(cls, value: object, info: ValidationInfo) -> object:
        """A lone number on the ladder has the multipliers of the teacher's width."""
        teacher = info.data.get("teacher")
        if teacher is None or not isinstance(value, Mapping):
            return value
        spelt = {n: _spelt_out(value[n], teacher.width.multipliers) for n in ("ladder", "narrowest") if n in value}
        return {**value, **spelt}

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        wanted, (height, width) = self.teacher.table.input_size, self.data.size
        if wanted is not None and wanted != (height, width):
            raise DataError(
                f"{self.teacher.architecture} is for images of {wanted[0]} × {wanted[1]} (height × width), for its "
                f"position embeddings are, and these are {height} × {width}; set data.height = {wanted[0]} and "
                f"data.width = {wanted[1]}, or name the architecture for your size"
            )
        return self

    @model_validator(mode="after")
    def _check_ladder(self) -> Self:
        self.refinement.rungs_to(self.teacher.width, self.teacher.table)
        return self

    @field_validator("compatible_with")
    @classmethod
    def _check(cls, value: CompatibleConfig | None, info: ValidationInfo) -> CompatibleConfig | None:
        refinement = info.data.get("refinement")
        if value is not None and refinement is not None and refinement.mode == "oskt":
            raise ValueError("mode 'oskt' is the paper's and knows no old space; refine in mode 'nested'")
        return value


PATHS = (("data", "root"), ("teacher", "source"), ("teacher", "start"), ("compatible_with", "chain"))


def read_config(path: Path) -> Config:
    """The configuration in `path`, its paths as seen from here. Raises `DataError` naming the file and the field."""
    return parse_config(_read_toml(path), str(path), path.parent)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of TOML and of UTF-8
        raise DataError(f"{path}: is no TOML: {error}") from error


def read_data(path: Path) -> DataConfig:
    """The [data] of `path`, a run's configuration or a file with nothing else in it. Raises as `read_config`."""
    content = _read_toml(path)
    if content.keys() != {"data"}:
        return parse_config(content, str(path), path.parent).data
    moved = _with_paths(from_toml(content), lambda root: os.path.normpath(path.parent / root))
    try:
        return DataFile.model_validate(moved).data
    except ValidationError as error:
        raise DataError(f"{path}: {mistake_in(error)}") from error


def parse_config(content: Mapping[str, Any], where: str, folder: Path) -> Config:
    """A configuration from plain values; relative paths start at `folder`. `where` names it in errors."""
    moved = _with_paths(from_toml(content), lambda path: os.path.normpath(folder / path))
    try:
        return Config.model_validate(moved)
    except ValidationError as error:
        raise DataError(f"{where}: {mistake_in(error)}") from error
    except ChainsError as error:  # a recipe that refuses its values
        raise DataError(f"{where}: {error}") from error


def overridden(config: Config, given: Mapping[str, Any]) -> Config:
    """`config` with options of the command line in place of its own; `None` is not given. Raises `DataError`."""
    try:
        return Config.model_validate({**dict(config), **{name: v for name, v in given.items() if v is not None}})
    except ValidationError as error:
        raise DataError(f"--{mistake_in(error)}") from error


def mistake_in(error: ValidationError) -> str:
    """The first mistake that was found: its field and what is wrong."""
    mistake = error.errors()[0]
    field = ".".join(str(part) for part in mistake["loc"]) or "the file"
    return f"{field}: {mistake['msg'].removeprefix('Value error, ')}"


def dumps(config: Config, folder: Path) -> str:
    """`config` as TOML for a file in `folder`: every option, paths relative to the folder."""
    values = _with_paths(config.model_dump(mode="json"), lambda path: os.path.relpath(path, folder))
    return tomli_w.dumps(to_toml(values))


def differences(one: Config, other: Config, *, moved: bool = False) -> list[str]:
    """`field: value, not value` for every option in which the two differ; a path is where it leads to from here, and
    with `moved` it may lead anywhere."""
    place = (lambda _: "a file") if moved else os.path.abspath
    values = (_with_paths(config.model_dump(mode="json"), place) for config in (one, other))
    left, right = (dict(_leaves(of_one)) for of_one in values)
    names = sorted(left.keys() | right.keys())
    return [f"{n}: {left.get(n)}, not {right.get(n)}" for n in names if left.get(n) != right.get(n)]


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name}.{key}" if name else key)]


def from_toml(value: Any) -> Any:
    """TOML's "none" as None, everywhere."""
    if isinstance(value, Mapping):
        return {key: from_toml(inner) for key, inner in value.items()}
    return None if value == NULL else value


def to_toml(value: Any) -> Any:
    """None as "none", everywhere."""
    if isinstance(value, dict):
        return {key: to_toml(inner) for key, inner in value.items()}
    return NULL if value is None else value


def _with_paths(values: dict[str, Any], move: Callable[[str], str]) -> dict[str, Any]:
    """`values` with every path in it moved."""
    moved = {key: dict(inner) if isinstance(inner, dict) else inner for key, inner in values.items()}
    for section, name in PATHS:
        table = moved.get(section)
        if isinstance(table, dict) and isinstance(table.get(name), str):
            table[name] = move(table[name])
    return moved
