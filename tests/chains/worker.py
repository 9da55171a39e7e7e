"""Training runs as a program of its own, so that tests can kill it and share it out among processes.

The state that each objective ends with goes to a file of its name in --folder, beside its checkpoints. --kill-at N ends
the first process by SIGKILL after step N.
"""

import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from chains.data.batches import BatchRecipe
from chains.losses import LossRecipe, ReIDLoss
from chains.model import ReIDModel, numpy_tensors
from chains.nested import NestedRecipe, Sandwich
from chains.oskt import OneShot, cluster
from chains.processes import joined
from chains.train import Alone, Objective, Progress, Report, Run, TrainRecipe, fit, new_classifier
from chains.tree import grow_trees
from chains.width import Width
from tests.chains.toys import INPUT, LADDER, a_teacher, flat_people

PEOPLE = flat_people(identities=16)
WITH_CENTERS = LossRecipe(center_weight=5e-4, hard_factor=0.2)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    objectives = {name: an_objective(name) for name in options.objectives}

    def report(progress: Progress) -> None:
        if progress.step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with joined("cpu") as team:
        for name, objective in objectives.items():
            checkpoint = options.folder / f"{name}.checkpoint"
            state = train(objective, options.steps, options.micro_batches, checkpoint, report)
            if team.is_first:
                save_file(state, options.folder / name)


def train(
    objective: Objective,
    steps: int,
    micro_batches: int = 1,
    checkpoint: Path | None = None,
    report: Report | None = None,
) -> dict[str, Tensor]:
    """The state after training `objective` for `steps`; a checkpoint every three."""
    recipe = TrainRecipe(
        steps,
        lr=3e-3,
        warmup_steps=2,
        batch=BatchRecipe(identities=8, images_per_identity=4),
        micro_batches=micro_batches,
    )
    fit(objective, PEOPLE, INPUT, recipe, 7, Run(report=report, checkpoint=checkpoint, checkpoint_steps=3))
    return objective.state_dict()


def an_objective(name: str) -> Objective:
    """One of the three, always with the same start."""
    torch.manual_seed(0)
    if name == "alone":
        model, classifier = ReIDModel("resnet18", Width(2)), new_classifier(PEOPLE, 16)
        return Alone(model, classifier, ReIDLoss(16, 16, WITH_CENTERS, torch.Generator().manual_seed(0)))
    teacher = replace(a_teacher(), classifier=torch.randn(16, 32) * 1e-3)
    tensors = numpy_tensors(teacher.model)
    if name == "nested":
        return Sandwich(teacher, grow_trees(teacher.model.table, tensors), LADDER, NestedRecipe(), 1)
    return OneShot(teacher, cluster(teacher.model.table, tensors, LADDER[0]), LADDER[0], 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("objectives", choices=["alone", "nested", "oskt"], nargs="+")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--kill-at", type=int, default=-1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
