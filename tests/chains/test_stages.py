"""A run a stage at a time, its folder moved between the stages; a classifier of centroids; the last look at a chain."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chains import stages
from chains.artifact import StoredChain, dump, load
from chains.chain import Chain, Mode
from chains.classifier import centroid_classifier, share_right, with_classifier
from chains.config import parse_config, read_config, read_data
from chains.data.images import Images
from chains.errors import ChainFileError, ChainMismatch, DataError
from chains.evaluate import embed
from chains.export import Exported, load_trained, origin, save_trained
from chains.nested import NestedRecipe
from chains.pipeline import LEFT, STAGES, run_refinement
from chains.refine import clustered, refine
from chains.testing import pico_chain
from chains.train import Run
from chains.verify import verify
from tests.chains.test_cli import FILES, TOY
from tests.chains.toys import INPUT, LADDER, RECIPE, a_teacher, flat_people

# --- a run by stages


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StoredChain]:
    """A run's configuration, and the chain of the run done in one go, in the folder `whole` beside it."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "toy.toml").write_text(TOY)
    stored = run_refinement(read_config(folder / "toy.toml"), folder / "whole", resume=False, say=print)
    assert stored is not None
    return folder / "toy.toml", stored


def test_a_run_by_stages_in_a_folder_that_moves_gives_the_chain_of_a_run_in_one_go(
    toy: tuple[Path, StoredChain], tmp_path: Path
) -> None:
    config, whole = read_config(toy[0]), toy[1]
    place, digest = tmp_path / "start", ""
    for stage in STAGES:
        stored = run_refinement(config, place, resume=True, say=print, until=stage, moved=True)
        assert stored is not None
        digest = stored.digest
        left = {path.name for path in place.iterdir()}
        assert (LEFT.get(stage) in left) == (stage != "evaluate")
        place = place.rename(tmp_path / f"after-{stage}")
    assert digest == whole.digest
    assert {path.name for path in place.iterdir()} == FILES


def test_a_stage_that_is_done_is_not_done_again(toy: tuple[Path, StoredChain], tmp_path: Path) -> None:
    config = read_config(toy[0])
    first = run_refinement(config, tmp_path / "run", resume=True, say=print, until="refine")
    (tmp_path / "run" / "checkpoint-refinement.safetensors").unlink()
    said: list[str] = []
    second = run_refinement(config, tmp_path / "run", resume=True, say=said.append, until="refine")
    assert first is not None
    assert second is not None
    assert second.digest == first.digest
    assert not any("refinement:" in line for line in said)


def test_a_moved_folder_of_another_run_is_refused(toy: tuple[Path, StoredChain], tmp_path: Path) -> None:
    config = read_config(toy[0])
    run_refinement(config, tmp_path / "run", resume=True, say=print, until="cluster")
    other = config.model_copy(update={"seed": 5})
    with pytest.raises(DataError, match="holds another run: seed: 0, not 5"):
        run_refinement(other, tmp_path / "run", resume=True, say=print, until="refine", moved=True)


def test_the_log_tells_how_many_steps_and_epochs(toy: tuple[Path, StoredChain]) -> None:
    events = [json.loads(line) for line in (toy[0].parent / "whole" / "metrics.jsonl").read_text().splitlines()]
    last = [event for event in events if event["stage"] == "refinement" and "losses" in event][-1]
    assert (last["step"], last["steps"]) == (12, 12)
    assert 0 < last["epoch"] < 12


def test_what_a_chain_was_made_from_stands_in_its_provenance_and_nowhere_by_default(
    toy: tuple[Path, StoredChain], tmp_path: Path
) -> None:
    plain = toy[1].chain.provenance
    assert "made_from" not in plain
    assert "classifier" not in plain["teacher"]
    assert "name" not in plain["data"]
    values = tomllib.loads(TOY)
    values |= {"made_from": {"ticket": "W-1"}, "data": {**values["data"], "name": "the-site"}}
    config = parse_config(values, "test", tmp_path)
    clustered = run_refinement(config, tmp_path / "run", resume=True, say=print, until="cluster")
    assert clustered is not None
    assert clustered.chain.provenance["made_from"] == {"ticket": "W-1"}
    assert clustered.chain.provenance["images"] == "the-site"


