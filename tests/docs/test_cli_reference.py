"""The page of commands names every command and option, and every field of a configuration, and no others."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from app.cli import cli
from chains.config import (
    CompatibleConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    OutputConfig,
    RefinementConfig,
    TeacherConfig,
)
from chains.data.batches import BatchRecipe
from chains.losses import LossRecipe
from chains.nested import NestedRecipe
from chains.train import TrainRecipe

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text()
TOP = typer.main.get_command(cli).commands  # type: ignore[attr-defined]
COMMANDS = {name: command for name, command in TOP.items() if not hasattr(command, "commands")} | {
    f"{group} {name}": command
    for group, found in TOP.items()
    for name, command in getattr(found, "commands", {}).items()
}
SECTIONS = dict(re.findall(r"^##? (\w[^\n]*)\n(.*?)(?=^##? |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SHOWN_ELSEWHERE = {"data", "teacher", "refinement", "compatible_with", "evaluation", "output"}


def names(section: str) -> set[str]:
    """What stands in the first column of the section's tables."""
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| ")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_command_has_its_section() -> None:
    assert set(COMMANDS) <= set(SECTIONS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_command_s_table(command: str) -> None:
    options = [p for p in COMMANDS[command].params if p.param_type_name == "option"]
    assert names(SECTIONS[command]) == {name for option in options for name in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("The configuration of a run", set(Config.model_fields) - SHOWN_ELSEWHERE),
        ("data", set(DataConfig.model_fields)),
        ("teacher", set(TeacherConfig.model_fields)),
        ("refinement", set(RefinementConfig.model_fields) | {field.name for field in fields(NestedRecipe)}),
        ("compatible_with", set(CompatibleConfig.model_fields)),
        ("evaluation", set(EvaluationConfig.model_fields)),
        ("output", set(OutputConfig.model_fields)),
        ("train", {field.name for recipe in (TrainRecipe, BatchRecipe) for field in fields(recipe)}),
        ("loss", {field.name for field in fields(LossRecipe)}),
    ],
)
def test_every_field_of_a_configuration_is_in_its_table(section: str, expected: set[str]) -> None:
    assert names(SECTIONS[section]) == expected
