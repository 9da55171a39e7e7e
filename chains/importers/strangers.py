"""Layers that others' networks have and ours have not, by their names, so that a refusal can say what they are."""

from __future__ import annotations

import re

WHAT_TO_DO = (
    "Export the network to ONNX and register that: frozen, it can be evaluated, though not refined; or train one "
    "without"
)
STRANGERS: tuple[tuple[str, str], ...] = (
    (r"relative_position_bias_table|(^|\.)layers\.\d+\.blocks\.", "a Swin transformer's windows"),
    (r"\.se\.fc\.|\.se_module\.|\.se\.conv_(reduce|expand)\.", "squeeze and excitation"),
    (r"(^|\.)layer0\.conv1\.", "a SENet's stem"),
    (r"^b[123]\.|^b\d+_(head|pool)\.", "a branch of MGN, whose embedding is several embeddings side by side"),
    (r"(^|\.)NL_\d\.", "a non-local block"),
    (r"pool_layer\.p$", "generalised-mean pooling"),
    (r"(^|\.)conv1\.0\.weight$|\.downsample\.2\.", "the deep stem or the pooled shortcuts of ResNet-D"),
    (r"(^|\.)bn1\.weight_IN|layer[12]\.\d+\.IN\.", "IBN-b's instance normalisation"),
    (r"\.conv2\.fc[12]\.|\.conv2\.bn[01]\.", "the split attention of ResNeSt"),
)


def stranger(name: str) -> str | None:
    """Why a network with a tensor of this name cannot be read; `None` for a name that says nothing."""
    what = next((what for pattern, what in STRANGERS if re.search(pattern, name)), None)
    return None if what is None else f"{what}, which no network of this version has. {WHAT_TO_DO}"