def test_refining_with_partitions_made_before_changes_nothing() -> None:
    teacher = a_teacher()
    modes: tuple[Mode, ...] = ("nested", "oskt")
    for mode in modes:
        before = clustered(teacher, LADDER, mode, NestedRecipe())
        with_them = refine(
            teacher, LADDER, flat_people(), INPUT, RECIPE, 0, Run(), mode=mode, partitions=before.partitions
        )
        without = refine(teacher, LADDER, flat_people(), INPUT, RECIPE, 0, mode=mode)
        assert all(np.array_equal(with_them.tensors[name], without.tensors[name]) for name in without.tensors)


# --- the command that workers start


def test_a_refusal_is_written_where_the_result_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"do": "verify", "chain": str(tmp_path / "none"), "data": {"kind": "synthetic"}}
    assert run_task(tmp_path, task) == 2
    said = capsys.readouterr().err
    assert json.loads((tmp_path / "result.json").read_text())["refused"] == said.rstrip("\n")
    assert "cannot be read" in said or "No such file" in said
    assert run_task(tmp_path, {"do": "rule the world"}) == 2
    assert "rule the world" in capsys.readouterr().err


def run_task(folder: Path, task: dict[str, Any]) -> int:
    (folder / "task.json").write_text(json.dumps(task))
    return stages.main([str(folder / "task.json"), str(folder / "result.json")])


