"""The training engine: schedules, resuming, accumulation, guards and progress."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from chains.checkpoint import KEY, load_checkpoint, save_checkpoint
from chains.data.batches import BatchRecipe
from chains.errors import DataError, WidthError
from chains.losses import LossRecipe, ReIDLoss
from chains.model import ReIDModel, numpy_tensors
from chains.train import (
    MAX_SKIPPED,
    Alone,
    Distillation,
    Objective,
    Progress,
    Run,
    Trained,
    TrainRecipe,
    epoch_steps,
    every,
    fit,
    new_classifier,
    paper_recipe,
    train_alone,
)
from chains.width import Width
from tests.chains.toys import INPUT, RECIPE, a_teacher, flat_people


class Quadratic(Objective):
    """‖ w ‖², whose gradient is 2 w, whatever the images; `losses` adds what a test wants."""

    def __init__(self, *spoilt: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(1))
        self.spoilt = spoilt

    def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        self.seen += 1
        return {"square": self.weight.square().sum() * (torch.nan if step in self.spoilt else 1)}


# Schedules


def test_the_cosine_warms_up_and_then_falls_to_zero() -> None:
    recipe = TrainRecipe(30, lr=0.5, warmup_steps=10)
    assert [recipe.rate(step) for step in (0, 4, 9, 10, 20, 30)] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.25, 0])


def test_the_stairs_warm_up_from_a_hundredth_and_fall_at_every_milestone() -> None:
    recipe = TrainRecipe(100, lr=2.0, warmup_steps=10, schedule="steps", milestones=(50, 70), factor=0.1)
    rates = [recipe.rate(step) for step in (0, 5, 10, 49, 50, 69, 70, 99)]
    assert rates == pytest.approx([0.02, 1.01, 2, 2, 0.2, 0.2, 0.02, 0.02])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"micro_batches": 0}, "at least one step and one micro-batch"),
        ({"milestones": (5,)}, "go with schedule 'steps'"),
        ({"schedule": "steps", "milestones": (7, 5)}, "must rise"),
    ],
    ids=str,
)
def test_a_recipe_that_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(RECIPE, **changes)


def test_an_epoch_counts_whole_groups_of_images_per_identity() -> None:
    """Identities of 9, 2 and 4 images give 2, 1 and 1 groups of four; two identities a batch make two batches."""
    people = flat_people(identities=3, each=9)
    uneven = people.take(np.concatenate([np.arange(9), np.arange(9, 11), np.arange(18, 22)]))
    assert epoch_steps(uneven, BatchRecipe(identities=2, images_per_identity=4)) == 2
    assert epoch_steps(uneven, BatchRecipe(identities=16, images_per_identity=4)) == 1


def test_the_paper_s_schedule_for_a_training_set() -> None:
    """64 identities × 8 images are 128 groups of four: eight batches of 16 identities an epoch."""
    recipe = paper_recipe(flat_people(identities=64, each=8), "refine")
    assert (recipe.steps, recipe.warmup_steps, recipe.milestones) == (800, 80, (400, 560))
    assert (recipe.lr, recipe.weight_decay, recipe.clip_norm, recipe.batch.size) == (3.5e-4, 5e-4, None, 64)
    rates = [
        recipe.rate((epoch - 1) * 8 + step) / 3.5e-4 for epoch in (1, 9, 10, 49, 50, 69, 70, 100) for step in (0, 7)
    ]
    stairs = [0.109, 0.901, 1, 1, 0.1, 0.1, 0.01, 0.01]  # by epoch, from the authors' code
    assert rates == pytest.approx([factor for factor in stairs for _ in range(2)])
    teacher, student = (paper_recipe(flat_people(64, 8), stage) for stage in ("teacher", "finetune"))
    assert (teacher.steps, teacher.milestones) == (1600, (320, 560, 1040))
    assert (student.steps, student.milestones) == (800, (320, 560, 720))


def test_images_count_every_micro_batch() -> None:
    assert replace(RECIPE, micro_batches=4).images == 3 * 4 * 8


# A function of the seed


def test_training_is_a_function_of_the_seed() -> None:
    first, again, other = (numpy_tensors(a_teacher(seed).model) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])


def test_training_lowers_the_loss() -> None:
    losses: list[float] = []
    recipe = replace(RECIPE, steps=40, lr=3e-3, batch=BatchRecipe(identities=8, images_per_identity=4))
    run = Run(report=lambda progress: losses.append(progress.losses["loss"]))
    train_alone("resnet18", Width(4), flat_people(), INPUT, recipe, 0, run)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_training_starts_from_given_weights_and_leaves_them_alone() -> None:
    start = a_teacher(seed=1).model
    before = numpy_tensors(start)
    still = replace(RECIPE, lr=0.0)
    trained = train_alone("resnet18", Width(4), flat_people(), INPUT, still, 9, start=start).model
    moved = train_alone("resnet18", Width(4), flat_people(), INPUT, RECIPE, 9, start=start).model
    assert all(np.array_equal(before[name], values) for name, values in numpy_tensors(trained).items())
    assert not np.array_equal(before["conv1.weight"], numpy_tensors(moved)["conv1.weight"])
    assert all(np.array_equal(before[name], values) for name, values in numpy_tensors(start).items())
    assert not moved.neck.bias.any()


def test_a_start_of_another_width_is_refused() -> None:
    with pytest.raises(WidthError, match=r"resnet18 of width 4x2-4-8; a resnet18 of width 2x2-4-8 was to be trained"):
        train_alone("resnet18", Width(2), flat_people(), INPUT, RECIPE, 0, start=a_teacher().model)


def test_training_in_bfloat16_stays_close_to_float32() -> None:
    plain, half = (
        train_alone("resnet18", Width(4), flat_people(), INPUT, replace(RECIPE, precision=precision), 5).model
        for precision in ("float32", "bfloat16")
    )
    first, second = numpy_tensors(plain), numpy_tensors(half)
    assert not np.array_equal(first["conv1.weight"], second["conv1.weight"])
    assert np.abs(first["conv1.weight"] - second["conv1.weight"]).max() < 0.02


class Spy(Objective):
    """Notes the precision in which a network computes and the one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.inside: torch.dtype | None = None
        self.outside: torch.dtype | None = None

    def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        with self.autocast(pixels.device):
            self.inside = (pixels.mean(dim=(2, 3)) @ self.weight).dtype
        logits = pixels.mean(dim=(2, 3)) @ self.weight
        self.outside = logits.dtype
        return {"loss": logits.square().mean()}


