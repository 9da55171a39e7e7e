"""What the tests of fusions share: small ONNX graphs of somebody else, and partial teachers in files."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from chains.chain import InputSpec
from chains.export import origin, save_trained
from chains.train import Trained


def a_graph(
    path: Path,
    *,
    height: int | None = None,
    width: int | None = None,
    dim: int = 7,
    channels: int = 5,
    has_map: bool = False,
    batch: int | None = None,
    is_half: bool = False,
    stated: tuple[object, object] | None = None,
) -> Path:
    """Conv, ReLU, average, linear; `has_map`: what the ReLU gives is a second output. stated: mean and std in the
    metadata, as JSON."""
    generator = np.random.default_rng(0)
    kind, dtype = (TensorProto.FLOAT16, np.float16) if is_half else (TensorProto.FLOAT, np.float32)
    weights = {
        "kernel": generator.standard_normal((channels, 3, 3, 3)) / 5,
        "linear": generator.standard_normal((channels, dim)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["conv"], strides=[4, 4], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["map"]),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "linear"], ["embedding"]),
    ]
    outputs = [helper.make_tensor_value_info("embedding", kind, [batch or "n", dim])]
    if has_map:
        outputs.insert(0, helper.make_tensor_value_info("map", kind, [batch or "n", channels, "h", "w"]))
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("x", kind, [batch or "n", 3, height or "H", width or "W"])],
        outputs,
        [numpy_helper.from_array(values.astype(dtype), name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if stated is not None:
        helper.set_model_props(
            model, {f"reid.{n}": json.dumps(v) for n, v in zip(("mean", "std"), stated, strict=True)}
        )
    onnx.save(model, str(path))
    return path


def a_file(path: Path, trained: Trained, input: InputSpec) -> Path:
    """A partial teacher as a file of this project."""
    save_trained(trained, origin("teacher", trained.model, input, "Apache-2.0"), path)
    return path
