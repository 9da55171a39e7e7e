"""The ONNX writer against onnx.helper, the checker, onnxruntime and the torch module."""

import gc
import hashlib
import json
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from chains import onnxfile, onnxweights
from chains.architectures import architecture
from chains.artifact import StoredChain, canonical_json, dump, load
from chains.chain import Chain, InputSpec
from chains.cut import NestedTree, Partition, SharedClusters
from chains.errors import CutError, NotCalibrated, UnsupportedOption, WidthError
from chains.expand import student
from chains.model import load_student, model_of, normalise
from chains.nodes import Add, Conv, Neck, Pool
from chains.onnxfile import OPSETS, EmitOptions, plan, write
from chains.testing import IMAGENET_MEAN, IMAGENET_STD, as_first_measured, pico_chain, random_statistics, with_own_norms
from chains.tree import in_leaf_order
from chains.width import Width, even_ladder

PLAIN = ("resnet18", "resnet50")  # the contract suite, tests/contracts, holds every architecture to less
MODES = ("nested", "oskt")
WIDTHS = tuple(Width(stem) for stem in range(2, 9))  # all of the pico chain's ladder
EVERY_OPTION = [
    EmitOptions(embedding=embedding, normalize=normalize, preprocess=preprocess)
    for embedding, normalize, preprocess in product(("common", "native"), (True, False), ("none", "in-graph"))
]


@cache
def pico(name: str = "resnet18", mode: str = "nested") -> StoredChain:
    return load(dump(pico_chain(architecture_name=name, mode=mode, rungs=7)))


def arithmetic_chain(name: str, mode: str, stem: int = 8, narrowest: int = 2, rungs: int = 4) -> StoredChain:
    """A chain of integer arithmetic: no random generator and no clustering, whose results may differ by version."""
    table, full = architecture(name), Width(stem)
    ladder = even_ladder(Width(narrowest), full, rungs, alignment=1)
    sizes, least = table.group_sizes(full), table.group_sizes(ladder[0])
    partitions: dict[str, Partition] = {}
    for group, size in sizes.items():
        order = np.arange(size) * 5 % size if size % 5 else np.arange(size)
        clusters = np.full(least[group], size // least[group])
        splits = (np.arange(size - 1) * 7 % (size - 1) if (size - 1) % 7 else np.arange(size - 1)) + 1
        partitions[group] = NestedTree(order, splits) if mode == "nested" else SharedClusters(order, clusters)
    tensors = {}
    for tensor, shape in table.tensor_shapes(full).items():
        rows = partitions[table.axes[tensor].rows[0]].stored_rows if len(shape) > 1 else shape[0]
        tensors[tensor] = fractions((rows, *shape[1:]), modulus=31) + np.float32(tensor.endswith("bn1.weight"))
    statistics = {}
    for width in ladder:
        for norm, channel_count in table.statistic_sizes(width).items():
            channels = (channel_count,)
            statistics.setdefault(width, {})[f"{norm}.running_mean"] = fractions(channels, modulus=13)
            statistics[width][f"{norm}.running_var"] = fractions(channels, modulus=11) ** 2 + np.float32(0.5)
    spec = InputSpec(64, 32, IMAGENET_MEAN, IMAGENET_STD)
    chain = Chain("golden", name, mode, full, ladder, spec, "golden", "Apache-2.0", tensors, partitions, statistics)
    return StoredChain(chain, hashlib.sha256(b"golden").hexdigest(), 0)


def fractions(shape: tuple[int, ...], modulus: int) -> np.ndarray:
    """Numbers below one in size that float32 must round, so that the order of sums shows in the bytes."""
    numbers = np.arange(np.prod(shape)) * 17 % modulus - modulus // 2
    return (numbers / modulus).astype(np.float32).reshape(shape)


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def embeddings(model: bytes, images: np.ndarray) -> np.ndarray:
    return session(model).run(["embedding"], {"images": images})[0]


def some_images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 64, 32), dtype=np.float32)