@pytest.mark.parametrize(
    ("precision", "inside"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
    ids=str,
)
def test_networks_run_in_the_recipe_s_precision_and_losses_in_float32(precision: str, inside: torch.dtype) -> None:
    spy = Spy()
    fit(spy, flat_people(), INPUT, replace(RECIPE, precision=precision), 0)
    assert (spy.inside, spy.outside) == (inside, torch.float32)


# Centers


def test_centers_move_by_plain_sgd_on_the_unweighted_center_loss() -> None:
    """One step: c <- c - 0.5 d/dc mean ‖ f - c[label] ‖², whatever the weight of the loss, and no weight decay."""

    class Still(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.loss = ReIDLoss(8, 3, LossRecipe(center_weight=0.25), torch.Generator().manual_seed(0))
            self.seen: tuple[Tensor, Tensor] | None = None

        def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
            feature = pixels.mean(dim=(2, 3))
            self.seen = feature, labels
            return {"loss": self.loss(self.scale * feature, torch.zeros(len(labels), 8), labels)}

    still = Still()
    assert still.loss.centers is not None
    before = still.loss.centers.detach().clone()
    fit(still, flat_people(), INPUT, replace(RECIPE, steps=1), 0)
    assert still.seen is not None
    feature, labels = still.seen
    expected = before.clone()
    for point, label in zip(feature, labels.tolist(), strict=True):
        expected[label] += 0.5 * 2 / len(feature) * (point - before[label])
    torch.testing.assert_close(still.loss.centers.detach(), expected)


# Distillation


def test_a_distilled_student_comes_nearer_to_its_teacher_s_logits() -> None:
    people, recipe = flat_people(), replace(RECIPE, steps=30, lr=3e-3, batch=BatchRecipe(8, 4))
    teacher = train_alone("resnet18", Width(4), people, INPUT, recipe, 0)
    losses: list[float] = []
    run = Run(report=lambda progress: losses.append(progress.losses["distillation"]))
    distillation = Distillation(teacher, weight=2.0)
    train_alone("resnet18", Width(2), people, INPUT, recipe, 1, run, distillation=distillation)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_teacher_stays_as_it_was_while_it_teaches() -> None:
    teacher = a_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    train_alone("resnet18", Width(2), flat_people(), INPUT, RECIPE, 1, distillation=Distillation(teacher))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.model.state_dict().items())


def test_a_teacher_of_other_identities_is_refused() -> None:
    with pytest.raises(DataError, match="teacher of 8 identities cannot teach 16"):
        train_alone(
            "resnet18", Width(2), flat_people(16), INPUT, RECIPE, 0, distillation=Distillation(a_teacher())
        )  # fmt: skip


# Checkpoints


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    run = Run(checkpoint=tmp_path / "checkpoint")
    first = train_alone("resnet18", Width(4), flat_people(), INPUT, RECIPE, 0, run)
    steps: list[int] = []
    again = train_alone(
        "resnet18", Width(4), flat_people(), INPUT, RECIPE, 0, replace(run, report=lambda p: steps.append(p.step))
    )
    assert steps == []
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in first.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"lr": 0.5}, 0, "recipe.lr is 0.001 there and 0.5 here"),
        ({}, 1, "seed is 0 there and 1 here"),
        ({"batch": BatchRecipe(4, 3)}, 0, "recipe.batch.images_per_identity is 2 there and 3 here"),
    ],
    ids=str,
)
def test_resuming_another_run_is_refused(changes: dict[str, object], seed: int, message: str, tmp_path: Path) -> None:
    run = Run(checkpoint=tmp_path / "checkpoint")
    fit(Quadratic(), flat_people(), INPUT, RECIPE, 0, run)
    with pytest.raises(DataError, match=message):
        fit(Quadratic(), flat_people(), INPUT, replace(RECIPE, **changes), seed, run)


