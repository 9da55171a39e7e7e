"""The torch model: names, shapes and pixels."""

import numpy as np
import pytest
import torch

from chains.errors import ChainMismatch, DataError
from chains.model import ReIDModel, model_of, normalise, numpy_tensors
from chains.width import Width
from tests.chains.toys import INPUT


def test_tensors_of_another_width_or_name_are_no_model() -> None:
    tensors = numpy_tensors(ReIDModel("resnet18", Width(4)))
    with pytest.raises(ChainMismatch, match=r"resnet18 3x2-4-8: .*conv1\.weight"):
        model_of("resnet18", Width(3), tensors)
    with pytest.raises(ChainMismatch, match=r"lacking .*conv1\.weight"):
        model_of("resnet18", Width(4), {name: t for name, t in tensors.items() if name != "conv1.weight"})


def test_the_neck_has_no_trained_bias() -> None:
    assert not ReIDModel("resnet18", Width(4)).neck.bias.requires_grad


def test_pixels_are_centred_and_scaled_per_channel() -> None:
    black, white = np.zeros((1, 32, 16, 3), np.uint8), np.full((1, 32, 16, 3), 255, np.uint8)
    assert normalise(black, INPUT).shape == (1, 3, 32, 16)
    torch.testing.assert_close(normalise(black, INPUT), torch.full((1, 3, 32, 16), -2.0))
    torch.testing.assert_close(normalise(white, INPUT), torch.full((1, 3, 32, 16), 2.0))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match=r"images are 16x32 pixels .* wants 32x16"):
        normalise(np.zeros((1, 16, 32, 3), np.uint8), INPUT)