def metadata_of(model: ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


# --- the same bytes as onnx.helper


def reference_model(stored: StoredChain, width: Width, options: EmitOptions) -> bytes:
    """The model built the usual way, whole and in memory, from the expanded student; metadata is taken as it comes."""
    chain = stored.chain
    folded = folded_student(chain, width)
    is_lifted = options.embedding == "common" or width == chain.teacher
    nodes, constants, first = [], {}, "images"
    if options.preprocess == "in-graph":
        nodes += [
            helper.make_node("Cast", ["images"], ["images.float"], "images.cast", to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["images.float"], ["images.planes"], "images.transpose", perm=[0, 3, 1, 2]),
            helper.make_node("Mul", ["images.planes", "pixels.scale"], ["images.scaled"], "images.scale"),
            helper.make_node("Add", ["images.scaled", "pixels.shift"], ["images.normalised"], "images.shift"),
        ]
        mean, std = (np.array(values, dtype=np.float64) for values in (chain.input.mean, chain.input.std))
        constants["pixels.scale"] = (1 / (255 * std)).astype(np.float32).reshape(1, 3, 1, 1)
        constants["pixels.shift"] = (-mean / std).astype(np.float32).reshape(1, 3, 1, 1)
        first = "images.normalised"
    for node in chain.table.nodes:
        nodes += reference_nodes(node, first, options, is_lifted)
    constants |= folded
    if is_lifted:
        constants["embedding.lift"] = chain.lift(width)
    dim = chain.embedding_dim if is_lifted else len(folded["neck.scale"])
    shape = ["batch", 64, 32, 3] if options.preprocess == "in-graph" else ["batch", 3, 64, 32]
    element = TensorProto.UINT8 if options.preprocess == "in-graph" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        chain.architecture,
        [helper.make_tensor_value_info("images", element, shape)],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", dim])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opset = helper.make_opsetid("", options.opset)
    model = helper.make_model(
        graph,
        opset_imports=[opset],
        producer_name="widthwise",
        producer_version="1",
        ir_version=helper.find_min_ir_version_for([opset]),
    )
    helper.set_model_props(model, metadata_of(onnx.load_from_string(write(stored, width, options))))
    return model.SerializeToString()


def folded_student(chain: Chain, width: Width) -> dict[str, np.ndarray]:
    """The student's weights with batch normalisation folded, by the formula."""
    tensors, folded = student(chain, width), {}
    for node in chain.table.nodes:
        if isinstance(node, Conv | Neck):
            gamma, beta, mean, var = (
                tensors[f"{node.norm}.{kind}"] for kind in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / np.sqrt(var + np.float32(1e-5))
            shift = beta - mean * scale
        if isinstance(node, Conv):
            folded[f"{node.name}.weight"] = tensors[f"{node.name}.weight"] * scale[:, None, None, None]
            folded[f"{node.name}.bias"] = shift
        if isinstance(node, Neck):
            folded |= {"neck.scale": scale, "neck.shift": shift}
    return folded


def reference_nodes(node: Any, first: str, options: EmitOptions, is_lifted: bool) -> list[NodeProto]:
    make = helper.make_node
    if isinstance(node, Conv | Pool):
        side, pad = [node.kernel] * 2, [node.kernel // 2] * 4
        window = {"kernel_shape": side, "pads": pad, "strides": [node.stride] * 2}
    if isinstance(node, Pool):
        return [make("MaxPool", [node.input], [node.output], node.name, **window)]
    if isinstance(node, Add):
        total = f"{node.output}.sum"
        return [
            make("Add", list(node.inputs), [total], node.name),
            make("Relu", [total], [node.output], f"{node.output}.relu"),
        ]
    if isinstance(node, Conv):
        inputs = [first if node.input == "images" else node.input, f"{node.name}.weight", f"{node.name}.bias"]
        if node.activation == "none":
            return [make("Conv", inputs, [node.output], node.name, **window)]
        linear = f"{node.output}.linear"
        return [
            make("Conv", inputs, [linear], node.name, **window),
            make("Relu", [linear], [node.output], f"{node.output}.relu"),
        ]
    steps = [("GlobalAveragePool", []), ("Flatten", []), ("Mul", ["neck.scale"]), ("Add", ["neck.shift"])]
    steps += [("Gather", ["embedding.lift"])] * is_lifted + [("LpNormalization", [])] * options.normalize
    attributes = {"Flatten": {"axis": 1}, "Gather": {"axis": 1}, "LpNormalization": {"axis": 1, "p": 2}}
    values = [node.input, *(f"neck.{operator.lower()}" for operator, _ in steps[:-1]), "embedding"]
    return [
        make(
            operator,
            [values[i], *constants],
            [values[i + 1]],
            f"neck.{operator.lower()}",
            **attributes.get(operator, {}),
        )
        for i, (operator, constants) in enumerate(steps)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PLAIN)
def test_bytes_are_those_of_onnx_helper(name: str, mode: str) -> None:
    stored = pico(name, mode)
    for width in stored.chain.ladder:
        assert write(stored, width) == reference_model(stored, width, EmitOptions())


@pytest.mark.parametrize("options", EVERY_OPTION, ids=str)
def test_bytes_are_those_of_onnx_helper_with_every_option(options: EmitOptions) -> None:
    stored = pico()
    for width, opset in product((Width(3), Width(8)), OPSETS):
        chosen = replace(options, opset=opset)
        assert write(stored, width, chosen) == reference_model(stored, width, chosen)


# --- valid and the same function


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_passes_the_full_check_and_runs(opset: int) -> None:
    for options in EVERY_OPTION:
        model = write(pico(), Width(3), replace(options, opset=opset))
        onnx.checker.check_model(model, full_check=True)
        parsed = onnx.load_from_string(model)
        assert parsed.opset_import[0].version == opset
        assert parsed.ir_version == {11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8}[opset]
        images = some_images(2)
        if options.preprocess == "in-graph":
            images = np.zeros((2, 64, 32, 3), dtype=np.uint8)
        made = embeddings(model, images)
        assert made.shape == (2, 64 if options.embedding == "common" else 24)
        assert np.isfinite(made).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PLAIN)
def test_onnxruntime_agrees_with_the_torch_module(name: str, mode: str) -> None:
    stored, images = pico(name, mode), some_images(8)
    assert len(stored.chain.ladder) >= 6
    for width in stored.chain.ladder:
        module, runtime = load_student(stored.chain, width), session(write(stored, width))
        for batch in (images[:1], images[1:]):
            with torch.inference_mode():
                native = module.embed(torch.from_numpy(batch)).numpy()
            lifted = native[:, stored.chain.lift(width)]
            expected = lifted / np.linalg.norm(lifted, axis=1, keepdims=True)
            made = runtime.run(["embedding"], {"images": batch})[0]
            assert np.abs(made - expected).max() <= 1e-4, f"{width}, batch {len(batch)}"


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_onnxruntime_agrees_for_every_family_of_trees_and_norms_of_their_own(share: float) -> None:
    data = dump(with_own_norms(pico_chain(rungs=7, merged_share=share)))
    stored, images = load(data), some_images(3)
    for width in stored.chain.ladder[:-1]:
        with torch.inference_mode():
            expected = load_student(stored.chain, width).embed(torch.from_numpy(images)).numpy()
        made = embeddings(write(stored, width, EmitOptions(embedding="native", normalize=False)), images)
        np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)  # random weights grow with width
    assert write(stored, stored.chain.ladder[0]) != write(pico(), stored.chain.ladder[0])


def test_native_embeddings_are_the_student_s_own() -> None:
    stored, images, width = pico(), some_images(3), Width(3)
    with torch.inference_mode():
        expected = load_student(stored.chain, width).embed(torch.from_numpy(images)).numpy()
    made = embeddings(write(stored, width, EmitOptions(embedding="native", normalize=False)), images)
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embedding", ["common", "native"])
def test_full_width_answers_in_the_teacher_s_own_channel_order(embedding: Any) -> None:
    stored, images = pico(), some_images(3)
    chain = stored.chain
    leaf_order = {**chain.tensors, **chain.require_calibrated(chain.teacher)}
    back = {group: np.argsort(partition.order) for group, partition in chain.partitions.items()}
    teacher = in_leaf_order(chain.table, leaf_order, back)
    for norm, (group,) in chain.table.batch_norms.items():
        for kind in ("running_mean", "running_var"):
            teacher[f"{norm}.{kind}"] = leaf_order[f"{norm}.{kind}"][back[group]]
    with torch.inference_mode():
        expected = model_of(chain.architecture, chain.teacher, teacher).embed(torch.from_numpy(images)).numpy()
    made = embeddings(write(stored, chain.teacher, EmitOptions(embedding=embedding, normalize=False)), images)
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


def test_in_graph_preprocessing_equals_preprocessing_by_the_caller() -> None:
    stored, width = pico(), Width(5)
    pixels = np.random.default_rng(1).integers(0, 256, (4, 64, 32, 3), dtype=np.uint8)
    by_caller = embeddings(write(stored, width), normalise(pixels, stored.chain.input).numpy())
    in_graph = embeddings(write(stored, width, EmitOptions(preprocess="in-graph")), pixels)
    np.testing.assert_allclose(in_graph, by_caller, atol=1e-5)


def test_normalised_embeddings_have_length_one() -> None:
    lengths = np.linalg.norm(embeddings(write(pico(), Width(4)), some_images(5)), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


# --- costs counted over the emitted file


def graph_macs(model: bytes) -> int:
    """Multiply-adds of the convolutions of an ONNX file at batch 1, from its own inferred shapes."""
    parsed = onnx.shape_inference.infer_shapes(onnx.load_from_string(model), strict_mode=True, data_prop=True)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][1:] for v in parsed.graph.value_info}
    weights = {constant.name: constant.dims for constant in parsed.graph.initializer}
    convs = [node for node in parsed.graph.node if node.op_type == "Conv"]
    return sum(int(np.prod(shapes[conv.output[0]])) * int(np.prod(weights[conv.input[1]][1:])) for conv in convs)


