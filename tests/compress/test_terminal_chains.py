"""Terminal chains: sizes per layer go through costs, chain file, ONNX, calibration, evaluation and export unchanged."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from chains.architectures import architecture
from chains.artifact import METADATA_KEY, StoredChain, canonical_json, dump, load
from chains.calibrate import calibrate
from chains.chain import Chain
from chains.compress.run import terminal_chain
from chains.compress.units import with_channels
from chains.cost import count_macs, count_params
from chains.errors import ArchitectureError, ChainFileError, ChainMismatch
from chains.evaluate import measure_frontier
from chains.export import export_safetensors, load_exported, read_exported
from chains.finetune import finetune
from chains.model import ReIDModel, load_student, model_of, normalise
from chains.onnxfile import EmitOptions, plan, write
from chains.testing import pico_chain, random_tensors
from chains.width import Width
from tests.chains.toys import INPUT, RECIPE, flat_people
from tests.compress.pruned import WIDTH, a_network, a_terminal_chain

NAMES = ("resnet18", "resnet50", "resnet50_ibn_a", "resnet18_bot", "resnet50_fc512")


def stored(chain: Chain) -> StoredChain:
    return load(dump(chain))


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_chain_is_stored_and_read_back(name: str) -> None:
    chain = a_terminal_chain(name)
    read = stored(chain)
    assert dump(read.chain) == dump(chain)
    assert read.chain.sizes == chain.sizes
    assert read.chain.table.group_sizes(WIDTH) == chain.sizes
    assert all(np.array_equal(read.chain.tensors[tensor], values) for tensor, values in chain.tensors.items())


def test_only_terminal_chains_are_written_in_version_four() -> None:
    def version(chain: Chain) -> int:
        data = dump(chain)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        number: int = json.loads(header["__metadata__"][METADATA_KEY])["format_version"]
        return number

    assert version(a_terminal_chain()) == 4
    assert version(pico_chain()) == 2


def test_version_four_guards_its_bytes() -> None:
    """A chain of integers, so that the digest depends on the format alone. A new digest is a new format version."""
    chain = a_terminal_chain()
    counted = {n: np.arange(t.size, dtype=np.float32).reshape(t.shape) for n, t in chain.tensors.items()}
    ones = {w: {n: np.ones_like(v) for n, v in found.items()} for w, found in chain.statistics.items()}
    integers = replace(chain, tensors=counted, statistics=ones, embedding_space="golden")
    assert load(dump(integers)).digest == "3550a4649844b750fdb8fb838a466080d5e1e0efc952625ff287100b5cbfce47"


LEFT_OUT = "left out"


def changed_header(chain: Chain, **fields: object) -> bytes:
    data = dump(chain)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ours = json.loads(header["__metadata__"][METADATA_KEY]) | fields
    header["__metadata__"][METADATA_KEY] = canonical_json({n: value for n, value in ours.items() if value != LEFT_OUT})
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"sizes": {"stem": 4}}, "not in both resnet18 and the list"),
        ({"sizes": LEFT_OUT}, "sizes"),
        ({"format_version": 3}, "sizes"),
        ({"sizes": 3}, "sizes"),
        ({"ladder": ["2x2-4-8", "4x2-4-8"]}, "one model"),
    ],
)
def test_a_file_with_sizes_that_do_not_belong_is_refused(fields: dict[str, object], refusal: str) -> None:
    with pytest.raises(ChainFileError, match=refusal):
        load(changed_header(a_terminal_chain(), **fields))


def test_sizes_of_zero_or_above_the_width_s_are_refused() -> None:
    chain = a_terminal_chain()
    assert chain.sizes is not None
    with pytest.raises(ChainFileError, match=r"layer1\.0\.a"):
        load(changed_header(chain, sizes={**chain.sizes, "layer1.0.a": 0}))
    with pytest.raises(ChainMismatch, match="has 5 channels; 4x2-4-8 has 4"):
        replace(chain, sizes={**chain.sizes, "layer1.0.a": 5})


@pytest.mark.parametrize("name", ["vit_small", "osnet", "msinet"])
def test_layers_of_networks_with_heads_gates_or_shared_groups_have_no_sizes_of_their_own(name: str) -> None:
    table = architecture(name)
    width = Width(24, table.multipliers) if table.multipliers == () else table.usual_width
    with pytest.raises(ArchitectureError, match="cannot be set layer by layer"):
        table.fixed(table.group_sizes(width))


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_a_count_over_the_graph(name: str) -> None:
    chain = a_terminal_chain(name)
    whole = stored(chain)
    planned = plan(whole, WIDTH)
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(write(whole, WIDTH))).graph
    floats = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert planned.costs.params == sum(int(np.prod(tensor.dims)) for tensor in floats)
    assert planned.costs.artifact_bytes == len(write(whole, WIDTH))
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.value_info}
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    macs = 0
    for node in graph.node:
        if node.op_type == "Conv":
            macs += int(np.prod(shapes[node.output[0]][1:])) * int(np.prod(weights[node.input[1]][1:]))
        elif node.op_type == "Gemm":
            macs += int(np.prod(weights[node.input[1]]))
    assert planned.costs.macs == macs < count_macs(architecture(name), WIDTH, INPUT)
    assert planned.costs.params < count_params(architecture(name), WIDTH)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [EmitOptions(), EmitOptions(embedding="native", preprocess="in-graph", opset=11)])
def test_the_onnx_file_answers_as_torch_does(name: str, options: EmitOptions) -> None:
    chain, people = a_terminal_chain(name), flat_people()
    data = write(stored(chain), WIDTH, options)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    pixels = people.pixels(np.arange(8))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(load_student(chain, WIDTH).embed(_normalised(pixels)), dim=1).numpy()
    given = pixels if options.preprocess == "in-graph" else _normalised(pixels).numpy()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": given})
    assert np.abs(found - expected).max() < 1e-4


def test_layers_of_depthwise_networks_have_sizes_of_their_own() -> None:
    model = a_network("mobilenetv2", Width(8, ()))
    full = model.table.group_sizes(model.width)
    kept = {
        group: np.arange(1 + size // 2) for group, size in full.items() if group not in model.table.embedding_channels
    }
    narrow = with_channels(model, kept)
    chain = terminal_chain(narrow, INPUT, name="terminal", license="none", provenance={})
    session = onnxruntime.InferenceSession(write(stored(chain), model.width), providers=["CPUExecutionProvider"])
    images = _normalised(flat_people().pixels(np.arange(4)))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(narrow.embed(images), dim=1).numpy()
    assert np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max() < 1e-4


def _normalised(pixels: np.ndarray) -> torch.Tensor:
    return normalise(pixels, INPUT)


def test_the_onnx_file_is_a_plain_resnet() -> None:
    def operators(chain: Chain, width: Width) -> list[str]:
        return [node.op_type for node in onnx.load_from_string(write(stored(chain), width)).graph.node]

    found = operators(a_terminal_chain("resnet50"), WIDTH)
    assert found == operators(pico_chain(architecture_name="resnet50"), Width(8))
    assert set(found[: found.index("GlobalAveragePool")]) == {"Conv", "Relu", "Add", "MaxPool"}


def test_a_terminal_chain_is_calibrated_measured_and_stored_again() -> None:
    people = flat_people(identities=64, each=4)
    chain = calibrate(a_terminal_chain(), people, "cpu")
    frontier = measure_frontier(chain, people.take(np.arange(0, 64, 4)), people.take(np.arange(256)), "people", 0)
    again = stored(replace(chain, frontier=frontier)).chain
    assert again.frontier is not None
    assert [measured.width for measured in again.frontier.widths] == [WIDTH]
    assert again.sizes == chain.sizes


def test_a_terminal_network_is_exported_and_trained_on(tmp_path: Path) -> None:
    whole = stored(a_terminal_chain("resnet50_ibn_a"))
    export_safetensors(whole, WIDTH, tmp_path / "network.safetensors")
    loaded = load_exported(tmp_path / "network.safetensors")
    assert read_exported(tmp_path / "network.safetensors").origin.sizes == whole.chain.sizes
    images = torch.randn(2, 3, INPUT.height, INPUT.width)
    with torch.no_grad():
        assert torch.equal(loaded.embed(images), load_student(whole.chain, WIDTH).embed(images))
    trained = finetune(whole.chain, WIDTH, flat_people(), RECIPE, 0)
    assert trained.model.table.group_sizes(WIDTH) == whole.chain.sizes


def test_a_module_of_uneven_sizes_is_trained_from_the_leading_channels() -> None:
    table = architecture("resnet18")
    sizes = table.group_sizes(WIDTH) | {"layer1.0.a": 2, "layer3.1.a": 5}
    torch.manual_seed(0)
    whole = ReIDModel("resnet18", WIDTH)
    torch.manual_seed(0)
    uneven = ReIDModel(table.fixed(sizes), WIDTH)
    weights, leading = whole.tensors()["layer1.0.conv2.weight"], uneven.tensors()["layer1.0.conv2.weight"]
    assert torch.equal(leading, weights[:, :2])
    feature, _ = uneven(torch.randn(4, 3, INPUT.height, INPUT.width))
    feature.sum().backward()
    assert all(tensor.grad is not None for name, tensor in uneven.tensors().items() if not name.startswith("neck"))
    assert "Conv2d(4, 2," in str(uneven)


def test_sizes_that_the_module_cannot_give_are_refused() -> None:
    table = architecture("resnet18")
    wide = table.fixed(table.group_sizes(WIDTH) | {"layer1.0.a": 9})
    with pytest.raises(ChainMismatch, match=r"layer1\.0\.conv1\.weight is \(4, 4, 3, 3\)"):
        ReIDModel(wide, WIDTH)
    with pytest.raises(ChainMismatch, match="tensors do not fit resnet18"):
        model_of(table.fixed(table.group_sizes(WIDTH) | {"layer1.0.a": 2}), WIDTH, random_tensors(table, WIDTH))
