"""OSNet, OSNet-IBN and OSNet-AIN against torchreid's published numbers and the slow reference of its forward pass."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from chains.arch import Group
from chains.architectures import architecture
from chains.architectures.osnet import MULTIPLIERS, OSNETS
from chains.chain import InputSpec
from chains.cost import count_macs, value_shapes
from chains.importers.schemes import identity_neck
from chains.model import ReIDModel
from chains.nodes import Conv, Linear
from chains.testing import IMAGENET_MEAN, IMAGENET_STD
from chains.width import Width
from tests.originals import torchreid

SIZES = {"x1_0": Width(64, MULTIPLIERS), "x0_75": Width(48, MULTIPLIERS), "x0_5": Width(32, MULTIPLIERS)} | {
    "x0_25": Width(16, MULTIPLIERS)
}
TOY = Width(16, (4, 8, 12))
PARAMETERS = {
    ("osnet", "x1_0"): 2_193_616,
    ("osnet", "x0_75"): 1_299_224,
    ("osnet", "x0_5"): 636_520,
    ("osnet", "x0_25"): 203_568,
    ("osnet_ibn", "x1_0"): 2_194_640,
    ("osnet_ain", "x1_0"): 2_193_616,
    ("osnet_ain", "x0_75"): 1_299_224,
    ("osnet_ain", "x0_5"): 636_520,
    ("osnet_ain", "x0_25"): 203_568,
}
MACS = {"x1_0": 978.9e6, "x0_75": 571.8e6, "x0_5": 272.9e6, "x0_25": 82.3e6}
TOLD = {"x1_0": 978_878_352, "x0_25": 82_316_000}  # printed by its scripts
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
REID = InputSpec(256, 128, IMAGENET_MEAN, IMAGENET_STD)


def some_images(count: int = 3, height: int = 64, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def loaded(name: str, width: Width, state: dict[str, Tensor], images: Tensor) -> ReIDModel:
    """A model with the file's tensors as they are, and a neck that changes nothing."""
    model = ReIDModel(name, width).eval()
    model.backbone.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier.")})
    with torch.no_grad():
        identity_neck(model, model.backbone(images))
    return model


# --- torchreid's networks


@pytest.mark.parametrize(("name", "size"), PARAMETERS)
def test_the_parameters_are_as_many_as_published(name: str, size: str) -> None:
    """Its counter meets a block's gate once for each of the four streams, and counts it as often."""
    parameters = dict(ReIDModel(name, SIZES[size]).backbone.named_parameters())
    gates = sum(values.numel() for key, values in parameters.items() if ".gate." in key)
    assert sum(values.numel() for values in parameters.values()) + 3 * gates == PARAMETERS[name, size]


@pytest.mark.parametrize("name", OSNETS)
@pytest.mark.parametrize("size", SIZES)
def test_the_table_has_the_tensors_of_a_file_in_their_shapes(name: str, size: str) -> None:
    table, file = architecture(name), torchreid.checkpoint(f"{name}_{size}")
    wanted = {
        key: tuple(values.shape)
        for key, values in file.items()
        if not key.endswith(STATISTICS) and not key.startswith("classifier.")
    }
    shapes = table.tensor_shapes(SIZES[size])
    assert {key: shape for key, shape in shapes.items() if not key.startswith("neck.")} == wanted
    statistics = {key.rpartition(".")[0] for key in file if key.endswith("running_mean")}
    assert set(table.batch_norms) == statistics | {"neck"}


@pytest.mark.parametrize("name", OSNETS)
@pytest.mark.parametrize("size", SIZES)
def test_the_multiply_adds_are_those_of_its_table(name: str, size: str) -> None:
    assert round(count_macs(architecture(name), SIZES[size], REID), -5) == MACS[size]


@pytest.mark.parametrize("size", TOLD)
def test_the_multiply_adds_and_the_biases_it_counts_with_them_are_exact(size: str) -> None:
    table = architecture("osnet")
    shapes = value_shapes(table, SIZES[size], REID)
    biased = [shapes[node.output] for node in table.nodes if isinstance(node, Conv | Linear) and node.bias]
    biases = sum(shape.channels * shape.pixels for shape in biased)
    assert count_macs(table, SIZES[size], REID) + biases == TOLD[size]


