"""Terminal chains: one width, sizes of its own in every layer. And drafts of them, which have costs and no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from chains.arch import Architecture
from chains.chain import STATISTICS, Chain, Floats, InputSpec
from chains.cut import Indices, NestedTree
from chains.width import Width


def terminal(
    table: Architecture,
    width: Width,
    state: Mapping[str, Floats],
    input: InputSpec,
    *,
    name: str,
    license: str,
    embedding_space: str,
    provenance: Mapping[str, Any],
    order: Indices | None = None,
) -> Chain:
    """The network of these tensors and statistics (`state`) as a terminal chain. order: of its embedding's channels,
    leaf position → the teacher's own; `None`: its own. Raises `ChainMismatch` for a network that does not fit."""
    statistics = {key: values for key, values in state.items() if key.rpartition(".")[2] in STATISTICS}
    sizes = table.group_sizes(width)
    partitions = {group: _uncut(np.arange(size, dtype=np.int64)) for group, size in sizes.items()}
    if order is not None:
        partitions[_only(table)] = _uncut(order)
    return Chain(
        name=name,
        architecture=table.name,
        mode="nested",
        teacher=width,
        ladder=(width,),
        input=input,
        embedding_space=embedding_space,
        license=license,
        tensors={key: values for key, values in state.items() if key not in statistics},
        partitions=partitions,
        statistics={width: statistics},
        provenance=provenance,
        sizes=sizes,
    )


def draft(table: Architecture, width: Width, input: InputSpec, name: str) -> Chain:
    """What `terminal` makes of a network whose weights are all zero; they take no memory."""
    zero = np.zeros((), np.float32)
    shapes: dict[str, tuple[int, ...]] = dict(table.tensor_shapes(width))
    for norm, size in table.statistic_sizes(width).items():
        shapes |= {f"{norm}.{kind}": (size,) for kind in STATISTICS}
    state = {key: np.broadcast_to(zero, shape) for key, shape in shapes.items()}
    space = f"es-{'0' * 16}"
    return terminal(table, width, state, input, name=name, license="unknown", embedding_space=space, provenance={})


def _uncut(order: Indices) -> NestedTree:
    return NestedTree(order, np.arange(1, len(order), dtype=np.int64))


def _only(table: Architecture) -> str:
    """The one group that a ResNet's embedding has."""
    (group,) = table.embedding_channels
    return group
