"""The configuration of a run: read, checked with words that help, and written so that it reproduces itself."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chains.architectures import architecture, architecture_names
from chains.config import Config, differences, dumps, overridden, parse_config, read_config
from chains.data.synthetic import PeopleSettings, train_images
from chains.errors import DataError
from chains.losses import PAPER_LOSS
from chains.pipeline import resolve
from chains.train import paper_recipe
from chains.width import Width, default_narrowest, even_ladder

MINIMAL: dict[str, Any] = {
    "name": "toy",
    "license": "Apache-2.0",
    "data": {"kind": "synthetic"},
    "teacher": {"architecture": "resnet18", "width": "16", "train": {"steps": 20}},
    "refinement": {"narrowest": 4, "rungs": 5, "train": {"steps": 30, "batch": {"identities": 8}}},
}
PEOPLE = train_images(replace(PeopleSettings(), train_identities=20, height=16, width=8))


def narrowest(stem: object) -> dict[str, Any]:
    return {"refinement": {"narrowest": stem, "train": {"steps": 3}}}


def a_config(**sections: Any) -> Config:
    return parse_config({**MINIMAL, **sections}, "toy.toml", Path())


def test_recipes_are_the_engine_s_own() -> None:
    config = a_config()
    assert config.refinement.train is not None
    assert (config.refinement.train.steps, config.refinement.train.batch.identities) == (30, 8)
    assert config.teacher.width == Width(16)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"colour": "red"}, "toy.toml: colour: Extra inputs are not permitted"),
        ({"name": "My Chain"}, "toy.toml: name: String should match"),
        ({"data": {"kind": "market"}}, "data.kind: 'market' is none of auto, synthetic, .*market1501"),
        ({"data": {"kind": "market1501"}}, "data: root is the folder or CSV file"),
        ({"data": {"kind": "synthetic", "root": "x"}}, "data: root is the folder or CSV file"),
        ({"data": {"kind": "folder", "root": "x", "people": {"cameras": 3}}}, "people are settings of the synthetic"),
        ({"teacher": {"train": {"steps": 3}, "width": "wide"}}, "teacher.width: 'wide' is no width"),
        (
            {"teacher": {"architecture": "vgg", "train": {"steps": 3}}},
            "architecture: no architecture 'vgg'; there are: resnet18",
        ),
        ({"teacher": {"width": "w16", "train": {"steps": 3}}}, "teacher.width: w16 is no width of resnet50"),
        (
            {"teacher": {"architecture": "vit_tiny", "width": 50, "train": {"steps": 3}}},
            "teacher.width: width w50 .* must be a multiple of 3",
        ),
        (
            {"teacher": {"architecture": "vit_tiny", "width": 48, "train": {"steps": 3}}},
            "vit_tiny is for images of 64 × 32 .* these are 128 × 64; set data.height = 64 and data.width = 32",
        ),
        (
            {"teacher": {"architecture": "resnet18_ibn_a", "width": 16, "train": {"steps": 3}}, **narrowest(5)},
            "multiples of 2, and 5 is none; the nearest is 4x2-4-8",
        ),
        (
            {
                "teacher": {"architecture": "vit_tiny@128x64", "width": 48, "train": {"steps": 3}},
                "refinement": {"mode": "oskt", "ladder": [12, 48], "train": {"steps": 3}},
            },
            "makes vit_tiny@128x64 vit_tiny_dw@128x64, whose tokens have 96 channels; a teacher of w48 is none",
        ),
        ({"teacher": {}}, "teacher: give one of source, preset and train"),
        ({"teacher": {"source": "x", "start": "y"}}, "start is for a teacher that is trained"),
        ({"teacher": {"train": {"step": 3}}}, "teacher.train.steps"),
        ({"teacher": {"train": {"steps": 0}}}, "toy.toml: .*at least one step"),
        ({"teacher": {"train": {"steps": 3, "batch": {"flip": 2}}}}, "flip of a batch must be within 0 and 1"),
        ({"refinement": {"narrowest": "4"}}, "refinement: give one of preset and train"),
        ({"refinement": {"train": {"steps": 3}}}, "refinement: give one of ladder and narrowest"),
        ({"refinement": {"narrowest": "4", "preset": "paper", "loss": {}}}, "loss belongs to mode 'oskt'"),
        (
            {"refinement": {"mode": "oskt", "narrowest": "4", "preset": "paper"}, "compatible_with": {"chain": "x"}},
            "compatible_with: mode 'oskt' is the paper's and knows no old space",
        ),
        ({"compatible_with": {"weight": 2}}, r"compatible_with\.chain: Field required"),
        ({"data": {"kind": "synthetic", "people": {"height": 64}}}, "data.height and data.width, not people"),
        (
            {"refinement": {"ladder": ["8", "4", "16"], "train": {"steps": 3}}},
            "ladder 8x2-4-8, 4x2-4-8, 16x2-4-8 must rise",
        ),
        (
            {"refinement": {"ladder": ["4", "6", "8"], "train": {"steps": 3}}},
            "must rise to the teacher's width, 16x2-4-8",
        ),
        ({"refinement": {"ladder": [], "train": {"steps": 3}}}, "the ladder .none. must rise"),
        ({"refinement": {"ladder": ["4", "16"], "train": {"steps": 3}}}, "at least three rungs"),
        ({"evaluation": {"calibration_images": 10}}, "evaluation.calibration_images: .*greater than or equal to 256"),
    ],
)
def test_mistakes_name_the_file_and_the_field(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        a_config(**sections)


def test_a_file_that_is_no_toml_or_is_missing_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(DataError, match=r"bad\.toml: is no TOML"):
        read_config(tmp_path / "bad.toml")
    with pytest.raises(DataError, match="cannot be read"):
        read_config(tmp_path / "missing.toml")


def test_what_is_written_is_read_again() -> None:
    config = a_config(refinement={"ladder": ["4", "8x2-4-8", "16"], "preset": "paper", "mode": "oskt"})
    again = parse_config(tomllib.loads(dumps(config, Path())), "again.toml", Path())
    assert again == config
    assert differences(config, again) == []


def test_none_stands_for_what_toml_cannot_say() -> None:
    config = a_config(teacher={"width": "16", "train": {"steps": 20, "clip_norm": "none"}})
    assert config.teacher.train is not None
    assert config.teacher.train.clip_norm is None
    assert 'clip_norm = "none"' in dumps(config, Path())


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "runs" / "first").mkdir(parents=True)
    moved = a_config(data={"kind": "folder", "root": "photos"}, compatible_with={"chain": "../old.safetensors"})
    text = dumps(moved, Path()).replace('root = "photos"', 'root = "../photos"')
    (tmp_path / "configs" / "my.toml").write_text(text)
    config = read_config(tmp_path / "configs" / "my.toml")
    assert config.data.root == tmp_path / "photos"
    assert config.compatible_with is not None
    assert config.compatible_with.chain == tmp_path / "old.safetensors"
    (tmp_path / "runs" / "first" / "config.toml").write_text(dumps(config, tmp_path / "runs" / "first"))
    assert 'root = "../../photos"' in (tmp_path / "runs" / "first" / "config.toml").read_text()
    assert read_config(tmp_path / "runs" / "first" / "config.toml") == config


def test_a_resolved_configuration_stands_for_itself() -> None:
    config = a_config(
        teacher={"architecture": "resnet18", "width": "16", "preset": "paper"},
        refinement={"mode": "oskt", "narrowest": "4", "rungs": 4, "preset": "paper"},
    )
    resolved = resolve(config, PEOPLE)
    assert resolved.teacher.train == paper_recipe(PEOPLE, "teacher")
    assert resolved.teacher.loss == resolved.refinement.loss == PAPER_LOSS
    assert resolved.refinement.train == paper_recipe(PEOPLE, "refine")
    assert resolved.refinement.ladder == even_ladder(Width(4), Width(16), 4)
    assert (resolved.data.height, resolved.data.width) == (128, 64)
    again = parse_config(tomllib.loads(dumps(resolved, Path())), "again.toml", Path())
    assert resolve(again, PEOPLE) == resolved


@pytest.mark.parametrize(
    ("name", "written", "width"),
    [
        ("osnet", "64", Width(64, (4, 6, 8))),
        ("osnet", 16, Width(16, (4, 6, 8))),
        ("osnet", "16x2-4-8", Width(16)),
        ("mobilenetv2", "32", Width(32, ())),
        ("vit_tiny", "w48", Width(48, ())),
        ("resnet50_bot", 64, Width(64)),
    ],
)
def test_a_lone_number_has_the_multipliers_of_the_family(name: str, written: object, width: Width) -> None:
    teacher = {"architecture": name, "width": written, "train": {"steps": 3}}
    data = {"kind": "synthetic", "height": 64, "width": 32}
    stems = [width.stem // 4 // 3 * 3 if name == "vit_tiny" else width.stem // 4, width.stem // 2, width.stem]
    config = a_config(teacher=teacher, data=data, refinement={"ladder": stems, "train": {"steps": 3}})
    assert config.teacher.width == width
    assert config.ladder == tuple(Width(stem, width.multipliers) for stem in stems)
    again = parse_config(tomllib.loads(dumps(config, Path())), "again.toml", Path())
    assert again == config


def test_a_lone_number_on_the_ladder_has_the_multipliers_of_the_teacher_s_width() -> None:
    config = a_config(teacher={"width": "16x2-3-4", "train": {"steps": 3}}, **narrowest("4"))
    assert config.ladder[0] == Width(4, (2, 3, 4))


def test_a_ladder_steps_as_the_architecture_does() -> None:
    """Six heads at steps of eight: of 24."""
    teacher = {"architecture": "vit_small@64x32", "width": 384, "train": {"steps": 3}}
    config = a_config(teacher=teacher, data={"kind": "synthetic", "height": 64, "width": 32}, **narrowest(120))
    assert [width.stem for width in config.ladder] == [120, 168, 216, 240, 288, 336, 384]


@pytest.mark.parametrize("name", architecture_names())
def test_a_teacher_is_as_wide_as_its_architecture_was_published(name: str) -> None:
    table = architecture(name)
    height, width = table.input_size or (256, 128)
    data = {"kind": "synthetic", "height": height, "width": width}
    quarter = default_narrowest(table.usual_width, table.step)
    config = a_config(
        teacher={"architecture": name, "train": {"steps": 3}},
        data=data,
        refinement={"narrowest": str(quarter), "rungs": 3, "train": {"steps": 3}},
    )
    assert config.teacher.width == config.ladder[-1] == table.usual_width


def test_options_of_the_command_line_come_first() -> None:
    config = overridden(a_config(), {"seed": 7, "device": None})
    assert (config.seed, config.device) == (7, "cpu")
    resolved = resolve(config, PEOPLE, steps=99)
    assert resolved.refinement.train is not None
    assert resolved.refinement.train.steps == 99
    with pytest.raises(DataError, match="--device"):
        overridden(a_config(), {"device": "abacus"})


def test_a_path_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command was given relative paths, the run directory lies elsewhere: reading back gives absolute ones."""
    monkeypatch.chdir(tmp_path)
    run, config = tmp_path / "runs" / "first", a_config(data={"kind": "folder", "root": "photos"})
    run.mkdir(parents=True)
    (run / "config.toml").write_text(dumps(config, run))
    assert differences(read_config(run / "config.toml"), config) == []
    moved = a_config(data={"kind": "folder", "root": "others"})
    assert differences(read_config(run / "config.toml"), moved)[0].startswith("data.root: ")


def test_differences_name_the_options() -> None:
    assert differences(a_config(), a_config(seed=3)) == ["seed: 0, not 3"]
