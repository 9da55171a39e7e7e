"""MobileNetV2 at its published size: sizes, costs, and the answers of torchreid's network on its own weights."""

import pytest
import torch

from chains.architectures import architecture
from chains.architectures.mobilenetv2 import LAST_CHANNELS, STAGES
from chains.backbones.mobilenetv2 import InvertedResidual
from chains.chain import STATISTICS, InputSpec
from chains.cost import count_macs, value_shapes
from chains.importers.schemes import identity_neck
from chains.model import ReIDModel, model_of
from chains.nodes import Add
from chains.width import Width
from tests.originals import torchreid
from tests.originals.state import State

TABLE = architecture("mobilenetv2")
PUBLISHED = Width(32, ())
INPUT = InputSpec(256, 128, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def teacher_of(state: State) -> ReIDModel:
    """The module with the tensors of a checkpoint, and a neck of any kind."""
    names = {*TABLE.axes, *(f"{norm}.{kind}" for norm in TABLE.batch_norms for kind in STATISTICS)}
    neck = {"neck.weight": torch.ones(LAST_CHANNELS), "neck.bias": torch.zeros(LAST_CHANNELS)}
    found = neck | {name: state[name] for name in names if not name.startswith("neck.")}
    return model_of("mobilenetv2", PUBLISHED, {name: values.numpy() for name, values in found.items()})


def test_it_has_the_published_sizes_and_number_of_parameters() -> None:
    sizes = TABLE.group_sizes(PUBLISHED)
    assert [sizes[stage.name] for stage in STAGES] == [16, 24, 32, 64, 96, 160, 320]
    assert (sizes["stem"], sizes["conv2.0.inner"], sizes["conv3.1.inner"], sizes["conv9"]) == (32, 32, 144, 1280)
    backbone = ReIDModel("mobilenetv2", PUBLISHED).backbone
    assert sum(values.numel() for values in backbone.parameters()) == 2_224_960


def test_it_has_the_published_multiply_adds() -> None:
    """300 774 272 at 224×224 (Sandler et al., Table 4: 300 M), of which a classifier of 1000 has 1280 each; without the
    1×1 convolution that torchreid's first block has besides. At the size of people, by pixels, 204 M."""
    square = InputSpec(224, 224, INPUT.mean, INPUT.std)
    macs = count_macs(TABLE, PUBLISHED, square)
    assert macs - 32 * 32 * 112**2 + 1000 * 1280 == 300_774_272
    assert count_macs(TABLE, PUBLISHED, INPUT) == macs * (256 * 128) // 224**2 == 203_976_704


def test_the_last_map_is_a_thirty_second_of_the_image() -> None:
    last = value_shapes(TABLE, PUBLISHED, INPUT)["conv9"]
    assert (last.channels, last.height, last.width) == (1280, 8, 4)


def test_it_answers_as_torchreids_on_the_same_weights() -> None:
    state = torchreid.checkpoint("mobilenetv2_x1_0")
    images = torch.randn(3, 3, 256, 128, generator=torch.Generator().manual_seed(1))
    teacher = teacher_of(state)
    with torch.inference_mode():
        expected = torchreid.embed(state, images)
        feature, _ = teacher(images)
        identity_neck(teacher, feature)
        torch.testing.assert_close(teacher.embed(images), expected, atol=1e-4, rtol=1e-4)


def test_blocks_but_the_first_of_their_stage_have_a_shortcut() -> None:
    blocks = [node.output for node in TABLE.nodes if isinstance(node, Add)]
    assert blocks == [f"{stage.name}.{index}" for stage in STAGES for index in range(1, stage.blocks)]


@pytest.mark.parametrize("stem", [1, 3, 11, 20, 31])
def test_every_stem_is_a_width(stem: int) -> None:
    width = Width(stem, ())
    model = ReIDModel("mobilenetv2", width).eval()
    assert {name: tuple(values.shape) for name, values in model.tensors().items()} == TABLE.tensor_shapes(width)
    assert model.embed(torch.zeros(1, 3, 64, 32)).shape == (1, TABLE.group_sizes(width)["conv9"])


def test_stages_that_come_out_equally_wide_get_no_shortcut() -> None:
    """At a stem of two, conv3 and conv4 both have two channels; conv4.0 halves the map."""
    width = Width(2, ())
    assert TABLE.group_sizes(width)["conv3"] == TABLE.group_sizes(width)["conv4"] == 2
    found = ReIDModel("mobilenetv2", width).backbone.get_submodule("conv4.0")
    assert isinstance(found, InvertedResidual)
    assert not found.has_shortcut


def test_the_sizes_of_x1_4_are_no_width_of_it() -> None:
    """Its stem of 44 gives stages of 22, 33, 44, 88, … channels here, and int(1.4 × 64) = 89 at the fourth there."""
    wider = torchreid.checkpoint("mobilenetv2_x1_4")
    shapes = TABLE.tensor_shapes(Width(44, ()))
    assert [shapes[f"{s.name}.0.conv3.0.weight"][0] for s in STAGES] == [22, 33, 44, 88, 132, 220, 440]
    assert [wider[f"{s.name}.0.conv3.0.weight"].shape[0] for s in STAGES] == [22, 33, 44, 89, 134, 224, 448]
