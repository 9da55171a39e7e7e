"""MSINet at its published size: parameters, costs, and the answers of its authors' network on its own weights."""

import onnxruntime
import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from chains.architectures import architecture
from chains.artifact import dump, load
from chains.backbones.msinet import ChannelAttention
from chains.chain import STATISTICS, InputSpec
from chains.cost import count_macs, value_shapes
from chains.importers.schemes import identity_neck
from chains.model import ReIDModel, load_student, model_of
from chains.onnxfile import EmitOptions, write
from chains.testing import pico_chain
from chains.width import Width
from tests.originals import msinet
from tests.originals.state import State, parameters

TABLE = architecture("msinet")
PUBLISHED = Width(64, (4, 6, 8))
INPUT = InputSpec(256, 128, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BESIDE = ("fc.", "head.", "classifier.", "f_fc.", "f_head.", "f_classifier.")  # what trains beside the feature


def teacher_of(state: State, width: Width = PUBLISHED) -> ReIDModel:
    """The module with the tensors of a checkpoint, and a neck of any kind."""
    channels = TABLE.embedding_dim(width)
    neck = {"neck.weight": torch.ones(channels), "neck.bias": torch.zeros(channels)}
    names = {*TABLE.axes, *(f"{norm}.{kind}" for norm in TABLE.batch_norms for kind in STATISTICS)}
    found = neck | {name: state[name] for name in names if not name.startswith("neck.")}
    return model_of("msinet", width, {name: values.numpy() for name, values in found.items()})


def some_images(height: int = 256, width: int = 128) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_it_answers_as_the_original_on_the_same_weights() -> None:
    state, images = msinet.checkpoint(), some_images()
    teacher = teacher_of(state)
    identity_neck(teacher, teacher(images)[0])
    torch.testing.assert_close(teacher.embed(images), msinet.embed(state, images), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_its_attention_is_part_of_that_answer() -> None:
    """With γ of one, so that attention weighs as much as what it is added to; in `checkpoint` it is a tenth or so."""
    state, images = msinet.checkpoint(seed=3), some_images()
    strong = state | {name: torch.ones(1) for name in state if name.endswith(".gamma")}
    feature = teacher_of(strong)(images)[0]
    torch.testing.assert_close(feature, msinet.embed(strong, images), atol=1e-4, rtol=1e-4)
    assert (feature - teacher_of(state)(images)[0]).abs().max() > 1e-2


def test_the_table_has_every_tensor_of_the_original_but_those_of_its_heads() -> None:
    state = msinet.checkpoint()
    kept = {name for name in state if not name.startswith(BESIDE) and not name.endswith("num_batches_tracked")}
    statistics = {f"{norm}.{kind}" for norm in TABLE.batch_norms for kind in STATISTICS}
    assert kept == {name for name in {*TABLE.axes, *statistics} if not name.startswith("neck.")}


def test_it_has_the_published_number_of_parameters() -> None:
    """2.3 M in the paper, with the linear layers and the necks beside the feature: 329 216 of them."""
    backbone = ReIDModel("msinet", PUBLISHED).backbone
    own = sum(values.numel() for values in backbone.parameters())
    assert own == parameters(msinet.checkpoint(), BESIDE) == 1_998_819
    beside = 512 * 512 + 256 * 256 + 2 * (512 + 256)
    assert round((own + beside) / 1e6, 1) == 2.3


def test_the_last_map_is_a_sixteenth_of_the_image_and_the_feature_has_three_parts() -> None:
    shapes = value_shapes(TABLE, PUBLISHED, INPUT)
    assert (shapes["cells.7"].height, shapes["cells.7"].width) == (16, 8)
    assert [shapes[value].channels for value in ("average", "halves", "feature")] == [512, 256, 768]


@torch.inference_mode()
def test_multiply_adds_are_those_torch_counts_in_the_original() -> None:
    with FlopCounterMode(display=False) as counter:
        msinet.embed(msinet.checkpoint(), some_images()[:1])
    assert counter.get_total_flops() == 2 * count_macs(TABLE, PUBLISHED, INPUT) == 2 * 1_128_803_840


def test_one_gain_serves_both_branches_at_every_width() -> None:
    gains = {name: shape for name, shape in TABLE.tensor_shapes(Width(8, (4, 6, 8))).items() if name.endswith("gamma")}
    assert gains == dict.fromkeys(("cells.3._op2.gamma", "cells.6._op3.gamma", "cells.7._op3.gamma"), (1,))
    assert set(TABLE.writers("gain")) == gains.keys()


def test_branches_end_in_one_group_only_where_a_gate_or_an_attention_joins_them() -> None:
    assert TABLE.writers("cells.3.tails2")[0] == "cells.3.conv2a.conv1.weight"
    assert "cells.3.conv2b.2.conv2.weight" in TABLE.writers("cells.3.tails2")
    assert "cells.1.tails2" not in TABLE.groups
    assert TABLE.axes["cells.1.conv3a.conv1.weight"].columns == ("cells.1.conv2b.2",)


@torch.inference_mode()
def test_attention_is_as_exact_when_everything_else_runs_in_half_precision() -> None:
    attention = ChannelAttention()
    attention.gamma.fill_(1)
    own, other = torch.rand(2, 1, 8, 32, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(own, other)
    torch.testing.assert_close(mixed, attention(own.float(), other.float()))


@torch.inference_mode()
def test_of_an_odd_number_of_rows_the_middle_one_is_in_both_halves() -> None:
    """Images 80 pixels tall have five rows there, and those 16 tall have one."""
    for height, upper, lower in ((80, (0, 1, 2), (2, 3, 4)), (16, (0,), (0,))):
        model = ReIDModel("msinet", Width(8, (4, 6, 8))).eval()
        maps: list[torch.Tensor] = []
        model.backbone.get_submodule("f_conv").register_forward_hook(lambda _m, _i, out, seen=maps: seen.append(out))
        feature = model(some_images(height, 32))[0]
        means = [maps[0][:, :, list(rows)].mean(dim=(2, 3)) for rows in (upper, lower)]
        torch.testing.assert_close(feature[:, 64:], torch.cat(means, dim=1))


@torch.inference_mode()
@pytest.mark.parametrize("height", [16, 80])
def test_odd_maps_are_served_as_torch_has_them(height: int) -> None:
    chain = pico_chain(architecture_name="msinet", stem=16, narrowest=8, rungs=3, height=height, width=32)
    kept = load(dump(chain))
    images, width = some_images(height, 32), chain.ladder[1]
    native = load_student(kept.chain, width).embed(images)
    made = answer(write(kept, width, EmitOptions(embedding="native")), images)
    torch.testing.assert_close(made, functional.normalize(native), atol=1e-4, rtol=0)


def answer(model: bytes, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["embedding"], {"images": images.numpy()})[0])
