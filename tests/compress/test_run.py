"""A whole compression: pruners that vanish, budgets that hold, runs that are killed and go on."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chains.artifact import StoredChain, dump, load
from chains.budget import Limits
from chains.chain import Chain
from chains.compatible import anchor_in
from chains.compress.blocks import prunable
from chains.compress.objective import Compression, DeapRecipe, Tutor
from chains.compress.run import Compressed, Start, compress, deap_recipe, from_student, from_teacher, terminal_chain
from chains.compress.units import Pruning
from chains.cost import count_macs
from chains.errors import ArchitectureError, BudgetTooSmall, ChainMismatch, DataError
from chains.model import ReIDModel, numpy_tensors
from chains.taps import traced
from chains.testing import pico_chain
from chains.train import Progress, Run, Trained, new_classifier
from chains.width import Width
from tests.chains.toys import INPUT, RECIPE, a_teacher, flat_people
from tests.compress.pruned import SHORT, WIDTH, a_network

PEOPLE = flat_people()


@pytest.fixture(scope="module")
def teacher() -> Trained:
    return a_teacher()


def bottlenecks(seed: int = 0) -> Trained:
    model = a_network("resnet50", Width(2), seed)
    return Trained(model, torch.randn(8, model.backbone.channels) * 0.01)


def weights_of(done: Compressed) -> dict[str, np.ndarray]:
    return numpy_tensors(done.trained.model)


def limit_at(model: ReIDModel, share: float) -> Limits:
    """MACs at `share` of the way from the floor to the whole network."""
    full = model.table.group_sizes(model.width)
    floor = count_macs(model.table.fixed(full | dict.fromkeys(prunable(model.table), 1)), model.width, INPUT)
    return Limits(max_macs=floor + round(share * (count_macs(model.table, model.width, INPUT) - floor)))


def test_a_short_run_with_a_shrink_budget_prunes_groups_and_one_below_one_does_not(teacher: Trained) -> None:
    def vanished(shrink: float) -> float:
        recipe = replace(SHORT, prune=replace(RECIPE, steps=8), shrink=shrink, pruner_lr=1e-3)
        return compress(from_teacher("toy", teacher), PEOPLE, INPUT, recipe, None, 0).vanished

    assert vanished(3.0) > 0.5
    assert vanished(0.5) == 0


def test_what_the_loss_needs_holds_out_and_what_it_does_not_vanishes(teacher: Trained) -> None:
    """Four channels that are zero for every image have no gradient: at the same rate of shrinking they go alone."""
    dead = Trained(copy.deepcopy(teacher.model), teacher.classifier)
    norm = dead.model.backbone.get_submodule("layer2.0.bn1")
    with torch.no_grad():
        norm.get_parameter("weight")[:4] = 0
        norm.get_parameter("bias")[:4] = -1.0
    recipe = replace(SHORT, prune=replace(RECIPE, steps=40, lr=1e-4), shrink=1.5, pruner_lr=1.0)
    done = compress(from_teacher("toy", dead), PEOPLE, INPUT, recipe, None, 0)
    whole = teacher.model.table.group_sizes(WIDTH)
    assert done.pruned_to == {group: whole[group] for group in done.pruned_to} | {"layer2.0.a": 4}
    assert done.vanished == 4 / sum(whole[group] for group in done.pruned_to)


def test_the_lasso_rests_while_the_limits_hold(teacher: Trained) -> None:
    """Without limits this recipe leaves one channel everywhere; with them hardly more goes than has to."""
    recipe = replace(SHORT, prune=replace(RECIPE, steps=40, lr=1e-4), shrink=3.0, pruner_lr=0.1)
    limits = limit_at(teacher.model, 0.6)
    model = compress(from_teacher("toy", teacher), PEOPLE, INPUT, recipe, limits, 0).trained.model
    assert limits.max_macs is not None
    assert 0.75 * limits.max_macs < count_macs(model.table, WIDTH, INPUT) <= limits.max_macs


@pytest.mark.parametrize("make", [a_teacher, bottlenecks])
def test_a_budget_is_reached_by_a_plain_network(make) -> None:  # type: ignore[no-untyped-def]
    trained = make()
    limits = limit_at(trained.model, 0.3)
    recipe = replace(SHORT, shrink=0.5)
    done = compress(from_teacher("toy", trained), PEOPLE, INPUT, recipe, limits, 0)
    model = done.trained.model
    macs = count_macs(model.table, model.width, INPUT)
    assert limits.max_macs is not None
    assert limits.max_macs * 0.8 < macs <= limits.max_macs
    assert not isinstance(model.backbone.get_submodule("layer1.0.conv2"), torch.nn.Sequential)
    assert not model.training
    assert done.vanished == 0


def test_a_budget_below_the_floor_is_refused_before_anything_is_trained(teacher: Trained) -> None:
    steps: list[Progress] = []
    with pytest.raises(BudgetTooSmall, match="no compression of 'toy' fits"):
        compress(
            from_teacher("toy", teacher),
            PEOPLE,
            INPUT,
            SHORT,
            Limits(max_macs=1000),
            0,
            lambda _: Run(report=steps.append),
        )
    assert not steps


def test_the_teacher_is_left_as_it_was(teacher: Trained) -> None:
    before = {name: values.clone() for name, values in teacher.model.state_dict().items()}
    compress(from_teacher("toy", teacher), PEOPLE, INPUT, SHORT, None, 0)
    assert all(torch.equal(values, before[name]) for name, values in teacher.model.state_dict().items())


class Killed(Exception):
    pass


@pytest.mark.parametrize(("stage", "step"), [("prune", 3), ("finetune", 2)])
def test_a_killed_compression_goes_on_to_the_same_network(
    teacher: Trained, tmp_path: Path, stage: str, step: int
) -> None:
    limits = limit_at(teacher.model, 0.4)

    def run(folder: Path, dies: bool) -> Compressed:
        def runs(name: str) -> Run:
            def report(progress: Progress) -> None:
                if dies and name == stage and progress.step == step:
                    raise Killed

            return Run(report=report, checkpoint=folder / f"{name}.safetensors", checkpoint_steps=1)

        return compress(from_teacher("toy", teacher), PEOPLE, INPUT, SHORT, limits, 0, runs)

    with pytest.raises(Killed):
        run(tmp_path / "killed", dies=True)
    resumed, straight = run(tmp_path / "killed", dies=False), run(tmp_path / "straight", dies=False)
    assert resumed.sizes == straight.sizes
    assert all(np.array_equal(values, weights_of(straight)[name]) for name, values in weights_of(resumed).items())
    assert torch.equal(resumed.trained.classifier, straight.trained.classifier)


def test_a_checkpoint_of_other_weights_of_the_losses_is_refused(teacher: Trained, tmp_path: Path) -> None:
    def run(recipe: DeapRecipe) -> Compressed:
        runs = {stage: Run(checkpoint=tmp_path / f"{stage}.safetensors") for stage in ("prune", "finetune")}
        return compress(from_teacher("toy", teacher), PEOPLE, INPUT, recipe, None, 0, runs.__getitem__)

    run(SHORT)
    with pytest.raises(DataError, match=r"belongs to another run: objective\.recipe\.arkd_weight"):
        run(replace(SHORT, arkd_weight=2.0))


def an_objective(teacher: Trained, recipe: DeapRecipe, student: ReIDModel | None = None) -> Compression:
    model = teacher.model if student is None else student
    return Compression(Pruning(model), new_classifier(PEOPLE, model.backbone.channels), Tutor(teacher), recipe)


def losses(objective: Compression) -> dict[str, torch.Tensor]:
    images = torch.randn(8, 3, INPUT.height, INPUT.width, generator=torch.Generator().manual_seed(0))
    found: dict[str, torch.Tensor] = objective(images, torch.arange(8) // 2, 0)
    return found


def test_every_loss_of_the_method_is_there_and_weighs_what_the_recipe_says(teacher: Trained) -> None:
    recipe = replace(SHORT, embedding_weight=1.0)
    student = a_network("resnet18", seed=5)
    once = losses(an_objective(teacher, recipe, student))
    assert once.keys() == {"loss", "distillation", "gap", "arkd", "embedding"}
    assert all(value.item() > 0 for value in once.values())
    heavier = replace(recipe, distillation_weight=2.0, gap_weight=1.0, arkd_weight=2.0, embedding_weight=2.0)
    twice = losses(an_objective(teacher, heavier, student))
    for name in once.keys() - {"loss", "distillation"}:
        assert twice[name].item() == pytest.approx(2 * once[name].item(), rel=1e-4)
    without = replace(SHORT, distillation_weight=0.0, gap_weight=0.0, arkd_weight=0.0)
    assert losses(an_objective(teacher, without, student)).keys() == {"loss"}


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(teacher: Trained) -> None:
    objective = an_objective(teacher, SHORT)
    objective.classifier.data.copy_(teacher.classifier)
    found = losses(objective.eval())
    assert found["distillation"].item() == pytest.approx(0, abs=1e-5)
    assert found["gap"].item() < 1e-3
    assert found["arkd"].item() < 1e-4


def test_the_teacher_stays_in_evaluation_and_is_neither_trained_nor_checkpointed(teacher: Trained) -> None:
    objective = an_objective(teacher, SHORT).train()
    copied = objective._teacher[0]
    before = {name: values.clone() for name, values in copied.state_dict().items()}
    sum(losses(objective).values()).backward()  # type: ignore[union-attr]
    assert not copied.training
    assert all(torch.equal(values, before[name]) for name, values in copied.state_dict().items())
    assert all(parameter.grad is None for parameter in copied.parameters())
    names = {name.split(".")[0] for name in objective.state_dict()}
    assert names == {"student", "classifier"}


def test_every_parameter_takes_part_in_a_step(teacher: Trained) -> None:
    objective = an_objective(teacher, SHORT)
    sum(losses(objective).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_a_trace_is_the_forward_pass_with_its_blocks(teacher: Trained) -> None:
    model = a_network("resnet50", Width(2))
    images = torch.randn(2, 3, INPUT.height, INPUT.width)
    seen = traced(model, lambda: model(images))
    assert [len(seen.blocks[stage]) for stage in seen.blocks] == [3, 4, 6, 3]
    assert torch.equal(seen.embedding, model.embed(images))
    assert torch.allclose(seen.output("layer4").mean(dim=(2, 3)), seen.feature)
    assert not any(module._forward_hooks for module in model.modules())


def test_pruners_move_by_descent_and_all_else_by_adam(teacher: Trained) -> None:
    objective = an_objective(teacher, SHORT)
    descending = {id(weight) for weight in objective.by_descent()}
    assert len(descending) == 8
    assert objective.descent * SHORT.prune.lr == pytest.approx(SHORT.pruner_lr)


def test_a_teacher_of_another_width_needs_no_gap_weight(teacher: Trained) -> None:
    student = a_network("resnet18", Width(2))
    with pytest.raises(DataError, match="set gap_weight = 0"):
        an_objective(teacher, SHORT, student)
    assert losses(an_objective(teacher, replace(SHORT, gap_weight=0.0), student)).keys() == {
        "loss",
        "distillation",
        "arkd",
    }
    with pytest.raises(DataError, match="embeddings of 16 and 32 numbers"):
        an_objective(teacher, replace(SHORT, gap_weight=0.0, embedding_weight=1.0), student)


def test_a_teacher_of_other_people_cannot_teach_logits(teacher: Trained) -> None:
    other = Trained(teacher.model, teacher.classifier[:3])
    with pytest.raises(DataError, match="3 identities cannot teach 8"):
        an_objective(other, SHORT)


@pytest.mark.parametrize(
    ("field", "value"), [("arkd_weight", -1.0), ("shrink", 0.0), ("temperature", 0.0), ("gap_weight", float("nan"))]
)
def test_a_recipe_that_makes_no_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(DataError, match=field):
        replace(SHORT, **{field: value})  # type: ignore[arg-type]


def a_chain() -> StoredChain:
    chain = replace(pico_chain(stem=4, narrowest=2, rungs=3), input=INPUT)
    return load(dump(chain))


def test_an_expanded_student_is_compressed_below_the_floor_of_its_teacher() -> None:
    stored = a_chain()
    start = from_student(stored, Width(2), PEOPLE)
    recipe = replace(SHORT, gap_weight=0.0, embedding_weight=1.0)
    full = stored.chain.table.group_sizes(Width(4))
    floor = count_macs(stored.chain.table.fixed(full | dict.fromkeys(prunable(stored.chain.table), 1)), Width(4), INPUT)
    limits = limit_at(start.student, 0.5)
    assert limits.max_macs is not None
    assert limits.max_macs < floor
    done = compress(start, PEOPLE, INPUT, recipe, limits, 0)
    chain = finished(done, start)
    assert chain.embedding_dim == 16
    assert count_macs(chain.table, Width(2), INPUT) <= limits.max_macs


def finished(done: Compressed, start: Start) -> Chain:
    return terminal_chain(done.trained.model, INPUT, name="pruned", license="none", provenance={}, order=start.order)


def test_the_full_width_of_a_chain_keeps_the_order_of_its_embedding() -> None:
    """Trained towards the chain's own space, a terminal model answers in the teacher's channel order."""
    stored = a_chain()
    start = from_student(stored, Width(4), PEOPLE)
    anchor = anchor_in(stored, PEOPLE, 32, weight=1.0)
    still = replace(
        SHORT, prune=replace(RECIPE, steps=1, lr=1e-9), finetune=replace(RECIPE, steps=1, lr=0.0), shrink=1e-9
    )
    done = compress(start, PEOPLE, INPUT, still, None, 0, compatible=anchor)
    chain = finished(done, start)
    assert np.array_equal(chain.lift(Width(4)), stored.chain.lift(Width(4)))


def test_a_narrow_student_cannot_be_trained_into_the_space_of_its_chain() -> None:
    stored = a_chain()
    with pytest.raises(ChainMismatch, match="embeds into 32 numbers"):
        anchor_in(stored, PEOPLE, from_student(stored, Width(2), PEOPLE).student.backbone.channels)


def test_a_network_that_is_no_resnet_is_refused() -> None:
    model = ReIDModel("mobilenetv2", Width(8, ()))
    trained = Trained(model.eval(), torch.zeros(8, model.backbone.channels))
    with pytest.raises(ArchitectureError, match="is no ResNet"):
        compress(from_teacher("toy", trained), PEOPLE, INPUT, SHORT, None, 0)


def test_the_default_recipe_is_the_authors_schedule() -> None:
    recipe = deap_recipe(flat_people(identities=32, each=12))
    assert (recipe.prune.batch.identities, recipe.prune.batch.images_per_identity) == (16, 6)
    assert recipe.prune.steps == 9 * recipe.prune.warmup_steps == 90 * 4
    assert recipe.finetune.steps == 15 * 4
    assert (recipe.shrink, recipe.gap_weight, recipe.arkd_weight, recipe.temperature) == (3.0, 0.5, 1.0, 2.0)


def test_the_losses_of_a_run_are_those_that_are_reported(teacher: Trained) -> None:
    names: set[str] = set()
    runs = lambda _: Run(report=lambda progress: names.update(progress.losses))  # noqa: E731
    compress(from_teacher("toy", teacher, a_network("resnet18", WIDTH, 3)), PEOPLE, INPUT, SHORT, None, 0, runs)
    assert names == {"loss", "distillation", "gap", "arkd"}
