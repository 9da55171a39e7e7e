"""The inner widths of ResNet blocks, which a compression prunes: as data, without torch. `chains.compress.units` says
what the pruners A and B are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from chains.arch import Architecture
from chains.architectures.resnet import BOTTLENECK, settings
from chains.errors import ArchitectureError
from chains.nodes import Channels, Conv

_CONV = re.compile(r"(?P<block>layer[1-4]\.[0-9]+)\.conv2")


@dataclass(frozen=True)
class Unit:
    """The pruners of one block. entering: the groups of A's columns; leaving: those of B's rows, none without a B."""

    block: str
    entering: Channels
    leaving: Channels


def units_of(table: Architecture) -> tuple[Unit, ...]:
    """The units of a ResNet, in order. Raises `ArchitectureError` for another network."""
    try:
        has_two = settings(table.name).block is BOTTLENECK
    except ArchitectureError as error:
        raise ArchitectureError(
            f"compression prunes the inner widths of ResNet blocks, and {table.name} is no ResNet"
        ) from error
    found = ((_CONV.fullmatch(node.name), node) for node in table.nodes if isinstance(node, Conv))
    return tuple(
        Unit(match["block"], node.columns or (), node.rows if has_two else ()) for match, node in found if match
    )


def prunable(table: Architecture) -> tuple[str, ...]:
    """The groups that a compression may prune. Raises as `units_of`."""
    return tuple(group for unit in units_of(table) for group in (*unit.entering, *unit.leaving))