def test_resuming_with_other_images_or_another_start_is_refused(tmp_path: Path) -> None:
    run = Run(checkpoint=tmp_path / "checkpoint")
    fit(Quadratic(), flat_people(), INPUT, RECIPE, 0, run)
    with pytest.raises(DataError, match=r"images\.count is 32 there and 40 here"):
        fit(Quadratic(), flat_people(each=5), INPUT, RECIPE, 0, run)
    other = Quadratic()
    nn.init.zeros_(other.weight)
    with pytest.raises(DataError, match="start is"):
        fit(other, flat_people(), INPUT, RECIPE, 0, run)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="is no checkpoint"):
        fit(Quadratic(), flat_people(), INPUT, RECIPE, 0, Run(checkpoint=path))


def test_a_checkpoint_with_broken_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {KEY: "{"})
    with pytest.raises(DataError, match="is no checkpoint"):
        load_checkpoint(path, {"a": torch.ones(1)}, {})


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", 1, {"a": torch.ones(2)}, {})
    with pytest.raises(DataError, match=r"tensor 'a' has shape \(2,\) there and \(3,\) in this run"):
        load_checkpoint(tmp_path / "checkpoint", {"a": torch.ones(3)}, {})


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "checkpoint"
    for step in (1, 2):
        save_checkpoint(path, step, {"a": torch.full((2,), float(step))}, {"seed": 3})
    tensors = {"a": torch.zeros(2)}
    assert load_checkpoint(path, tensors, {"seed": 3}) == 2
    assert tensors["a"].tolist() == [2, 2]
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]


# Accumulation


def test_accumulation_is_the_mean_over_micro_batches() -> None:
    """The loss is the same for every micro-batch here, so that four of them make the very step of one."""
    one, four = Quadratic(), Quadratic()
    fit(one, flat_people(), INPUT, RECIPE, 0)
    fit(four, flat_people(), INPUT, replace(RECIPE, micro_batches=4), 0)
    torch.testing.assert_close(one.weight, four.weight)
    assert (one.seen.item(), four.seen.item()) == (3, 3)  # a buffer moves once a step


# Guards


def test_a_loss_that_is_not_finite_stops_training_at_once_and_changes_nothing() -> None:
    objective = Quadratic(1)
    seen: list[Tensor] = []
    run = Run(report=lambda progress: seen.append(objective.weight.detach().clone()))
    with pytest.raises(DataError, match=r"step 2 of 3: square is nan\..*Lower the learning rate \(now 0\.0005\)"):
        fit(objective, flat_people(), INPUT, replace(RECIPE, warmup_steps=0, lr=0.002 / 3), 0, run)
    assert torch.equal(objective.weight.detach(), seen[-1])
    assert objective.seen.item() == 1


def test_a_gradient_that_is_not_finite_stops_training() -> None:
    class Steep(Quadratic):
        def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
            return {"root": (self.weight - self.weight.detach()).sum().abs().sqrt()}

    with pytest.raises(DataError, match="step 1 of 3: gradient norm is"):
        fit(Steep(), flat_people(), INPUT, RECIPE, 0)