def graph_params(model: bytes) -> int:
    constants = onnx.load_from_string(model).graph.initializer
    return sum(int(np.prod(constant.dims)) for constant in constants if constant.data_type == TensorProto.FLOAT)


@pytest.mark.parametrize("preprocess", ["none", "in-graph"])
@pytest.mark.parametrize("name", PLAIN)
def test_costs_equal_a_count_over_the_emitted_graph(name: str, preprocess: Any) -> None:
    stored = pico(name)
    for width in stored.chain.ladder:
        planned = plan(stored, width, EmitOptions(preprocess=preprocess))
        model = b"".join(planned.chunks())
        assert planned.costs.macs == graph_macs(model)
        assert planned.costs.params == graph_params(model)
        assert planned.costs.artifact_bytes == planned.total_bytes == len(model)


def test_peak_activations_cover_in_graph_preprocessing() -> None:
    """The narrowest student's own peak is below two float images, which preprocessing holds at once."""
    one_image = 4 * 3 * 64 * 32
    assert plan(pico(), Width(2)).costs.peak_activation_bytes < 2 * one_image
    assert plan(pico(), Width(2), EmitOptions(preprocess="in-graph")).costs.peak_activation_bytes == 2 * one_image


# --- streaming


def test_chunks_are_small_and_may_be_kept() -> None:
    planned = plan(arithmetic_chain("resnet50", "nested", stem=16), Width(16))
    kept = list(planned.chunks())
    assert max(map(len, kept)) <= 256 * 1024
    assert b"".join(kept) == b"".join(bytes(chunk) for chunk in planned.chunks())


