import pytest

from chains.architectures import architecture
from chains.errors import ArchitectureError, WidthError
from chains.model import ReIDModel, module_name
from chains.width import Width

PLAIN = ("resnet18", "resnet50")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("width", [Width(1), Width(4), Width(6, (2, 3, 4)), Width(16, (1, 1, 2)), Width(4, (2, 4, 4))])
def test_the_table_has_the_shapes_of_the_torch_module(name: str, width: Width) -> None:
    model = ReIDModel(name, width)
    assert {tensor: tuple(values.shape) for tensor, values in model.tensors().items()} == model.table.tensor_shapes(
        width
    )


@pytest.mark.parametrize("name", PLAIN)
def test_the_table_claims_every_parameter_and_statistic_of_the_module(name: str) -> None:
    model = ReIDModel(name, Width(4))
    statistics = {module_name(f"{norm}.running_{kind}") for norm in model.table.batch_norms for kind in ("mean", "var")}
    expected = {module_name(tensor) for tensor in model.table.axes} | statistics
    assert {entry for entry in model.state_dict() if not entry.endswith("num_batches_tracked")} == expected


def test_a_basic_first_stage_shares_the_group_of_the_stem() -> None:
    table = architecture("resnet18")
    assert "layer1" not in table.groups
    assert table.writers("stem") == ("conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv2.weight")


def test_a_stage_is_written_by_its_shortcut_and_every_last_convolution() -> None:
    writers = architecture("resnet50").writers("layer4")
    assert set(writers) == {"layer4.0.downsample.0.weight", *(f"layer4.{block}.conv3.weight" for block in range(3))}


@pytest.mark.parametrize("name", PLAIN)
def test_every_group_has_a_writer_and_every_value_a_maker(name: str) -> None:
    table = architecture(name)
    assert all(table.writers(group) for group in table.groups)
    assert len({node.output for node in table.nodes}) == len(table.nodes)


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(ArchitectureError, match="resnet18, resnet34, resnet50"):
        architecture("resnet19")


def test_a_width_wider_than_the_teacher_is_refused_by_the_group_that_is_short() -> None:
    with pytest.raises(WidthError, match="group 'layer2"):
        architecture("resnet18").require_within(Width(8, (4, 4, 8)), Width(8))
