"""Factorized Distillation: partial teachers, the two losses, and the student that they train."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chains.chain import InputSpec
from chains.data.images import ImageSet
from chains.errors import ChainFileError, ChainMismatch, ChainsError, DataError, WeightsRefused, WidthError
from chains.evaluate import embed
from chains.fuse.crops import crop
from chains.fuse.measure import embed_partials, joined_features, measure
from chains.fuse.objective import Fusion, FusionLoss, fuse, map_loss, retrieval_loss, shows_map, usual_recipe
from chains.fuse.partials import Answer, Network, Partial, open_partial, perceive
from chains.fuse.viewed import train_partial
from chains.fuse.views import View, whole
from chains.importers.check import Declared, check
from chains.importers.frozen import embed_frozen, read_graph
from chains.losses import LossRecipe, ReIDLoss
from chains.model import ReIDModel, normalise, numpy_tensors
from chains.train import Precision, Progress, Run, TrainRecipe, digest, new_classifier, train_alone
from chains.width import Width
from tests.chains.fusions import a_file, a_graph
from tests.chains.toys import INPUT, RECIPE, a_teacher, flat_people

UPPER, LOWER = View(0, 0.5, 16, 16), View(0.5, 1, 16, 16)
OTHER = InputSpec(INPUT.height, INPUT.width, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def upper(tmp_path_factory: pytest.TempPathFactory) -> Partial:
    """A network of this project that looks at the upper half."""
    trained, spec = train_partial("resnet18", Width(3), flat_people(), UPPER, RECIPE, 1)
    return open_partial(a_file(tmp_path_factory.mktemp("upper") / "upper.safetensors", trained, spec), UPPER)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Partial:
    """Somebody else's graph with a map, of the lower half, at another size."""
    path = a_graph(tmp_path_factory.mktemp("foreign") / "lower.onnx", height=24, width=20, has_map=True)
    return open_partial(path, View(0.5, 1, 24, 20))


def a_fusion(
    partials: Sequence[Partial],
    loss: FusionLoss = FusionLoss(),  # noqa: B008 - frozen
    architecture: str = "resnet18",
    width: Width = Width(4),  # noqa: B008 - frozen
) -> Fusion:
    torch.manual_seed(0)
    model = ReIDModel(architecture, width)
    reid = ReIDLoss(8, model.backbone.channels, LossRecipe(), torch.Generator())
    return Fusion(model, new_classifier(flat_people(), model.backbone.channels), reid, partials, INPUT, loss)


def a_batch() -> tuple[Tensor, Tensor]:
    images = flat_people()
    return normalise(images.images[:8], INPUT), torch.arange(8) // 4


# --- partial teachers


def test_a_teacher_of_the_whole_image_answers_what_it_answers_alone(tmp_path: Path) -> None:
    """Its own normalisation is honoured: the engine's pixels are normalised for the student."""
    teacher = a_teacher()
    partial = open_partial(a_file(tmp_path / "teacher.safetensors", teacher, OTHER))
    images = flat_people()
    assert partial.view == whole(INPUT.height, INPUT.width)
    (answered,) = embed_partials([partial], images, INPUT)
    np.testing.assert_allclose(answered, embed(teacher.model, images, OTHER), rtol=1e-4, atol=1e-4)