def test_two_streams_of_one_plan_do_not_disturb_each_other() -> None:
    planned = plan(pico(), Width(7))
    pairs = list(zip(planned.chunks(), planned.chunks(), strict=True))
    assert b"".join(first for first, _ in pairs) == b"".join(second for _, second in pairs) == write(pico(), Width(7))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_range_is_that_part_of_the_file(data: st.DataObject) -> None:
    stored = pico(mode=data.draw(st.sampled_from(MODES)))
    planned = plan(stored, data.draw(st.sampled_from(WIDTHS)))
    whole = b"".join(planned.chunks())
    start = data.draw(st.integers(0, planned.total_bytes))
    stop = data.draw(st.integers(start, planned.total_bytes))
    assert b"".join(planned.chunks(start, stop)) == whole[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (6, 5), (0, 10**9)])
def test_a_range_outside_the_file_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        plan(pico(), Width(4)).chunks(start, stop)


def test_a_range_inside_a_weight_expands_only_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(pico(), Width(8))
    index, weight = next((i, part) for i, part in enumerate(planned.layout.segments) if not isinstance(part, bytes))
    row_bytes = weight.size_bytes // weight.shape[0]
    expanded = []
    merge = onnxweights.merge
    monkeypatch.setattr(onnxweights, "merge", lambda *cut, **how: expanded.append(len(cut[1])) or merge(*cut, **how))
    first = planned.layout.offsets[index] + 2 * row_bytes + 5
    assert len(b"".join(planned.chunks(first, first + row_bytes))) == row_bytes
    assert expanded == [2]  # the last bytes of one row and the first of the next


