"""The how-to from photographs to a published chain: every command of it runs, at toy size, in its order."""

import json
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from PIL import Image

from app.cli import main
from chains.artifact import load
from chains.config import read_config
from chains.data.synthetic import PeopleSettings, train_images

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "refine-on-your-data.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small photographs of 40 people, and the page's configuration cut down to a few small steps."""
    settings = replace(PeopleSettings(), train_identities=40, train_images_per_identity=14, height=32, width=16)
    people = train_images(settings)  # half of them are trained on: 280 images, and calibration wants 256
    for index, (pixels, pid) in enumerate(zip(people.images, people.pids, strict=True)):
        folder = tmp_path / "photos" / f"person-{pid}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (config,) = (tomllib.loads(block) for block in blocks("toml"))
    config["data"] |= {"height": 32, "width": 16, "queries_per_identity": 2}
    for section in ("teacher", "refinement"):
        config[section]["train"] |= {"steps": 2, "warmup_steps": 1}
    (tmp_path / "my-site.toml").write_text(tomli_w.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of one line of the page."""
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    assert words[0] == "widthwise"
    steps = ["2" if before == "--steps" else word for before, word in zip(["", *words], words, strict=False)]
    monkeypatch.setattr(sys, "argv", steps)
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_page_s_configuration_is_the_example() -> None:
    assert blocks("toml") == [(ROOT / "examples" / "my-site.toml").read_text()]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_configuration(example: Path) -> None:
    config = read_config(example)
    assert config.ladder[-1] == config.teacher.width


def test_every_command_of_the_page_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 10
    monkeypatch.setenv("WIDTHWISE_DATA_DIR", "./var")
    assert run("widthwise migrate", monkeypatch) == 0  # the page's service runs already
    for command in commands:
        assert run(command, monkeypatch) == 0, command
    chain = load(place / "runs" / "my-site" / "chain.safetensors")
    assert json.loads((place / "runs" / "my-site" / "report.json").read_text())["digest"] == chain.digest
    assert (place / "var" / "objects").is_dir()
    (code,) = blocks("python")
    (place / "train_on.py").write_text(code)
    trained = runpy.run_path(str(place / "train_on.py"))
    assert trained["loss"].isfinite()