def test_the_last_checkpoint_survives_a_diverged_run(tmp_path: Path) -> None:
    run = Run(checkpoint=tmp_path / "checkpoint", checkpoint_steps=1)
    with pytest.raises(DataError, match="step 2 of 3"):
        fit(Quadratic(1), flat_people(), INPUT, RECIPE, 0, run)
    resumed = Quadratic()
    fit(resumed, flat_people(), INPUT, RECIPE, 0, run)
    uninterrupted = Quadratic()
    fit(uninterrupted, flat_people(), INPUT, RECIPE, 0)
    assert torch.equal(resumed.weight, uninterrupted.weight)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match=r"images are 32x16 pixels .* wants 64x32"):
        fit(Quadratic(), flat_people(), replace(INPUT, height=64, width=32), RECIPE, 0)


def test_in_float16_an_overflow_skips_a_step_and_lowers_the_scale() -> None:
    objective = Quadratic(1)
    moved: list[Tensor] = []
    run = Run(report=lambda progress: moved.append(objective.weight.detach().clone()))
    fit(objective, flat_people(), INPUT, replace(RECIPE, precision="float16", steps=4), 0, run)
    first, second, third, _ = moved
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_in_float16_many_overflows_in_a_row_are_a_diverged_run() -> None:
    recipe = replace(RECIPE, precision="float16", steps=40)
    with pytest.raises(DataError, match=f"step {MAX_SKIPPED + 2} of 40: square is nan"):
        fit(Quadratic(*range(1, 40)), flat_people(), INPUT, recipe, 0)


# Progress and validation


def test_validation_runs_before_the_first_step_then_at_its_steps_and_at_the_end() -> None:
    told: list[Progress] = []
    people, recipe = flat_people(), replace(RECIPE, steps=5)
    objective = Quadratic()

    def validate() -> dict[str, float]:
        objective.eval()
        return {"map": float(objective.weight.detach().sum())}

    fit(objective, people, INPUT, recipe, 0, Run(report=told.append, validate_steps=2), validate)
    assert [progress.step for progress in told if progress.metrics] == [0, 2, 4, 5]
    assert [progress.step for progress in told if not progress.metrics] == [1, 2, 3, 4, 5]
    assert told[0].metrics == {"map": 3.0}
    assert objective.training


def test_a_broken_validation_fails_before_the_first_step() -> None:
    objective = Quadratic()

    def validate() -> dict[str, float]:
        raise DataError("no gallery")

    with pytest.raises(DataError, match="no gallery"):
        fit(objective, flat_people(), INPUT, RECIPE, 0, Run(), validate)
    assert objective.seen.item() == 0


def test_a_network_in_training_can_be_validated() -> None:
    seen: list[Trained] = []

    def validate(trained: Trained) -> dict[str, float]:
        assert not trained.model.training
        seen.append(trained)
        return {"map": 0.0}

    train_alone("resnet18", Width(4), flat_people(), INPUT, RECIPE, 0, validate=validate)
    assert len(seen) == 2


def test_progress_knows_the_way_that_is_left() -> None:
    told: list[Progress] = []
    fit(Quadratic(), flat_people(), INPUT, RECIPE, 0, Run(report=told.append))
    assert [(progress.step, progress.steps) for progress in told] == [(1, 3), (2, 3), (3, 3)]
    assert [progress.learning_rate for progress in told] == [RECIPE.rate(step) for step in range(3)]
    for progress in told:
        assert progress.eta_s == pytest.approx((3 - progress.step) * progress.seconds_per_step)
        assert progress.images_per_s == pytest.approx(8 / progress.seconds_per_step)


def some_progress() -> Iterator[Progress]:
    yield Progress(0, 4, {}, 1e-3, 0.0, 0.0, 0.0, {"map": 12.345})
    for step in range(1, 5):
        yield Progress(step, 4, {"loss": 6.0}, 1e-3, 1.0, 60.0 * (4 - step) + 5, 64.0)


def test_lines_come_every_so_many_steps_with_the_time_to_go() -> None:
    lines: list[str] = []
    report = every(3, lines.append)
    for progress in some_progress():
        report(progress)
    assert lines == [
        "step 0/4: map 12.35",
        "step 3/4: loss 6.000, lr 0.001, 64 images/s, 1 min 05 s to go",
        "step 4/4: loss 6.000, lr 0.001, 64 images/s, 5 s to go",
    ]


def test_a_run_that_never_checkpoints_is_refused() -> None:
    with pytest.raises(DataError, match="checkpoint_steps 0"):
        Run(checkpoint_steps=0)


def test_alone_describes_what_its_tensors_do_not_say() -> None:
    torch.manual_seed(0)
    model, classifier = ReIDModel("resnet18", Width(2)), new_classifier(flat_people(), 16)
    alone = Alone(model, classifier, ReIDLoss(8, 16, LossRecipe(hard_factor=0.1), torch.Generator()))
    assert alone.settings() == {"loss": {"center_weight": 0.0, "hard_factor": 0.1}}