@pytest.mark.parametrize("stem", [24, 32])
def test_streaming_takes_little_memory_next_to_the_weights(stem: int) -> None:
    stored = arithmetic_chain("resnet50", "nested", stem=32, narrowest=8)
    planned = plan(stored, Width(stem))
    for _ in planned.chunks():
        pass
    tracemalloc.start()
    sent = sum(len(chunk) for chunk in planned.chunks())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sent == planned.total_bytes > 12_000_000
    assert peak < 4_000_000


def test_cached_layouts_keep_no_chain_in_memory() -> None:
    stored = arithmetic_chain("resnet18", "nested")
    weights = weakref.ref(stored.chain.tensors["conv1.weight"])
    plan(stored, Width(4))
    del stored
    gc.collect()
    assert weights() is None


def test_layouts_are_made_once_and_the_oldest_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    lay_out = onnxfile.lay_out
    monkeypatch.setattr(onnxfile, "lay_out", lambda *of: made.append(of[1]) or lay_out(*of))
    layouts = onnxfile.Layouts(kept=2)
    for stem in (2, 3, 2, 4, 2, 3):
        layouts.get(pico(), Width(stem), EmitOptions())
    assert [width.stem for width in made] == [2, 3, 4, 3]


# --- the same bytes everywhere

USUAL = EmitOptions()
PIXELS = EmitOptions(opset=11, preprocess="in-graph")
NATIVE = EmitOptions(embedding="native", normalize=False)
GOLDEN = {
    ("resnet18", "nested", 4, USUAL): "65556dc416ec62613a4b2ca7e10d7228e84e121bdd397b6af016f00bffe1ca57",
    ("resnet18", "nested", 8, PIXELS): "0b1283d620235d566d09e27c1bc4f26c06f65eeaf5289d26d0078879005075ee",
    ("resnet18", "oskt", 6, NATIVE): "60f8b4a2b64a1b79ac02b359c67d5ce659e197e893bca6cc2aa78fc46aabdad6",
    ("resnet50", "nested", 6, USUAL): "6e853820516ecb0c5c1497f900393b0c390f33ced7df2048c20911eb98acbff7",
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_bytes(case: tuple[str, str, int, EmitOptions]) -> None:
    """A change here changes what every recipe gives: raise EMITTER_VERSION (graph, metadata) or the chain's format
    version (order of sums), and say so in the changelog."""
    name, mode, stem, options = case
    model = write(arithmetic_chain(name, mode), Width(stem), options)
    assert hashlib.sha256(model).hexdigest() == GOLDEN[case]


def test_another_process_writes_the_same_bytes_without_torch() -> None:
    script = (
        "import hashlib, sys; from chains.artifact import load; from chains.onnxfile import write;"
        "from chains.width import Width; model = write(load(sys.stdin.buffer.read()), Width(5));"
        "assert not {'torch', 'scipy'} & sys.modules.keys(); print(hashlib.sha256(model).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=dump(pico().chain), capture_output=True, check=True, timeout=120
    )
    assert done.stdout.decode().strip() == hashlib.sha256(write(pico(), Width(5))).hexdigest()


# --- identity


def test_the_recipe_names_all_that_decides_the_bytes() -> None:
    planned = plan(pico(), Width(4), EmitOptions(opset=13, embedding="native", normalize=False, preprocess="in-graph"))
    assert planned.recipe == {
        "chain_digest": pico().digest,
        "width": "4x2-4-8",
        "input": [64, 32],
        "opset": 13,
        "dtype": "float32",
        "embedding": "native",
        "normalize": False,
        "preprocess": "in-graph",
        "emitter_version": 1,
    }
    assert planned.model_id == hashlib.sha256(canonical_json(planned.recipe).encode()).hexdigest()


def test_a_recipe_that_was_handed_out_cannot_change_the_plan() -> None:
    planned = plan(pico(), Width(4))
    planned.recipe["input"].append(3)
    assert planned.recipe["input"] == [64, 32]


def test_every_recipe_has_its_own_id_and_its_own_bytes() -> None:
    plans = [plan(pico(), width, options) for width in (Width(3), Width(8)) for options in EVERY_OPTION]
    assert len({planned.model_id for planned in plans}) == len(plans)
    assert len({b"".join(planned.chunks()) for planned in plans}) == len(plans)


@pytest.mark.parametrize(
    ("width", "start"), [(Width(4), "resnet18_w4_pico_"), (Width(4, (2, 3, 4)), "resnet18_w4x2-3-4_pico_")]
)
def test_file_names_start_with_the_architecture_and_end_with_the_id(width: Width, start: str) -> None:
    chain = pico().chain
    calibrated = replace(chain, statistics={width: random_statistics(chain.table, width)})
    planned = plan(StoredChain(calibrated, "0" * 64, 0), width)
    assert planned.file_name == f"{start}{planned.model_id[:8]}.onnx"


def test_metadata_tells_a_client_what_it_needs() -> None:
    planned = plan(pico(), Width(4))
    parsed = onnx.load_from_string(b"".join(planned.chunks()))
    assert metadata_of(parsed) == {
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
        "reid.input_size": "64x32",
        "reid.mean": "[0.485,0.456,0.406]",
        "reid.std": "[0.229,0.224,0.225]",
        "reid.embedding_dim": "64",
        "reid.embedding_space": "pico-0",
        "reid.distance": "cosine",
        "reid.l2_normalized": "true",
        "reid.threshold_far_1e-2": "0.45",
        "reid.threshold_far_1e-3": "0.459",
        "reid.thresholds": canonical_json({"1e-2": by_gallery_width(0.49), "1e-3": by_gallery_width(0.499)}),
        "widthwise.recipe": canonical_json(planned.recipe),
        "widthwise.chain_digest": pico().digest,
        "widthwise.width": "4x2-4-8",
        "cost.macs": str(planned.costs.macs),
        "license": "Apache-2.0",
    }
    assert (parsed.producer_name, parsed.producer_version) == ("widthwise", "1")
    assert not parsed.doc_string
    assert not any(node.doc_string for node in parsed.graph.node)


def by_gallery_width(narrowest: float) -> dict[str, float]:
    """The made-up cut-offs of the pico chain's third rung: a hundredth lower with each rung of the gallery."""
    return {str(width): round(narrowest - 0.02 - 0.01 * i, 4) for i, width in enumerate(WIDTHS)}


def test_thresholds_that_are_not_known_are_left_out() -> None:
    """The made-up frontier does not know the narrowest against itself."""
    narrowest = metadata(WIDTHS[0])
    assert not [key for key in narrowest if key.startswith("reid.threshold_far")]
    assert json.loads(narrowest["reid.thresholds"])["1e-2"].keys() == {str(width) for width in WIDTHS[1:]}


def test_a_native_embedding_has_no_thresholds_for_they_are_of_the_common_space() -> None:
    def named(width: Width) -> list[str]:
        return [key for key in metadata(width, embedding="native") if key.startswith("reid.threshold")]

    assert named(Width(4)) == []
    assert named(Width(8)) == ["reid.threshold_far_1e-2", "reid.threshold_far_1e-3", "reid.thresholds"]


def test_a_chain_measured_without_thresholds_writes_no_such_keys() -> None:
    """And so a file of the first format version gives the bytes it always gave."""
    chain = pico().chain
    first = load(dump(replace(chain, frontier=as_first_measured(chain.frontier))))
    unmeasured = load(dump(replace(chain, frontier=None)))
    for stored in (first, unmeasured):
        keys = metadata_of(onnx.load_from_string(write(stored, Width(4)))).keys()
        assert not [key for key in keys if key.startswith("reid.threshold")]


def test_the_documentation_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "onnx-file.md").read_text()
    planned = plan(pico(), Width(4), EmitOptions(preprocess="in-graph"))
    parsed = onnx.load_from_string(b"".join(planned.chunks()))
    used = {node.op_type for node in parsed.graph.node}
    assert [word for word in (*metadata_of(parsed), *planned.recipe) if f"`{word}`" not in page] == []
    assert [operator for operator in used if operator not in page] == []


