"""What every architecture of this library keeps, on a chain of random weights at toy widths.

The module is the table's, full width is the teacher, merging composes, tied rows are one function at every width, the
ONNX file answers as torch does, and what it costs is what is counted over it. A new architecture is a row of
`chains.testing.PICO`; it passes all of this or it is not done.
"""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chains.architectures import architecture, architecture_names
from chains.artifact import StoredChain, dump, load
from chains.chain import STATISTICS, Chain
from chains.cost import count_macs, count_params, peak_activation_bytes
from chains.cut import Cut, Cuts, Runs
from chains.errors import ChainMismatch
from chains.expand import expand, query_factor, student
from chains.model import ReIDModel, load_student, model_of, module_name
from chains.nodes import ChannelAttention, LayerNorm
from chains.onnxfile import OPSETS, EmitOptions, plan, require_finite, write
from chains.testing import PICO, contract_chain, even_tree, random_statistics, random_tensors, with_own_norms
from chains.width import Width

EVERY = tuple(PICO)
MODES = ("nested", "oskt")


@cache
def stored(name: str, mode: str = "nested", merged_share: float = 1) -> StoredChain:
    return load(dump(contract_chain(name, mode, merged_share)))


def some_images(chain: Chain, batch: int, seed: int = 0) -> np.ndarray:
    shape = (batch, 3, chain.input.height, chain.input.width)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def answer(model: bytes, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(["embedding"], {"images": images})[0]


def test_every_architecture_is_held_to_this_contract() -> None:
    assert set(EVERY) == set(architecture_names())


# --- the table and the torch module


@pytest.mark.parametrize("name", EVERY)
def test_the_table_is_sound(name: str) -> None:
    architecture(name).require_sound()


@pytest.mark.parametrize("name", EVERY)
def test_the_table_has_every_tensor_of_the_module_in_its_shape(name: str) -> None:
    table = architecture(name)
    for stem in PICO[name].stems:
        width = Width(stem, table.multipliers)
        model = ReIDModel(name, width)
        assert {t: tuple(values.shape) for t, values in model.tensors().items()} == table.tensor_shapes(width)
        statistics = {module_name(f"{norm}.{kind}") for norm in table.batch_norms for kind in STATISTICS}
        state = {entry for entry in model.state_dict() if not entry.endswith("num_batches_tracked")}
        assert state == {module_name(tensor) for tensor in table.axes} | statistics


# --- expansion


@pytest.mark.parametrize("merged_share", [0, 0.5, 1])
@pytest.mark.parametrize("name", EVERY)
def test_full_width_is_the_teacher(name: str, merged_share: float) -> None:
    chain = contract_chain(name, merged_share=merged_share)
    teacher = random_tensors(chain.table, chain.teacher) | random_statistics(chain.table, chain.teacher)
    orders = {group: partition.order for group, partition in chain.partitions.items()}
    sizes = chain.table.group_sizes(chain.teacher)
    in_order = {}
    for norm, groups in chain.table.batch_norms.items():  # statistics of the chain were made in leaf order
        starts = np.cumsum([0, *(sizes[group] for group in groups)])
        order = np.concatenate([orders[group] + start for group, start in zip(groups, starts, strict=False)])
        in_order |= {f"{norm}.{kind}": teacher[f"{norm}.{kind}"][np.argsort(order)] for kind in STATISTICS}
    images = torch.from_numpy(some_images(chain, 2))
    expected = model_of(name, chain.teacher, teacher | in_order).embed(images).detach().numpy()
    made = load_student(chain, chain.teacher).embed(images).detach().numpy()[:, chain.lift(chain.teacher)]
    np.testing.assert_allclose(unit(made), unit(expected), atol=1e-5)


def composed(wide: Cut, narrow: Cut) -> Runs:
    """The parts of a narrower cut counted in parts of a wider one."""
    starts = np.searchsorted(wide.parts.starts, narrow.parts.starts)
    stops = np.searchsorted(wide.parts.starts, narrow.parts.stops)
    return Runs(starts, stops, len(wide))


def summed(tensor: np.ndarray, runs: Runs, axis: int) -> np.ndarray:
    moved = np.moveaxis(tensor, axis, 0)
    parts = [moved[a:b].sum(axis=0) for a, b in zip(runs.starts, runs.stops, strict=True)]
    return np.moveaxis(np.stack(parts), 0, axis)


def column(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * (like.ndim - 1))


@pytest.mark.parametrize("name", EVERY)
def test_merging_composes(name: str) -> None:
    """From a wider student to a narrower one as from the teacher: means weighted by part sizes, sums plain, queries by
    the factor between the two widths."""
    chain = contract_chain(name)
    tensors = {tensor: values.astype(np.float64) for tensor, values in chain.tensors.items()}
    wide, narrow = chain.cuts(chain.ladder[-2]), chain.cuts(chain.ladder[0])
    at_wide, at_narrow = (expand(tensors, chain.axes, cuts) for cuts in (wide, narrow))
    for tensor, axes in chain.axes.items():
        rows = composed(wide.of(axes.rows), narrow.of(axes.rows))
        sizes, coarse = wide.of(axes.rows).parts, narrow.of(axes.rows).parts
        values = at_wide[tensor]
        merged = summed(values if axes.sums_rows else values * column(sizes.sizes, values), rows, 0)
        if axes.columns is not None:
            merged = summed(merged, composed(wide.of(axes.columns), narrow.of(axes.columns)), 1)
        merged = merged * query_factor(rows) if axes.sums_rows else merged / column(coarse.sizes, merged)
        np.testing.assert_allclose(merged, at_narrow[tensor], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_tied_rows_compute_one_function_at_every_width(name: str) -> None:
    """Rows and norms equal inside the parts of the narrowest width: all widths embed alike once lifted (float64).

    Layer normalisation over merged channels, and attention among them, keep to that only where all parts are of one
    size: there the trees are such, and the widths those that divide the teacher's by 2, 4, …
    """
    chain = contract_chain(name)
    widths = chain.ladder
    if any(isinstance(node, LayerNorm | ChannelAttention) for node in chain.table.nodes):
        chain = replace(chain, partitions={g: even_tree(len(p.order)) for g, p in chain.partitions.items()})
        widths = tuple(width for width in widths if chain.teacher.stem in (w := width.stem, 2 * w, 4 * w, 8 * w))
    assert len(widths) >= 2
    narrowest = chain.cuts(widths[0])
    tied = {tensor: tied_inside(narrowest, axes.rows, chain.tensors[tensor]) for tensor, axes in chain.axes.items()}
    statistics = {}
    for norm, groups in chain.table.batch_norms.items():
        part_of = narrowest.of(groups).part_of()
        for kind in STATISTICS:
            statistics[f"{norm}.{kind}"] = chain.statistics[widths[0]][f"{norm}.{kind}"][part_of]
    images = torch.from_numpy(some_images(chain, 2)).double()
    lifted = [embed_lifted(chain, tied, statistics, width, images) for width in widths]
    for embedding in lifted[1:]:
        torch.testing.assert_close(embedding, lifted[0], atol=1e-7, rtol=1e-7)


def tied_inside(cuts: Cuts, rows: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """`tensor` (float64) with every row replaced by the mean of its part."""
    cut, exact = cuts.of(rows), tensor.astype(np.float64)
    return (summed(exact, cut.parts, 0) / column(cut.parts.sizes, exact))[cut.part_of()]


def embed_lifted(
    chain: Chain, tensors: dict[str, np.ndarray], statistics: dict[str, np.ndarray], width: Width, images: torch.Tensor
) -> torch.Tensor:
    cuts = chain.cuts(width)
    made = expand(tensors, chain.axes, cuts)
    kept = {n: v[cuts.of(chain.table.batch_norms[n.rpartition(".")[0]]).parts.starts] for n, v in statistics.items()}
    model = ReIDModel(chain.architecture, width).double().eval()
    for name, values in (made | kept).items():
        model.state_dict()[module_name(name)].copy_(torch.from_numpy(values))
    return model.embed(images)[:, torch.from_numpy(chain.lift(width))].detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EVERY)
def test_torch_and_numpy_expand_alike(name: str, mode: str) -> None:
    chain = stored(name, mode).chain
    torches = {tensor: torch.tensor(values) for tensor, values in chain.tensors.items()}
    for width in chain.ladder:
        arrays, tensors = (expand(source, chain.axes, chain.cuts(width)) for source in (chain.tensors, torches))
        assert all(np.array_equal(arrays[tensor], tensors[tensor].numpy()) for tensor in arrays)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EVERY)
def test_the_chain_file_gives_the_same_chain(name: str, mode: str) -> None:
    chain = with_own_norms(contract_chain(name, mode))
    again = load(dump(chain)).chain
    assert dump(again) == dump(chain)
    for width in chain.ladder:
        before, after = student(chain, width), student(again, width)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[tensor], after[tensor]) for tensor in before)


