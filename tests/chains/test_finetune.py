"""Finetuning: a student trained downstream from its expansion."""

from dataclasses import replace

import numpy as np
import pytest

from chains.chain import Chain, Mode
from chains.errors import WidthError
from chains.expand import student
from chains.finetune import expanded, finetune
from chains.losses import LossRecipe
from chains.model import numpy_tensors
from chains.testing import pico_chain
from chains.train import Run
from chains.width import Width
from tests.chains.toys import INPUT, RECIPE, flat_people

WIDTH = Width(3)


def a_chain(mode: Mode) -> Chain:
    return replace(pico_chain(mode=mode, stem=4, narrowest=2, rungs=3), input=INPUT)


@pytest.mark.parametrize("mode", ["nested", "oskt"])
def test_a_finetuned_student_starts_from_its_expansion_statistics_included(mode: Mode) -> None:
    chain = a_chain(mode)
    state = numpy_tensors(expanded(chain, WIDTH)) | {
        name.removeprefix("backbone."): values.numpy() for name, values in expanded(chain, WIDTH).named_buffers()
    }
    for name, values in student(chain, WIDTH).items():
        assert np.array_equal(state[name], values), name
    still = finetune(chain, WIDTH, flat_people(), replace(RECIPE, lr=0.0), 0)
    weights = numpy_tensors(still.model)
    assert all(np.array_equal(weights[name], state[name]) for name in weights)


def test_a_width_that_was_not_calibrated_can_be_finetuned() -> None:
    chain = replace(a_chain("nested"), statistics={})
    trained = finetune(chain, WIDTH, flat_people(), RECIPE, 0)
    assert trained.model.width == WIDTH
    assert not trained.model.training


def test_finetuning_has_a_new_classifier_for_the_new_identities() -> None:
    trained = finetune(a_chain("nested"), WIDTH, flat_people(identities=11), RECIPE, 0)
    assert trained.classifier.shape == (11, 24)


def test_finetuning_lowers_the_loss() -> None:
    losses: list[float] = []
    run = Run(report=lambda progress: losses.append(progress.losses["loss"]))
    recipe = replace(RECIPE, steps=40, lr=3e-3)
    finetune(a_chain("oskt"), WIDTH, flat_people(), recipe, 0, run, loss=LossRecipe())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_finetuning_has_the_paper_s_losses_unless_told_otherwise() -> None:
    paper, plain = (
        finetune(a_chain("nested"), WIDTH, flat_people(), RECIPE, 0, **options).model
        for options in ({}, {"loss": LossRecipe()})
    )
    assert not np.array_equal(numpy_tensors(paper)["conv1.weight"], numpy_tensors(plain)["conv1.weight"])


def test_a_width_the_chain_cannot_give_is_refused() -> None:
    with pytest.raises(WidthError):
        finetune(a_chain("nested"), Width(5), flat_people(), RECIPE, 0)
