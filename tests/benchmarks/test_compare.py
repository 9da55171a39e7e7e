"""The comparison's own arithmetic, and the baseline it brings along: slices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare
from benchmarks.compare import LADDER, NARROW, Site, means, refine_steps, step_macs
from benchmarks.setup import update_table
from benchmarks.slices import PartialSandwich, leading_trees
from chains.nested import NestedRecipe
from chains.train import Trained
from tests.chains.toys import LADDER as TOY_LADDER
from tests.chains.toys import a_teacher

SITE = Site("default")
IMAGES = torch.randn(8, 3, 32, 16, generator=torch.Generator().manual_seed(0))


def slices_of(teacher: Trained) -> PartialSandwich:
    return PartialSandwich(teacher, leading_trees(teacher, 0, 0), TOY_LADDER, NestedRecipe(own_norms=False), 0)


def test_slices_keep_the_first_channels_by_importance_and_the_whole_slice_is_the_teacher() -> None:
    teacher = a_teacher()
    sandwich = slices_of(teacher)
    tensors = teacher.model.tensors()
    writers = ("conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv2.weight")  # of the stem's residual stream
    norms = torch.stack([tensors[name].detach().abs().flatten(1).sum(dim=1) for name in writers]).sum(dim=0)
    kept = sandwich.cut_out(TOY_LADDER[0])["conv1.weight"]
    expected = tensors["conv1.weight"][torch.argsort(-norms, stable=True)[: len(kept)]]
    torch.testing.assert_close(kept, expected)
    expected = teacher.model.train()(IMAGES)[1] @ teacher.classifier.T
    torch.testing.assert_close(sandwich.run(TOY_LADDER[-1], IMAGES).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_slice_lifts_into_the_first_coordinates() -> None:
    sandwich = slices_of(a_teacher())
    student = sandwich.run(TOY_LADDER[0], IMAGES)
    width = student.embedding.shape[1]
    assert torch.equal(student.lifted[:, :width], student.embedding)
    assert not student.lifted[:, width:].any()
    torch.testing.assert_close(student.logits, student.lifted @ sandwich.classifier.T, atol=1e-5, rtol=1e-4)


def test_the_paper_s_refinement_gets_as_much_compute_as_the_sandwich() -> None:
    nested, paper = (refine_steps(SITE, method) * step_macs(SITE, method) for method in ("nested", "oskt"))
    assert refine_steps(SITE, "nested") == compare.REFINE_STEPS
    assert paper == pytest.approx(nested, rel=1e-3)


def test_a_longer_training_alone_reaches_the_refinement_s_own_compute() -> None:
    longest = max(steps for width, steps in compare.curve(SITE) if width == NARROW)
    assert longest * SITE.macs(NARROW) == pytest.approx(compare.REFINE_STEPS * step_macs(SITE, "nested"), rel=1e-3)


def test_the_ladder_goes_in_eighths_from_a_quarter() -> None:
    assert [width.stem / LADDER[-1].stem for width in LADDER] == [eighths / 8 for eighths in range(2, 9)]


def test_means_are_over_seeds_and_their_interval_over_queries() -> None:
    def row(seed: int, precisions: list[float]) -> dict[str, object]:
        key = {"method": "m", "dataset": "d", "width": "4x2-4-8", "trained_after": False, "images": 64}
        return {**key, "seed": seed, "precisions": precisions}

    (mean,) = means([row(0, [0.2, 0.6]), row(1, [0.4, 0.8])])
    assert (mean["seeds"], mean["map"]) == (2, 50.0)
    assert (mean["map_low"], mean["map_high"]) == (30.0, 70.0)  # both queries the worse one, both the better one


def test_a_table_keeps_rows_of_other_tasks_and_takes_better_ones(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    update_table(table, [{"method": "a", "seeds": 3, "map": 1}, {"method": "b", "seeds": 3, "map": 2}], ("method",))
    news = [{"method": "b", "seeds": 1, "map": 5}, {"method": "c", "seeds": 1, "map": 3}]
    update_table(table, news, ("method",), compare._is_over_as_many_seeds)
    assert table.read_text().splitlines() == ["method,seeds,map", "a,3,1", "b,3,2", "c,1,3"]
    update_table(table, news, ("method",))
    assert table.read_text().splitlines() == ["method,seeds,map", "a,3,1", "b,1,5", "c,1,3"]


def test_no_task_is_named_like_another() -> None:
    names = [name for _, (name, *_) in compare.tasks([0, 1, 2])]
    assert len({compare.result_path(name) for name in names}) == len(names)
    assert np.all([name.count(":") >= 2 for name in names])