# --- the ONNX file


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EVERY)
def test_onnxruntime_answers_as_torch_does(name: str, mode: str) -> None:
    kept = stored(name, mode)
    chain, images = kept.chain, some_images(kept.chain, 6)
    assert len(chain.ladder) >= 4
    for width in chain.ladder:
        module, model = load_student(chain, width), write(kept, width)
        onnx.checker.check_model(model, full_check=True)
        for batch in (images[:1], images[1:]):
            with torch.inference_mode():
                native = module.embed(torch.from_numpy(batch)).numpy()
            assert np.abs(answer(model, batch) - unit(native[:, chain.lift(width)])).max() <= 1e-4, width


@pytest.mark.parametrize("name", EVERY)
def test_slices_and_norms_of_their_own_are_served_as_torch_has_them(name: str) -> None:
    kept = load(dump(with_own_norms(contract_chain(name, merged_share=0.5))))
    width, images = kept.chain.ladder[1], some_images(kept.chain, 2)
    with torch.inference_mode():
        native = load_student(kept.chain, width).embed(torch.from_numpy(images)).numpy()
    if native.shape[1] == kept.chain.embedding_dim:  # as long as the teacher's: served in the teacher's order
        native = native[:, kept.chain.lift(width)]
    made = answer(write(kept, width, EmitOptions(embedding="native")), images)
    assert np.abs(made - unit(native)).max() <= 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_every_opset_is_valid_and_answers_alike(name: str) -> None:
    kept = stored(name)
    width, images = kept.chain.ladder[1], some_images(kept.chain, 2)
    expected = answer(write(kept, width), images)
    for opset in OPSETS:
        model = write(kept, width, EmitOptions(opset=opset))
        onnx.checker.check_model(model, full_check=True)
        assert np.abs(answer(model, images) - expected).max() <= 1e-5, opset


