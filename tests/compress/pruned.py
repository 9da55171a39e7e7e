"""What the tests of compression share: toy networks, and the terminal chains that pruning leaves."""

from dataclasses import replace

import numpy as np

from chains.architectures import architecture
from chains.chain import Chain
from chains.compress.blocks import prunable
from chains.compress.objective import DeapRecipe
from chains.compress.run import terminal_chain
from chains.compress.units import with_channels
from chains.model import ReIDModel, model_of
from chains.testing import random_statistics, random_tensors
from chains.train import TrainRecipe
from chains.width import Width
from tests.chains.toys import INPUT, RECIPE

WIDTH = Width(4)
SHORT = DeapRecipe(prune=replace(RECIPE, steps=4), finetune=replace(RECIPE, steps=3))


def a_network(name: str, width: Width = WIDTH, seed: int = 0) -> ReIDModel:
    table = architecture(name)
    return model_of(name, width, {**random_tensors(table, width, seed), **random_statistics(table, width, seed)})


def unevenly_pruned(model: ReIDModel) -> ReIDModel:
    """`model` with another number of channels, at least one, in every group that can be pruned: the last ones."""
    sizes = model.table.group_sizes(model.width)
    counts = {group: 1 + 3 * index % sizes[group] for index, group in enumerate(prunable(model.table))}
    return with_channels(model, {group: np.arange(sizes[group])[-count:] for group, count in counts.items()})


def a_terminal_chain(name: str = "resnet18", width: Width = WIDTH) -> Chain:
    model = unevenly_pruned(a_network(name, width))
    return terminal_chain(
        model, INPUT, name="terminal", license="Apache-2.0", provenance={"made_by": "a test", "seed": 0}
    )


def steps(count: int, **fields: float) -> TrainRecipe:
    return replace(RECIPE, steps=count, **fields)  # type: ignore[arg-type]