@pytest.mark.parametrize("width", [SIZES["x0_25"], TOY], ids=str)
@pytest.mark.parametrize("name", OSNETS)
def test_a_checkpoint_embeds_as_the_slow_reference_does(
    name: str, width: Width, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third, fourth = (width.stage(stage) for stage in range(4))
    monkeypatch.setitem(torchreid.OSNET, "x0_toy", (first, second, third, fourth))
    state, images = torchreid.checkpoint(f"{name}_x0_toy", identities=7, seed=3), some_images()
    expected = torchreid.embed(state, images)
    with torch.no_grad():
        made = loaded(name, width, state, images).embed(images)
    assert float(expected.std(dim=0).max()) > 0.01, "the images can be told apart"
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


# --- groups


def test_a_gate_is_as_wide_inside_as_integer_division_makes_it_and_never_empty() -> None:
    table = architecture("osnet")
    inner = {
        stem: [table.group_sizes(Width(stem, MULTIPLIERS))[f"conv{stage}.0.gate"] for stage in (2, 3, 4)]
        for stem in (64, 48, 32, 16, 5, 1)
    }
    assert inner == {64: [4, 6, 8], 48: [3, 4, 6], 32: [2, 3, 4], 16: [1, 1, 2], 5: [1, 1, 1], 1: [1, 1, 1]}


@pytest.mark.parametrize(("share", "down", "halves_up"), [(Fraction(3, 2), 7, 8), (Fraction(1, 16), 1, 1)])
def test_a_group_rounds_down_or_halves_up(share: Fraction, down: int, halves_up: int) -> None:
    assert Group("a", expansion=share, rounds="down").size(Width(5)) == down
    assert Group("a", expansion=share, rounds=True).size(Width(5)) == halves_up


@pytest.mark.parametrize("name", OSNETS)
def test_the_last_light_convolutions_of_the_streams_and_their_gate_are_cut_together(name: str) -> None:
    table = architecture(name)
    tails = [stream[-1] for stream in OSNETS[name].streams("conv3.1")]
    lights = {f"{tail}.{conv}.weight" for tail in tails for conv in ("conv1", "conv2")}
    assert set(table.writers("conv3.1.streams")) == lights | {"conv3.1.gate.fc2.weight"}


@pytest.mark.parametrize("name", OSNETS)
def test_inside_a_stream_only_a_light_convolutions_own_two_layers_are_cut_together(name: str) -> None:
    table = architecture(name)
    inner = [light for stream in OSNETS[name].streams("conv4.0") for light in stream[:-1]]
    assert len(inner) == 0 + 1 + 2 + 3
    assert all(table.writers(light) == (f"{light}.conv1.weight", f"{light}.conv2.weight") for light in inner)


def test_one_gate_is_used_by_all_four_streams_of_a_block() -> None:
    nodes = [node for node in architecture("osnet").nodes if isinstance(node, Conv)]
    uses = Counter(node.name for node in nodes)
    shared = {name for name, count in uses.items() if count > 1}
    blocks = [f"conv{stage}.{block}" for stage in (2, 3, 4) for block in (0, 1)]
    assert shared == {f"{block}.gate.{layer}" for block in blocks for layer in ("fc1", "fc2")}
    assert all(uses[name] == 4 for name in shared)
    assert len({node.label or node.name for node in nodes}) == len(nodes)


@pytest.mark.parametrize("name", OSNETS)
def test_the_embedding_has_512_coordinates_at_every_width(name: str) -> None:
    for stem in (4, 9):
        model = ReIDModel(name, Width(stem, MULTIPLIERS)).eval()
        feature, embedding = model(some_images(2))
        assert feature.shape == embedding.shape == (2, 512)
        assert float(feature.detach().min()) == 0, "it ends in a ReLU"


# --- training from scratch


def test_depthwise_convolutions_start_as_large_as_their_own_nine_inputs_ask() -> None:
    backbone = ReIDModel("osnet", SIZES["x1_0"]).backbone
    depthwise = [module for module in backbone.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    spread = torch.cat([module.weight.detach().flatten() for module in depthwise]).std()
    assert len(depthwise) == 6 * (1 + 2 + 3 + 4)
    assert float(spread) == pytest.approx((2 / 9) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", OSNETS)
def test_a_fresh_network_learns_a_handful_of_images_by_heart(name: str) -> None:
    torch.manual_seed(0)
    model, head = ReIDModel(name, Width(8, MULTIPLIERS)).train(), nn.Linear(512, 4, bias=False)
    images, labels = some_images(8), torch.arange(8) // 2
    optimiser = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(25):
        loss = functional.cross_entropy(head(model(images)[1]), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < 1 < losses[0]