@pytest.mark.parametrize("name", EVERY)
def test_raw_pixels_are_prepared_in_the_graph(name: str) -> None:
    kept = stored(name)
    chain, width = kept.chain, kept.chain.ladder[1]
    pixels = np.random.default_rng(1).integers(0, 256, (2, chain.input.height, chain.input.width, 3), dtype=np.uint8)
    mean, std = np.float32(chain.input.mean), np.float32(chain.input.std)
    by_caller = ((pixels / np.float32(255) - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    made = answer(write(kept, width, EmitOptions(preprocess="in-graph")), pixels)
    np.testing.assert_allclose(made, answer(write(kept, width), by_caller), atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_any_range_of_the_file_is_that_range(name: str) -> None:
    planned = plan(stored(name), stored(name).chain.ladder[-2])
    whole = b"".join(planned.chunks())
    assert len(whole) == planned.total_bytes
    generator = np.random.default_rng(0)
    for _ in range(20):
        start, stop = sorted(generator.integers(0, len(whole) + 1, 2).tolist())
        assert b"".join(planned.chunks(start, stop)) == whole[start:stop]


@pytest.mark.parametrize("name", EVERY)
def test_a_weight_that_overflows_once_it_is_merged_is_found(name: str) -> None:
    kept = stored(name)
    require_finite(kept, kept.chain.ladder[0])
    huge = {tensor: values if values.ndim == 1 else values * 0 + 3e38 for tensor, values in kept.chain.tensors.items()}
    with pytest.raises(ChainMismatch, match="overflows"):
        require_finite(replace(kept, chain=replace(kept.chain, tensors=huge)), kept.chain.ladder[0])


# --- costs


def graph_macs(model: bytes) -> int:
    """Multiply-adds of an ONNX file at batch 1: convolutions, linears and products, from its own inferred shapes."""
    parsed = onnx.load_from_string(model)
    for value in (*parsed.graph.input, *parsed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    parsed = onnx.shape_inference.infer_shapes(parsed, strict_mode=True, data_prop=True)
    values = (*parsed.graph.value_info, *parsed.graph.input, *parsed.graph.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    shapes |= {constant.name: list(constant.dims) for constant in parsed.graph.initializer}
    macs = 0
    for node in parsed.graph.node:
        if node.op_type == "Conv":
            macs += int(np.prod(shapes[node.output[0]])) * int(np.prod(shapes[node.input[1]][1:]))
        elif node.op_type in ("MatMul", "Gemm"):
            macs += int(np.prod(shapes[node.output[0]])) * shapes[node.input[0]][-1]
    return macs


def graph_params(model: bytes) -> int:
    constants = onnx.load_from_string(model).graph.initializer
    return sum(int(np.prod(constant.dims)) for constant in constants if constant.data_type == TensorProto.FLOAT)


@pytest.mark.parametrize("name", EVERY)
def test_costs_are_a_count_over_the_emitted_graph(name: str) -> None:
    kept = stored(name)
    for width in kept.chain.ladder:
        planned = plan(kept, width)
        model = b"".join(planned.chunks())
        assert planned.costs.macs == graph_macs(model)
        assert planned.costs.params == graph_params(model)
        assert planned.costs.artifact_bytes == len(model)


@pytest.mark.parametrize("name", EVERY)
def test_macs_are_those_torch_counts(name: str) -> None:
    chain = stored(name).chain
    for width in (chain.ladder[0], chain.teacher):
        model = ReIDModel(name, width).eval()
        # of fused attention on a CPU torch counts nothing
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, chain.input.height, chain.input.width))
        assert counter.get_total_flops() == 2 * count_macs(chain.table, width, chain.input)


@pytest.mark.parametrize("name", EVERY)
def test_every_cost_rises_with_width(name: str) -> None:
    chain = stored(name).chain
    table, spec = chain.table, chain.input
    costs = [
        (count_macs(table, w, spec), count_params(table, w), plan(stored(name), w).total_bytes) for w in chain.ladder
    ]
    for narrow, wide in pairwise(costs):
        assert all(low < high for low, high in zip(narrow, wide, strict=True))
    peaks = [peak_activation_bytes(table, width, spec) for width in chain.ladder]
    assert peaks == sorted(peaks)