def result_of(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    assert run_task(folder, task) == 0
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_calibrating_and_measuring_leave_the_embedding_space_and_tell_what_was_done(
    toy: tuple[Path, StoredChain], tmp_path: Path
) -> None:
    chain, data = toy[0].parent / "whole" / "chain.safetensors", tomllib.loads(TOY)["data"]
    renamed = {"name": "again", "license": "MIT AND CC0-1.0", "made_from": {"job": "7"}, "seed": 3}
    out = tmp_path / "calibrated.safetensors"
    calibrate = {"do": "calibrate", "chain": str(chain), "data": data, "out": str(out), "images": 256, **renamed}
    result_of(tmp_path, calibrate)
    calibrated = load(out).chain
    assert (calibrated.name, calibrated.license, calibrated.frontier) == ("again", "MIT AND CC0-1.0", None)
    assert calibrated.embedding_space == toy[1].chain.embedding_space
    assert calibrated.provenance["calibrated_on"]["chain_digest"] == toy[1].digest

    evaluate = {"do": "evaluate", "chain": str(out), "data": data, "folder": str(tmp_path / "measured")}
    report = result_of(tmp_path, evaluate)
    written = load(tmp_path / "measured" / "chain.safetensors")
    assert report["digest"] == written.digest
    assert {path.name for path in (tmp_path / "measured").iterdir()} == {
        *("chain.safetensors", "report.json", "widths.csv", "frontier.png", "cross_width.png")
    }
    verified = result_of(
        tmp_path, {"do": "verify", "chain": str(tmp_path / "measured/chain.safetensors"), "data": data}
    )
    assert verified["digest"] == written.digest
    assert verified["largest_difference"].keys() == {"2x2-4-8", "4x2-4-8"}


def test_a_teacher_is_measured_as_a_network_and_as_an_onnx_file_with_the_same_figures(
    toy: tuple[Path, StoredChain], tmp_path: Path
) -> None:
    folder, data = toy[0].parent / "whole", tomllib.loads(TOY)["data"]
    onnx = tmp_path / "export.onnx"
    result_of(tmp_path, {"do": "export", "chain": str(folder / "chain.safetensors"), "width": "4", "out": str(onnx)})
    spec = {"height": 32, "width": 16, "mean": list(toy[1].chain.input.mean), "std": list(toy[1].chain.input.std)}
    measure = {"do": "evaluate-teacher", "data": data, "input": spec}
    network = result_of(tmp_path, {**measure, "teacher": str(folder / "teacher.safetensors")})
    frozen = result_of(tmp_path, {**measure, "teacher": str(onnx)})
    report = json.loads((folder / "report.json").read_text())
    assert network["map"] == report["teacher"]["map"]
    assert frozen["map"] == report["widths"][-1]["map"]
    assert frozen["queries"] == report["queries"]


# --- a classifier of centroids


def embeddings_of(people: Images) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = a_teacher()
    labels = torch.from_numpy(np.unique(people.pids, return_inverse=True)[1])
    return torch.from_numpy(embed(teacher.model, people, INPUT)), labels


def test_the_centroids_put_the_images_to_their_people() -> None:
    embeddings, labels = embeddings_of(flat_people())
    classifier = centroid_classifier(embeddings, labels)
    assert classifier.shape == (8, embeddings.shape[1])
    assert share_right(classifier, embeddings, labels) > 0.6 > share_right(-classifier, embeddings, labels)


def test_the_scale_of_the_centroids_is_the_one_of_the_smallest_cross_entropy() -> None:
    embeddings, labels = embeddings_of(flat_people())
    classifier = centroid_classifier(embeddings, labels)
    losses = [
        float(torch.nn.functional.cross_entropy(embeddings @ (factor * classifier).T, labels))
        for factor in (0.5, 1.0, 2.0)
    ]
    assert min(losses) == losses[1]


def test_embeddings_without_a_direction_are_refused() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(DataError, match="identity number 0 have no direction in common"):
        centroid_classifier(embeddings, torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    ("own", "choice", "expected"),
    [
        (lambda right: right, "auto", "own"),
        (lambda right: right, "centroids", "centroids"),
        (lambda right: right.roll(1, 0), "auto", "centroids"),  # as many people, in another order
        (lambda right: right[:5], "auto", "centroids"),
        (lambda _: None, "auto", "centroids"),
    ],
)
def test_a_teacher_keeps_its_classifier_only_where_it_knows_these_people(
    own: Callable[[torch.Tensor], torch.Tensor | None], choice: Any, expected: str
) -> None:
    people, teacher = flat_people(), a_teacher()
    right = centroid_classifier(*embeddings_of(people))
    exported = Exported(teacher.model, origin("teacher", teacher.model, INPUT, "MIT"), own(right))
    trained, which = with_classifier(exported, choice, people, INPUT)
    assert which == expected
    assert len(trained.classifier) == 8


def test_a_run_may_ask_for_a_classifier_of_centroids(toy: tuple[Path, StoredChain], tmp_path: Path) -> None:
    """And says so in the chain; without it a teacher of other people is refused as before."""
    source = tmp_path / "teacher.safetensors"
    trained = load_trained(toy[0].parent / "whole" / "teacher.safetensors")
    mark = origin("teacher", trained.model, toy[1].chain.input, "MIT")
    save_trained(replace(trained, classifier=trained.classifier[:9]), mark, source)
    values = tomllib.loads(TOY)
    values["teacher"] = {"architecture": "resnet18", "width": "4", "source": str(source)}
    refused = parse_config(values, "test", tmp_path)
    with pytest.raises(DataError, match="knows 9 identities, the images have 40"):
        run_refinement(refused, tmp_path / "refused", resume=False, say=print, until="refine")
    values["teacher"]["classifier"] = "centroids"
    stored = run_refinement(parse_config(values, "test", tmp_path), tmp_path / "run", resume=False, say=print)
    assert stored is not None
    assert stored.chain.provenance["classifier"] == "centroids"
    assert stored.chain.provenance["teacher"]["classifier"] == "centroids"


# --- the last look


def stored(chain: Chain) -> StoredChain:
    return load(dump(chain))


def test_a_chain_whose_students_run_is_verified() -> None:
    found = verify(stored(pico_chain(height=32, width=16)), flat_people(2))
    assert found.images == 8
    assert all(difference < 1e-4 for difference in found.largest_difference.values())
    assert [width.stem for width in found.largest_difference] == [2, 8]


def test_a_chain_without_accuracies_is_not_verified() -> None:
    with pytest.raises(ChainFileError, match="has no accuracy at 2x2-4-8"):
        verify(stored(replace(pico_chain(height=32, width=16), frontier=None)), flat_people(2))


def test_a_student_whose_embeddings_are_not_finite_is_not_verified() -> None:
    chain = pico_chain(height=32, width=16)
    broken = {**chain.tensors, "conv1.weight": chain.tensors["conv1.weight"] * np.float32(3e38)}
    with pytest.raises(ChainMismatch):
        verify(stored(replace(chain, tensors=broken)), flat_people(2))


# --- a file of images alone


def test_a_toml_file_may_name_images_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "images.toml").write_text('[data]\nroot = "photos"\nkind = "folder"\n')
    data = read_data(tmp_path / "images.toml")
    assert (data.kind, data.root) == ("folder", tmp_path / "photos")
    (tmp_path / "images.toml").write_text('[data]\nroot = "photos"\nkind = "folders"\n')
    with pytest.raises(DataError, match=r"data.kind: 'folders' is none of"):
        read_data(tmp_path / "images.toml")
