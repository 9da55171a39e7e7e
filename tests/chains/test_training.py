"""The training side at toy size: losses by hand, and that refinement, calibration and evaluation do what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chains.calibrate import BATCH, calibrate
from chains.chain import Chain, InputSpec
from chains.data.batches import BatchRecipe, augment, batches
from chains.data.images import ImageSet
from chains.errors import ChainMismatch, DataError, WidthError
from chains.evaluate import embed, measure_frontier
from chains.expand import student
from chains.losses import batch_hard_triplet, reid_loss, similarity_loss
from chains.model import ReIDModel, load_student, model_of, normalise, numpy_tensors
from chains.refine import Refined, Sandwich, refine
from chains.testing import made_up_frontier
from chains.train import Trained, TrainRecipe, train_alone
from chains.tree import grow_trees
from chains.width import Width, even_ladder

INPUT = InputSpec(32, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
LADDER = even_ladder(Width(2), Width(4), 3)
RECIPE = TrainRecipe(3, warmup_steps=1, batch=BatchRecipe(identities=4, images_per_identity=2))


def flat_people(identities: int = 8, each: int = 4, seed: int = 0) -> ImageSet:
    """An image of one colour per identity, with noise: enough to learn from."""
    generator = np.random.default_rng(seed)
    pids = np.repeat(np.arange(identities), each)
    colours = generator.integers(30, 226, (identities, 1, 1, 3))[pids]
    noise = generator.integers(-25, 26, (len(pids), INPUT.height, INPUT.width, 3))
    return ImageSet((colours + noise).astype(np.uint8), pids, np.tile(np.arange(each) % 2, identities))


def a_teacher(seed: int = 0) -> Trained:
    return train_alone("resnet18", Width(4), flat_people(), INPUT, RECIPE, seed)


def a_chain(refined: Refined) -> Chain:
    return Chain(
        name="toy", architecture="resnet18", mode="nested", teacher=Width(4), ladder=LADDER, input=INPUT,
        embedding_space="toy", license="Apache-2.0", tensors=refined.tensors, partitions=refined.trees,
    )  # fmt: skip


def test_triplet_loss_by_hand() -> None:
    """Points 0, 1 of one identity and 3, 7 of another: hardest positives 1, 1, 4, 4; hardest negatives 3, 2, 2, 6."""
    feature = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    loss = batch_hard_triplet(feature, torch.tensor([0, 0, 1, 1]), margin=0.3)
    assert loss.item() == pytest.approx((0 + 0 + 2.3 + 0) / 4, abs=1e-5)


def test_triplet_gradient_is_finite_for_equal_features() -> None:
    feature = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(feature, torch.tensor([0, 0, 1, 1])).backward()
    assert feature.grad is not None
    assert bool(torch.isfinite(feature.grad).all())


def test_triplet_of_one_identity_is_zero() -> None:
    assert batch_hard_triplet(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)).item() == 0


def test_similarity_loss_of_the_full_width_with_itself_is_zero_and_trains_only_the_student() -> None:
    full = torch.randn(6, 5, requires_grad=True)
    assert similarity_loss(full, full).item() == pytest.approx(0, abs=1e-12)
    student = torch.randn(6, 5, requires_grad=True)
    similarity_loss(student, full).backward()
    assert full.grad is None
    assert student.grad is not None


def test_similarity_loss_by_hand() -> None:
    """The student's queries meet the full width's gallery, not each other: a quarter turn of both keeps all angles
    between queries, yet every query now lies at a right angle to its own gallery image."""
    full, turned = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert similarity_loss(turned, full).item() == pytest.approx((1 + 1 + 1 + 1) / 4)


def test_reid_loss_is_smoothed_cross_entropy_plus_triplet() -> None:
    feature, logits, labels = torch.tensor([[0.0], [3.0]]), torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.arange(2)
    log_of_sum = np.log(np.exp(4) + 1)
    smoothed = 0.95 * (log_of_sum - 4) + 0.05 * log_of_sum  # 0.1 spread over both identities
    assert reid_loss(feature, logits, labels).item() == pytest.approx(smoothed, abs=1e-5)  # the triplet is 0


def test_the_learning_rate_warms_up_and_then_falls_to_zero() -> None:
    recipe = TrainRecipe(30, lr=0.5, warmup_steps=10)
    assert [recipe.rate(step) for step in (0, 4, 9, 10, 20, 30)] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.25, 0])


def test_batches_are_p_identities_of_k_images_and_a_function_of_the_seed() -> None:
    people = flat_people()
    first, again, other = (next(batches(people, RECIPE.batch, seed)) for seed in (1, 1, 2))
    assert sorted(np.unique(first.labels, return_counts=True)[1].tolist()) == [2, 2, 2, 2]
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)


def test_every_identity_is_seen_once_a_round() -> None:
    stream = batches(flat_people(), RECIPE.batch, seed=0)
    assert set(np.concatenate([next(stream).labels for _ in range(2)])) == set(range(8))


def test_too_few_identities_for_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="8 identities cannot fill a batch of 16"):
        next(batches(flat_people(), BatchRecipe(), seed=0))


def test_augmentation_leaves_its_input_alone() -> None:
    people = flat_people()
    before = people.images.copy()
    augment(people.images, BatchRecipe(erasing=1.0), np.random.default_rng(0))
    assert np.array_equal(people.images, before)


def test_training_is_a_function_of_the_seed() -> None:
    first, again, other = (numpy_tensors(a_teacher(seed).model) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])


def test_training_lowers_the_loss() -> None:
    losses: list[float] = []
    recipe = replace(RECIPE, steps=40, lr=3e-3, batch=BatchRecipe(identities=8, images_per_identity=4))
    train_alone("resnet18", Width(4), flat_people(), INPUT, recipe, 0, lambda _, loss: losses.append(loss["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_loss_that_is_not_finite_stops_training_at_once() -> None:
    with pytest.raises(DataError, match="step 0: loss is nan"):
        train_alone("resnet18", Width(4), flat_people(), replace(INPUT, std=(0.0, 0.0, 0.0)), RECIPE, 0)


def test_before_any_step_a_pass_at_full_width_is_the_teacher() -> None:
    teacher = a_teacher()
    sandwich = Sandwich(teacher, grow_trees(teacher.model.table, numpy_tensors(teacher.model)), LADDER)
    images = torch.randn(8, 3, 32, 16)
    feature, lifted, logits = sandwich.forward(Width(4), images)
    expected_feature, expected = teacher.model.train()(images)
    order = torch.from_numpy(sandwich.trees["layer4"].order)
    torch.testing.assert_close(feature, expected_feature[:, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lifted, expected[:, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, expected @ teacher.classifier.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", LADDER)
def test_one_classifier_at_teacher_resolution_serves_every_width(width: Width) -> None:
    teacher = a_teacher()
    sandwich = Sandwich(teacher, grow_trees(teacher.model.table, numpy_tensors(teacher.model)), LADDER)
    feature, lifted, logits = sandwich.forward(width, torch.randn(8, 3, 32, 16))
    assert feature.shape[1] == sandwich.table.group_sizes(width)["layer4"]
    torch.testing.assert_close(logits, lifted @ sandwich.classifier.T, atol=1e-5, rtol=1e-4)


def test_refinement_moves_every_tensor_and_not_the_teacher() -> None:
    teacher = a_teacher()
    before = numpy_tensors(teacher.model)
    refined = refine(teacher, LADDER, flat_people(), INPUT, RECIPE, 0)
    assert all(np.array_equal(before[name], values) for name, values in numpy_tensors(teacher.model).items())
    for name, axes in teacher.model.table.axes.items():
        moved = not np.array_equal(before[name][refined.trees[axes.rows].order], refined.tensors[name])
        assert moved or name == "neck.bias", name
    assert not refined.tensors["neck.bias"].any()


@pytest.mark.parametrize("ladder", [(), LADDER[:2], LADDER[1:], (Width(1), *LADDER[:2])], ids=str)
def test_a_ladder_that_makes_no_sandwich_is_refused_before_training(ladder: tuple[Width, ...]) -> None:
    with pytest.raises(WidthError, match="three rungs that end at 4x2-4-8"):
        refine(a_teacher(), ladder, flat_people(), INPUT, RECIPE, 0)


def test_refinement_is_a_function_of_the_seed() -> None:
    first, again = (refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 5) for _ in range(2))
    assert all(np.array_equal(first.tensors[name], again.tensors[name]) for name in first.tensors)


def test_refinement_in_bfloat16_stays_close_to_float32() -> None:
    plain, half = (
        refine(a_teacher(), LADDER, flat_people(), INPUT, replace(RECIPE, precision=precision), 5).tensors
        for precision in ("float32", "bfloat16")
    )
    assert all(np.isfinite(half[name]).all() and half[name].dtype == np.float32 for name in half)
    assert np.abs(half["conv1.weight"] - plain["conv1.weight"]).max() < 0.02


def test_calibrated_statistics_are_those_of_the_student_s_own_activations() -> None:
    people = flat_people(identities=64, each=4)
    chain = calibrate(a_chain(refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0)), people)
    assert set(chain.statistics) == set(LADDER)
    for width in LADDER:
        embeddings = embed(load_student(chain, width), people, INPUT)
        gamma = load_student(chain, width).neck.weight.detach().numpy()
        np.testing.assert_allclose(
            embeddings.mean(axis=0), 0, atol=0.02
        )  # of a deviation of 1: torch keeps n / (n - 1)
        np.testing.assert_allclose(embeddings.std(axis=0), np.abs(gamma), rtol=0.05)


def test_calibration_averages_over_all_batches() -> None:
    people = flat_people(identities=2 * BATCH // 4, each=4)
    chain = calibrate(a_chain(refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0)), people)
    weight = torch.from_numpy(student(chain, LADDER[1])["conv1.weight"])
    maps = torch.nn.functional.conv2d(normalise(people.images, INPUT), weight, stride=2, padding=3)
    expected = maps.mean(dim=(0, 2, 3)).numpy()
    np.testing.assert_allclose(chain.statistics[LADDER[1]]["bn1.running_mean"], expected, atol=1e-4)


def test_a_recalibrated_chain_has_no_frontier_until_it_is_measured_again() -> None:
    people = flat_people(identities=64, each=4)
    chain = calibrate(a_chain(refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0)), people)
    measured = replace(chain, frontier=made_up_frontier(LADDER))
    assert calibrate(measured, people).frontier is None


def test_calibration_on_too_few_images_is_refused() -> None:
    chain = a_chain(refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0))
    with pytest.raises(DataError, match=f"32 images are too few .* {BATCH}"):
        calibrate(chain, flat_people())


def test_a_frontier_measures_every_width_and_every_pair() -> None:
    people = flat_people(identities=64, each=4)
    chain = calibrate(a_chain(refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0)), people)
    queries, gallery = people.take(np.arange(0, 64, 4)), people.take(np.arange(1, 64, 2))
    frontier = measure_frontier(chain, queries, gallery, "flat colours", seed=0)
    assert tuple(measured.width for measured in frontier.widths) == LADDER
    for index, measured in enumerate(frontier.widths):
        assert frontier.cross_map[index][index] == measured.map
        assert measured.map_ci95[0] <= measured.map <= measured.map_ci95[1]
    assert not frontier.trained_after_expansion


def test_tensors_of_another_width_or_name_are_no_model() -> None:
    tensors = numpy_tensors(ReIDModel("resnet18", Width(4)))
    with pytest.raises(ChainMismatch, match=r"resnet18 3x2-4-8: .*conv1\.weight"):
        model_of("resnet18", Width(3), tensors)
    with pytest.raises(ChainMismatch, match=r"lacking .*conv1\.weight"):
        model_of("resnet18", Width(4), {name: t for name, t in tensors.items() if name != "conv1.weight"})


def test_the_neck_has_no_trained_bias() -> None:
    assert not ReIDModel("resnet18", Width(4)).neck.bias.requires_grad