def test_a_partial_teacher_answers_what_it_answers_to_its_own_crops(upper: Partial) -> None:
    images = flat_people()
    crops = ImageSet(images.images[:, :16], images.pids, images.camids)
    spec = InputSpec(16, 16, *upper.pixels)
    (answered,) = embed_partials([upper], images, INPUT)
    (expected,) = embed_partials([replace(upper, view=whole(16, 16))], crops, spec)
    np.testing.assert_allclose(answered, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize(("height", "width", "dim"), [(None, None, 7), (48, 24, 3), (17, 33, 129)])
def test_graphs_of_other_sizes_and_dims_are_accepted(
    tmp_path: Path, height: int | None, width: int | None, dim: int, batch: int | None, is_half: bool
) -> None:
    path = a_graph(tmp_path / "a.onnx", height=height, width=width, dim=dim, batch=batch, is_half=is_half)
    partial = open_partial(path, pixels=(OTHER.mean, OTHER.std), usual_size=(INPUT.height, INPUT.width))
    assert (partial.view.height, partial.view.width) == (height or INPUT.height, width or INPUT.width)
    images = flat_people(identities=2)
    (answered,) = embed_partials([partial], images, INPUT)
    assert answered.shape == (len(images), dim)
    assert partial.embedding_dim == dim
    cut = crop(normalise(images.images, OTHER), 0, 1, partial.view.height, partial.view.width)
    tolerance = 2e-2 if is_half else 1e-4
    expected = embed_frozen(read_graph(path), cut.numpy())
    np.testing.assert_allclose(answered, expected, rtol=tolerance, atol=tolerance)


def test_a_second_output_of_four_dimensions_is_the_map(foreign: Partial, tmp_path: Path) -> None:
    assert foreign.map_shape == (5, 6, 5)
    assert foreign.embedding_dim == 7
    pixels, _ = a_batch()
    found = foreign.answer(pixels, INPUT).map
    assert found is not None
    assert found.shape == (8, 5, 6, 5)
    alone = open_partial(a_graph(tmp_path / "alone.onnx", height=24, width=20), foreign.view)
    assert alone.map_shape is None
    assert torch.equal(alone.answer(pixels, INPUT).embedding, foreign.answer(pixels, INPUT).embedding)


def test_what_nobody_stated_is_assumed_and_said(tmp_path: Path) -> None:
    said = open_partial(a_graph(tmp_path / "a.onnx"), usual_size=(32, 16)).notes
    assert any("ImageNet" in note for note in said)
    assert any("32 × 16" in note for note in said)
    stated = a_graph(tmp_path / "b.onnx", height=32, width=16, stated=([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    partial = open_partial(stated)
    assert partial.notes == ()
    assert partial.pixels == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def test_a_wrong_declared_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    graph = a_graph(tmp_path / "a.onnx", height=48, width=24)
    with pytest.raises(ChainMismatch, match=r"48 × 24 .*; its view says 32 × 16"):
        open_partial(graph, whole(32, 16))
    half_free = a_graph(tmp_path / "b.onnx", height=48)
    with pytest.raises(ChainMismatch, match=r"48 × any .*; its view says 32 × 16"):
        open_partial(half_free, whole(32, 16))
    network = a_file(tmp_path / "c.safetensors", a_teacher(), INPUT)
    with pytest.raises(ChainMismatch, match=r"32 × 16 .*; its view says 16 × 16"):
        open_partial(network, UPPER)


def test_a_wrong_declared_normalisation_is_refused_with_the_numbers(tmp_path: Path) -> None:
    network = a_file(tmp_path / "a.safetensors", a_teacher(), INPUT)
    with pytest.raises(ChainMismatch, match=r"mean \(0.5, 0.5, 0.5\).*says \(0.4, 0.5, 0.6\)"):
        open_partial(network, pixels=(OTHER.mean, OTHER.std))
    graph = a_graph(tmp_path / "b.onnx", height=32, width=16, stated=([0.5] * 3, [0.25] * 3))
    with pytest.raises(ChainMismatch, match=r"says \(0.4, 0.5, 0.6\)"):
        open_partial(graph, pixels=(OTHER.mean, OTHER.std))


def test_files_of_no_use_are_refused_with_their_name(tmp_path: Path) -> None:
    network = a_file(tmp_path / "a.safetensors", a_teacher(), INPUT)
    torch.save({}, tmp_path / "torch.pth")
    (tmp_path / "words.onnx").write_text("no model")
    a_graph(tmp_path / "broken.onnx")
    (tmp_path / "broken.onnx").write_bytes((tmp_path / "broken.onnx").read_bytes()[:-40])
    stated = a_graph(tmp_path / "stated.onnx", stated=([0.5], [0.0]))
    cases: list[tuple[Path, type[ChainsError], str]] = [
        (tmp_path / "none.onnx", DataError, "not there"),
        (tmp_path / "torch.pth", WeightsRefused, "export the network to ONNX"),
        (tmp_path / "words.onnx", WeightsRefused, "neither"),
        (tmp_path / "broken.onnx", WeightsRefused, "cut short"),
        (stated, WeightsRefused, "std > 0"),
    ]
    for path, error, words in cases:
        with pytest.raises(error, match=words) as raised:
            open_partial(path)
        assert path.name in str(raised.value)
    network.write_bytes(network.read_bytes()[:-4])
    with pytest.raises(ChainFileError, match=r"a\.safetensors"):
        open_partial(network)


@pytest.mark.parametrize("size", [{"dim": 16_385}, {"channels": 16_385, "has_map": True}])
def test_more_channels_than_a_head_can_have_are_refused_at_the_upload_and_when_opened(
    tmp_path: Path, size: dict[str, Any]
) -> None:
    path, words = a_graph(tmp_path / "a.onnx", height=16, width=16, **size), "16,385 channels, and 16,384 can be learnt"
    with pytest.raises(WeightsRefused, match=words):
        check(path, Declared())
    with pytest.raises(WeightsRefused, match=rf"a\.onnx': .*{words}"):
        open_partial(path)


def test_the_most_channels_are_accepted(tmp_path: Path) -> None:
    path = a_graph(tmp_path / "a.onnx", height=16, width=16, dim=16_384)
    assert check(path, Declared())["embedding_dim"] == open_partial(path).embedding_dim == 16_384


def test_another_normalisation_than_the_graph_states_is_refused_at_the_upload_with_the_numbers(tmp_path: Path) -> None:
    """By as little as a fusion refuses."""
    path = a_graph(tmp_path / "a.onnx", height=32, width=16, stated=([0.5] * 3, [0.25] * 3))
    for mean, words in ((0.4, r"mean \(0.4, 0.5, 0.5\)"), (0.4995, r"mean \(0.4995, 0.5, 0.5\)")):
        declared = InputSpec(32, 16, (mean, 0.5, 0.5), (0.25, 0.25, 0.25))
        with pytest.raises(WeightsRefused, match=rf"registered with {words}.* state mean \(0.5, 0.5, 0.5\)"):
            check(path, Declared(input=declared))
        with pytest.raises(ChainMismatch):
            open_partial(path, pixels=(declared.mean, declared.std))
    for stated in (Declared(input=replace(INPUT, mean=(0.50001, 0.5, 0.5), std=(0.25,) * 3)), Declared(size=(32, 16))):
        found = check(path, stated)["input"]
        open_partial(path, pixels=(tuple(found["mean"]), tuple(found["std"])))


@pytest.mark.parametrize(
    "mean", [[10**400, 0, 0], "123", {"1": 0, "2": 0, "3": 0}, [True, 0, 0], ["1", 0, 0], [0, 0], 1]
)
def test_a_stated_normalisation_is_three_finite_numbers(tmp_path: Path, mean: object) -> None:
    with pytest.raises(WeightsRefused, match=r"reid\.mean of .* each is a JSON list of three finite numbers"):
        read_graph(a_graph(tmp_path / "a.onnx", stated=(mean, [1, 1, 1])))


def spoilt(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[1].view(-1)[0] = value
    return tensor


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: replace(a, embedding=a.embedding[:7]), r"an embedding of shape \(7, 7\) to 8 images; .* \(8, 7\)"),
        (lambda a: replace(a, embedding=a.embedding[:, :1]), r"an embedding of shape \(8, 1\) .* \(8, 7\)"),
        (lambda a: replace(a, map=a.map[:1]), r"a map of shape \(1, 5, 6, 5\) to 8 images; .* \(8, 5, 6, 5\)"),
        (lambda a: replace(a, map=a.map[:, :1]), r"a map of shape \(8, 1, 6, 5\) .* \(8, 5, 6, 5\)"),
        (lambda a: replace(a, map=None), r"a map of shape None .* \(8, 5, 6, 5\)"),
        (lambda a: replace(a, embedding=spoilt(a.embedding, math.nan)), "not finite to 1 of 8 images"),
        (lambda a: replace(a, map=spoilt(a.map, math.inf)), "not finite to 1 of 8 images"),
    ],
)
def test_an_answer_of_another_form_than_when_it_was_opened_is_refused(
    foreign: Partial, spoil: Callable[[Answer], Answer], words: str
) -> None:
    changing = replace(foreign, run=lambda images: spoil(foreign.run(images)))
    with pytest.raises(WeightsRefused, match=rf"input 'lower\.onnx': it answers .*{words}"):
        changing.answer(a_batch()[0], INPUT)


def test_a_run_directory_stands_for_its_teacher(tmp_path: Path) -> None:
    (tmp_path / "up1").mkdir()
    a_file(tmp_path / "up1" / "teacher.safetensors", a_teacher(), INPUT)
    partial = open_partial(tmp_path / "up1")
    assert partial.name == "up1"
    assert partial.sha256 == open_partial(tmp_path / "up1" / "teacher.safetensors").sha256


# --- losses


def test_both_losses_are_zero_for_the_same_directions_and_largest_for_opposite_ones() -> None:
    x = torch.randn(4, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    assert map_loss(3 * x, x).item() == pytest.approx(0, abs=1e-6)
    assert map_loss(-x, x).item() == pytest.approx(4)
    assert retrieval_loss(2 * x[..., 0, 0], x[..., 0, 0]).item() == pytest.approx(0, abs=1e-6)
    assert retrieval_loss(-x[..., 0, 0], x[..., 0, 0]).item() == pytest.approx(2)


def test_both_losses_reach_the_feature_map_and_the_embedding(upper: Partial, foreign: Partial) -> None:
    """L_map the map, and so all of the backbone, but neither the neck nor ψ; L_ret the embedding, and so the neck and
    the backbone, but not φ."""
    fusion = a_fusion([upper, foreign])
    losses = fusion(*a_batch(), 0)
    assert set(losses) == {"loss", "map", "retrieval"}

    def reached(name: str) -> set[str]:
        parameters = {n: p for n, p in fusion.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(
            losses[name], list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        return {n for n, gradient in zip(parameters, gradients, strict=True) if bool(gradient.abs().sum() > 0)}

    by_map, by_retrieval = reached("map"), reached("retrieval")
    first_and_last = {"model.backbone.conv1.weight", "model.backbone.layer4.1.conv2.weight"}
    assert first_and_last | {"map_heads.0.weight", "map_heads.1.weight"} <= by_map
    assert first_and_last | {"model.neck.weight", "retrieval_heads.0.weight", "retrieval_heads.1.bias"} <= by_retrieval
    assert not any(n.startswith(("model.neck", "retrieval_heads", "classifier")) for n in by_map)
    assert not any(n.startswith(("map_heads", "classifier")) for n in by_retrieval)


def test_the_losses_are_those_of_the_formula(upper: Partial, foreign: Partial) -> None:
    """The slow literal one, teacher by teacher and location by location, with weights."""
    fusion = a_fusion([upper, foreign], FusionLoss(map=0.5, retrieval=2.0, grid=None)).eval()
    pixels, labels = a_batch()
    with torch.no_grad():
        losses = fusion(pixels, labels, 0)
        own = perceive(fusion.model, pixels)
        assert own.map is not None
        by_map, by_retrieval = [], []
        for k, partial in enumerate((upper, foreign)):
            answer = partial.answer(pixels, INPUT)
            assert answer.map is not None
            rows = crop(own.map, partial.view.top, partial.view.bottom, *answer.map.shape[2:])
            answered = fusion.map_heads[str(k)](rows)
            distances = [
                float(((a / a.norm() - b / b.norm()) ** 2).sum()) if b.norm() > 0 else 1.0
                for image in range(8)
                for a, b in zip(answered[image].flatten(1).T, answer.map[image].flatten(1).T, strict=True)
            ]
            by_map.append(np.mean(distances))
            vectors = fusion.retrieval_heads[str(k)](own.embedding)
            cosines = torch.cosine_similarity(vectors, answer.embedding)
            by_retrieval.append(float((1 - cosines).mean()))
    assert losses["map"].item() == pytest.approx(0.5 * np.mean(by_map), rel=1e-4)
    assert losses["retrieval"].item() == pytest.approx(2.0 * np.mean(by_retrieval), rel=1e-4)


def test_maps_are_compared_on_the_grid(upper: Partial) -> None:
    losses = [a_fusion([upper], FusionLoss(grid=grid))(*a_batch(), 0)["map"] for grid in ((7, 7), (3, 2), None)]
    assert len({round(loss.item(), 6) for loss in losses}) == 3


def test_a_teacher_without_a_map_has_no_part_in_the_map_loss_but_counts(upper: Partial, tmp_path: Path) -> None:
    silent = open_partial(a_graph(tmp_path / "a.onnx"), whole(32, 16))
    both, alone = a_fusion([upper, silent]), a_fusion([upper])
    both.map_heads["0"].load_state_dict(alone.map_heads["0"].state_dict())
    assert list(both.map_heads) == ["0"]
    assert list(both.retrieval_heads) == ["0", "1"]
    assert both(*a_batch(), 0)["map"].item() == pytest.approx(alone(*a_batch(), 0)["map"].item() / 2)
    assert set(a_fusion([silent])(*a_batch(), 0)) == {"loss", "retrieval"}


def test_a_student_that_pools_by_itself_learns_from_retrieval_features(upper: Partial) -> None:
    fusion = a_fusion([upper], architecture="osnet", width=Width(4, (4, 6, 8)))
    assert not shows_map(fusion.model, INPUT)
    assert set(fusion(*a_batch(), 0)) == {"loss", "retrieval"}
    assert shows_map(a_fusion([upper]).model, INPUT)


def test_losses_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="retrieval=-1"):
        FusionLoss(retrieval=-1)
    with pytest.raises(DataError, match="0 × 7"):
        FusionLoss(grid=(0, 7))
    with pytest.raises(DataError, match="at least one input"):
        a_fusion([])


# --- training


def test_teachers_get_no_gradient_and_stay_in_evaluation(tmp_path: Path) -> None:
    partial = open_partial(a_file(tmp_path / "a.safetensors", a_teacher(), INPUT))
    assert isinstance(partial.run, Network)
    model, asked = partial.run.model, 0
    before = digest(model.state_dict())

    def spy(images: Tensor) -> Answer:
        nonlocal asked
        asked += 1
        assert not torch.is_grad_enabled()
        answer = partial.run(images)
        assert not answer.embedding.requires_grad
        return answer

    fuse("resnet18", Width(4), [replace(partial, run=spy)], flat_people(), INPUT, RECIPE, 0)
    assert asked == RECIPE.steps
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert digest(model.state_dict()) == before


def test_teachers_are_no_part_of_what_is_trained_or_checkpointed(upper: Partial, foreign: Partial) -> None:
    fusion = a_fusion([upper, foreign])
    first = {name.partition(".")[0] for name in fusion.state_dict()}
    assert first == {"model", "classifier", "map_heads", "retrieval_heads"}


@pytest.mark.parametrize("loss", [LossRecipe(), LossRecipe(center_weight=1e-3, hard_factor=0.2)])
def test_without_both_losses_the_student_is_the_one_trained_alone(upper: Partial, loss: LossRecipe) -> None:
    images, width = flat_people(), Width(4)
    without = FusionLoss(map=0, retrieval=0, reid=loss)
    plain = fuse("resnet18", width, [upper], images, INPUT, RECIPE, 3, loss=without)
    alone = train_alone("resnet18", width, images, INPUT, RECIPE, 3, loss=loss)
    assert digest(plain.model.state_dict()) == digest(alone.model.state_dict())
    assert torch.equal(plain.classifier, alone.classifier)
    fused = fuse("resnet18", width, [upper], images, INPUT, RECIPE, 3, loss=FusionLoss(reid=loss))
    assert digest(fused.model.state_dict()) != digest(alone.model.state_dict())


def test_training_lowers_both_losses(upper: Partial, foreign: Partial) -> None:
    losses: dict[str, list[float]] = {"map": [], "retrieval": []}

    def report(progress: Progress) -> None:
        for name, values in losses.items():
            values.append(progress.losses[name])

    recipe = replace(RECIPE, steps=30, lr=5e-3)
    fuse("resnet18", Width(4), [upper, foreign], flat_people(), INPUT, recipe, 0, Run(report=report))
    for values in losses.values():
        assert np.mean(values[-5:]) < 0.85 * np.mean(values[:5])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_that_was_killed_ends_with_the_same_student(
    upper: Partial, foreign: Partial, tmp_path: Path, precision: Precision
) -> None:
    recipe = TrainRecipe(4, warmup_steps=1, batch=RECIPE.batch, micro_batches=2, precision=precision)

    def student(run: Run) -> str:
        trained = fuse("resnet18", Width(4), [upper, foreign], flat_people(), INPUT, recipe, 0, run)
        return digest(trained.model.state_dict())

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    run = Run(checkpoint=tmp_path / "c.safetensors", checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        student(replace(run, report=kill))
    assert student(run) == student(Run())


def test_a_checkpoint_of_other_inputs_is_refused(upper: Partial, tmp_path: Path) -> None:
    run = Run(checkpoint=tmp_path / "c.safetensors")
    fuse("resnet18", Width(4), [upper], flat_people(), INPUT, RECIPE, 0, run)
    other = replace(upper, sha256="0" * 64)
    with pytest.raises(DataError, match="inputs"):
        fuse("resnet18", Width(4), [other], flat_people(), INPUT, RECIPE, 0, run)


def test_a_fusion_begins_with_the_weights_that_it_is_given(upper: Partial) -> None:
    start = a_teacher().model
    recipe, images = replace(RECIPE, lr=0.0), flat_people()
    still = fuse("resnet18", Width(4), [upper], images, INPUT, recipe, 0, start=start)
    assert np.array_equal(numpy_tensors(still.model)["conv1.weight"], numpy_tensors(start)["conv1.weight"])
    with pytest.raises(WidthError, match="4x2-4-8"):
        fuse("resnet18", Width(5), [upper], images, INPUT, recipe, 0, start=start)


def test_the_usual_schedule_is_120_epochs() -> None:
    recipe = usual_recipe(flat_people(identities=32, each=4))
    assert recipe.epoch == 2
    assert (recipe.steps, recipe.milestones, recipe.batch.size) == (240, (80, 140), 64)
    assert recipe.rate(79 - 2) == pytest.approx(3.5e-4)
    assert recipe.rate(80) == pytest.approx(3.5e-5)


# --- measuring


def test_the_cosine_of_joined_features_is_the_mean_of_cosines() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.standard_normal((2, dim)).astype(np.float32) for dim in (3, 8, 5)]
    one, other = joined_features(parts)
    expected = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in parts])
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) == pytest.approx(expected, abs=1e-6)


def test_every_input_is_measured_on_its_view_and_all_of_them_together(upper: Partial) -> None:
    """People who differ in their lower half only: a network of the upper half cannot tell them apart."""
    people = flat_people(identities=12)
    images = people.images.copy()
    images[:, :16] = 100
    lower_only = ImageSet(images, people.pids, people.camids)
    query, gallery = lower_only.take(np.arange(0, 48, 4)), lower_only.take(np.arange(1, 48, 2))
    lower = replace(upper, view=LOWER)
    measured = measure(a_teacher().model, [upper, lower], query, gallery, INPUT)
    blind, seeing = (ranking.map for ranking in measured.inputs)
    assert seeing > blind + 20
    assert measured.best_input == 1
    assert measured.ensemble.map == pytest.approx(seeing, abs=10)
    assert measured.is_worse == (measured.student.map < seeing)
