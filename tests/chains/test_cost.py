import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chains.architectures import architecture
from chains.chain import InputSpec
from chains.cost import Costs, count_macs, count_params, peak_activation_bytes, value_shapes
from chains.model import ReIDModel
from chains.width import Width

PLAIN = ("resnet18", "resnet50")
INPUT = InputSpec(128, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("width", [Width(4), Width(12), Width(8, (2, 3, 4))])
def test_macs_are_those_torch_counts(name: str, width: Width) -> None:
    model = ReIDModel(name, width).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, INPUT.height, INPUT.width))
    assert counter.get_total_flops() == 2 * count_macs(architecture(name), width, INPUT)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("width", [Width(4), Width(8, (2, 3, 4))])
def test_shapes_are_those_of_the_feature_maps(name: str, width: Width) -> None:
    model = ReIDModel(name, width).eval()
    seen = {}
    for module_name, module in model.backbone.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out, n=module_name: seen.update({n: tuple(out.shape[1:])}))
    model(torch.zeros(1, 3, INPUT.height, INPUT.width))
    shapes = value_shapes(architecture(name), width, INPUT)
    by_conv = {
        node.name: shapes[node.output]
        for node in architecture(name).nodes
        if hasattr(node, "kernel") and node.name in seen
    }
    assert {conv: (shape.channels, shape.height, shape.width) for conv, shape in by_conv.items()} == seen


def test_the_published_costs_of_resnet50_come_out() -> None:
    """4.05 GMACs at 256x128 with last stride 1, and OSKT's S1 at 0.072 (methods/oskt.md §2)."""
    tall = InputSpec(256, 128, INPUT.mean, INPUT.std)
    table = architecture("resnet50")
    assert count_macs(table, Width(64), tall) == 4_053_270_528
    assert round(count_macs(table, Width(8), tall) / 1e9, 3) == 0.072
    assert round(count_params(table, Width(8)) / 1e6, 2) == 0.37


def test_a_worked_example_of_peak_activation() -> None:
    """ResNet-18 with one stem channel at 64x32: images (3·64·32) with the stem (32·16) floats is the fullest moment."""
    small = InputSpec(64, 32, INPUT.mean, INPUT.std)
    assert peak_activation_bytes(architecture("resnet18"), Width(1), small) == 4 * (3 * 64 * 32 + 32 * 16)


def test_the_memory_bound_is_the_load_peak_plus_activations() -> None:
    costs = Costs(macs=10, params=1000, peak_activation_bytes=500, artifact_bytes=1)
    assert (costs.flops, costs.weight_bytes, costs.memory_bytes_bound) == (20, 4000, 10_800 + 500)


@pytest.mark.parametrize("name", PLAIN)
def test_every_cost_rises_with_width(name: str) -> None:
    table = architecture(name)
    for narrow, wide in zip(range(4, 16), range(5, 17), strict=True):
        assert count_macs(table, Width(narrow), INPUT) < count_macs(table, Width(wide), INPUT)
        assert count_params(table, Width(narrow)) < count_params(table, Width(wide))
        assert peak_activation_bytes(table, Width(narrow), INPUT) <= peak_activation_bytes(table, Width(wide), INPUT)