def metadata(width: Width, **options: Any) -> Mapping[str, str]:
    return metadata_of(onnx.load_from_string(write(pico(), width, EmitOptions(**options))))


def test_metadata_of_the_options() -> None:
    narrow = metadata(Width(3), embedding="native", normalize=False)
    assert narrow["reid.embedding_dim"] == "24"
    assert narrow["reid.embedding_space"] == "pico-0/native-3x2-4-8"
    assert narrow["reid.l2_normalized"] == "false"
    assert metadata(Width(8), embedding="native")["reid.embedding_space"] == "pico-0"
    assert metadata(Width(3), preprocess="in-graph")["Image.NominalPixelRange"] == "NominalRange_0_255"


# --- refusals


@pytest.mark.parametrize(
    "options", [{"opset": 10}, {"opset": 19}, {"embedding": "both"}, {"preprocess": "resize"}], ids=str
)
def test_what_cannot_be_emitted_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOption, match=str(next(iter(options.values())))):
        EmitOptions(**options)


def test_a_width_without_statistics_is_refused() -> None:
    with pytest.raises(NotCalibrated, match="4x2-3-4"):
        plan(pico(), Width(4, (2, 3, 4)))


def test_a_width_beyond_the_chain_is_refused() -> None:
    with pytest.raises(WidthError):
        plan(pico(), Width(9))
    with pytest.raises(CutError):
        plan(pico(mode="oskt"), Width(1))


def test_a_file_that_protobuf_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxfile, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(UnsupportedOption, match="10,000"):
        onnxfile.lay_out(pico(), Width(4), EmitOptions())
