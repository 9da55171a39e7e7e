"""The configuration of a fusion: a TOML file, checked, resolved, and written back so that it reproduces the run.

    [data]     which images            [[inputs]]   the networks to fuse, and the view of each
    [student]  what is trained         [train], [loss], [output]

As in `chains.config`: recipes are the engine's own dataclasses, "none" stands for an option that is absent, and paths
are relative to the folder of the file that names them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
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
from chains.artifact import NAME
from chains.config import DataConfig, OutputConfig, from_toml, mistake_in, to_toml
from chains.errors import ChainsError, DataError, WidthError
from chains.fuse.objective import FusionLoss
from chains.fuse.views import PAPER_VIEWS, View
from chains.importers.frozen import Channels, Pixels
from chains.train import TrainRecipe
from chains.width import Width


def _view(value: object) -> object:
    """A name of the paper's views, or a table whose `top` and `bottom` may be fractions such as "3/7"."""
    if isinstance(value, str):
        if value not in PAPER_VIEWS:
            raise ValueError(f"'{value[:40]}' is none of {', '.join(PAPER_VIEWS)}; or write top, bottom, height, width")
        return PAPER_VIEWS[value]
    if not isinstance(value, Mapping):
        return value
    return {name: _fraction(one) if name in ("top", "bottom") else one for name, one in value.items()}


def _fraction(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"'{value[:40]}' is no fraction; write 0.5 or '3/7'") from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PixelConfig(_Strict):
    """What an input was trained with: `(pixel / 255 - mean) / std`."""

    mean: Channels
    std: Channels

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above 0")
        return self


class InputConfig(_Strict):
    """One network to fuse: see `chains.fuse.partials.open_partial`."""

    file: Path
    view: Annotated[View, BeforeValidator(_view)] | None = None
    input: PixelConfig | None = None

    @property
    def pixels(self) -> Pixels | None:
        return None if self.input is None else (self.input.mean, self.input.std)


class StudentConfig(_Strict):
    """The network that is trained. `width`: by default the architecture's usual one. `start`: whose weights training
    begins with, as that of a teacher in `chains.config`."""

    architecture: str = "resnet50"
    width: Annotated[Width, PlainSerializer(str, return_type=str)] = Field(
        default_factory=lambda known: architecture(known["architecture"]).usual_width
    )
    start: Path | None = None

    @property
    def table(self) -> Architecture:
        return architecture(self.architecture)

    @field_validator("architecture")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return architecture(value).name
        except ChainsError as error:
            raise ValueError(str(error)) from error

    @field_validator("width", mode="before")
    @classmethod
    def _of_the_family(cls, value: object, info: ValidationInfo) -> object:
        """A width as text or a lone number, which has the multipliers of the architecture."""
        name = info.data.get("architecture")
        if name is None or isinstance(value, bool) or not isinstance(value, str | int):
            return value
        try:
            width = Width.parse(str(value), architecture(name).multipliers)
            architecture(name).group_sizes(width)
        except WidthError as error:
            raise ValueError(str(error)) from error
        return width


class FusionConfig(_Strict):
    """A fusion. `name`: of the run. `license`: of the teacher that comes out. `train`: by default our usual schedule.
    `validation_identities`: how many of the test identities are looked at while training; 0: none."""

    name: str = Field(pattern=NAME)
    license: str = Field(min_length=1, max_length=200)
    seed: int = Field(0, ge=0)
    device: Literal["cpu", "cuda"] = "cpu"
    validation_identities: int = Field(50, ge=0)
    data: DataConfig
    student: StudentConfig = Field(default_factory=StudentConfig)
    inputs: tuple[InputConfig, ...] = Field(min_length=1, max_length=64)
    train: TrainRecipe | None = None
    loss: FusionLoss = Field(default_factory=FusionLoss)
    output: OutputConfig = Field(default_factory=OutputConfig)

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        wanted, size = self.student.table.input_size, self.data.size
        if wanted is not None and wanted != size:
            raise ValueError(
                f"{self.student.architecture} is for images of {wanted[0]} × {wanted[1]} (height × width), and these "
                f"are {size[0]} × {size[1]}; set data.height = {wanted[0]} and data.width = {wanted[1]}"
            )
        return self


def read_fusion(path: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> FusionConfig:
    """The configuration in `path`, its paths as seen from here, with `changes` in the place of its own options. Raises
    `DataError` naming the file and the field."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of TOML and of UTF-8
        raise DataError(f"{path}: is no TOML: {error}") from error
    return parse_fusion({**content, **changes}, str(path), path.parent)


def only_input(teacher: Path) -> list[dict[str, str]]:
    """The inputs of a fusion of one network that sees the whole image: a foreign model becomes a chainable teacher."""
    return [{"file": str(teacher.resolve())}]


def parse_fusion(content: Mapping[str, Any], where: str, folder: Path) -> FusionConfig:
    """A configuration from plain values; relative paths start at `folder`. `where` names it in errors."""
    values = dict(from_toml(content))
    if isinstance(inputs := values.get("inputs"), list):
        values["inputs"] = [from_toml(one) for one in inputs]
    try:
        return FusionConfig.model_validate(_with_paths(values, lambda path: os.path.normpath(folder / path)))
    except ValidationError as error:
        raise DataError(f"{where}: {mistake_in(error)}") from error
    except ChainsError as error:  # a recipe or a view that refuses its values
        raise DataError(f"{where}: {error}") from error


def fusion_toml(config: FusionConfig, folder: Path) -> str:
    """`config` as TOML for a file in `folder`: every option, paths relative to the folder."""
    values = _with_paths(config.model_dump(mode="json"), lambda path: os.path.relpath(path, folder))
    inputs = [to_toml(one) for one in values.pop("inputs")]
    return tomli_w.dumps({**to_toml(values), "inputs": inputs})


def difference(known: FusionConfig, config: FusionConfig, *, moved: bool = False) -> str | None:
    """The first section in which the two differ, with both values; a path is where it leads to from here, and with
    `moved` it may lead anywhere."""
    place = (lambda _: "a file") if moved else os.path.abspath
    there, here = (_with_paths(one.model_dump(mode="json"), place) for one in (known, config))
    names = (name for name in here if there[name] != here[name])
    return next((f"{name} is {str(there[name])[:160]}, not {str(here[name])[:160]}" for name in names), None)


def _with_paths(values: Mapping[str, Any], move: Callable[[str], str]) -> dict[str, Any]:
    """`values` with every path in it moved."""
    moved = dict(values)
    for section, name in (("data", "root"), ("student", "start")):
        if section in moved:
            moved[section] = _moved(moved[section], name, move)
    if isinstance(inputs := moved.get("inputs"), list):
        moved["inputs"] = [_moved(one, "file", move) for one in inputs]
    return moved


def _moved(table: Any, name: str, move: Callable[[str], str]) -> Any:
    if not isinstance(table, Mapping) or not isinstance(table.get(name), str):
        return table
    return {**table, name: move(table[name])}
