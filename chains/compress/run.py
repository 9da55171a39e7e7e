"""A whole compression as a function: train with pruners, choose, absorb, finetune; then the terminal chain.

    origin = from_teacher(...) | from_student(...)      where it starts and who teaches
    compress(origin, images, input, recipe, limits, …)  the network, and what was kept of it
    terminal_chain(…)                                   as a chain: to calibrate, measure, store, publish, export

A compression is a function of (origin, images, recipe, limits, seed). Its two trainings checkpoint on their own, and
what lies between them is deterministic, so one that was killed and started again ends with the same network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from chains.artifact import StoredChain
from chains.budget import Limits
from chains.chain import STATISTICS, Chain, InputSpec
from chains.classifier import centroid_classifier, labels_of
from chains.compatible import Anchor
from chains.compress.blocks import prunable
from chains.compress.objective import DEAP_BATCH, Compression, DeapRecipe, Tutor
from chains.compress.selection import budget_of, channel_macs, kept_channels
from chains.compress.terminal import terminal
from chains.compress.units import Pruning, settled, with_channels
from chains.cut import Indices, joined_order
from chains.data.images import Images
from chains.evaluate import embed
from chains.export import numpy_state
from chains.finetune import expanded
from chains.model import ReIDModel, load_student
from chains.processes import local_device
from chains.refine import fingerprint
from chains.train import Run, Trained, TrainRecipe, epoch_steps, fit, new_classifier
from chains.width import Width

Stage = Literal["prune", "finetune"]
Tensors = Mapping[str, Tensor]
Once = Callable[[str, Callable[[], Tensors]], Tensors]
"""(name, how it is made) → the tensors, as they were made the first time. What is computed in floating point comes out
otherwise on another kind of machine, and a checkpoint would not know it again."""
EPOCHS = {"prune": 90, "finetune": 15}
FINETUNE_LR = 1e-4


def deap_recipe(images: Images) -> DeapRecipe:
    """The schedule on a training set of any size: 16 identities × 6 images and 90 epochs with 10 of warm-up, as the
    authors', by the engine's Adam at 3.5e-4, then falling as a cosine; 15 epochs at a lower rate without the LASSO."""
    epoch = epoch_steps(images, DEAP_BATCH)
    prune = TrainRecipe(steps=EPOCHS["prune"] * epoch, lr=3.5e-4, warmup_steps=10 * epoch, batch=DEAP_BATCH)
    finetune = replace(prune, steps=EPOCHS["finetune"] * epoch, lr=FINETUNE_LR, warmup_steps=epoch)
    return DeapRecipe(prune, finetune)


@dataclass(frozen=True, eq=False)
class Start:
    """Where a compression starts. name: of the source, for errors. student: the network to be pruned, with its
    statistics; left as it is. order: of its embedding's channels, leaf position → the teacher's own, as of a chain;
    `None`: its own."""

    name: str
    student: ReIDModel
    tutor: Tutor
    order: Indices | None = None


def from_teacher(name: str, teacher: Trained, start: ReIDModel | None = None) -> Start:
    """Compress `teacher` itself. start: whose weights the student begins with, such as ImageNet's, which is the
    paper's way; `None`: the teacher's."""
    return Start(name, teacher.model if start is None else start, Tutor(teacher))


def from_student(stored: StoredChain, width: Width, images: Images, device: str = "cpu") -> Start:
    """Compress the student of a chain at `width`, taught by the chain's full width: expand, then DEAP. The teacher's
    classifier is made of the centroids of `images`. Raises `NotCalibrated` for a width without statistics."""
    chain = stored.chain
    chain.require_calibrated(width)
    teacher = load_student(chain, chain.teacher).to(local_device(device))
    classifier = centroid_classifier(torch.from_numpy(embed(teacher, images, chain.input)), labels_of(images))
    groups = chain.table.embedding_channels
    is_full = width == chain.teacher
    order = joined_order([chain.partitions[group].order for group in groups]) if is_full else None
    lift = chain.cuts(width).of(groups).part_of()
    return Start(chain.name, expanded(chain, width), Tutor(Trained(teacher.cpu(), classifier), lift), order)


@dataclass(frozen=True, eq=False)
class Compressed:
    """What came of it. trained: the terminal network, in eval mode. sizes: of all its groups. vanished: the share of
    the prunable channels whose pruners came to zero by themselves. pruned_to: channels of each prunable group."""

    trained: Trained
    sizes: Mapping[str, int]
    pruned_to: Mapping[str, int]
    vanished: float


def compress(
    start: Start,
    images: Images,
    input: InputSpec,
    recipe: DeapRecipe,
    limits: Limits | None,
    seed: int,
    runs: Callable[[Stage], Run] = lambda _: Run(),
    once: Once = lambda _, make: make(),
    *,
    settling: Images | None = None,
    validate: Callable[[Trained], Mapping[str, float]] | None = None,
    compatible: Anchor | None = None,
) -> Compressed:
    """Compress `start` until `limits` hold; `None`: as far as its pruners vanish.

    runs: how each of the two trainings is run. once: keeps what each starts from, `start` and `pruned`. settling: the
    images that statistics of absorbed norms come from; default: `images`. compatible: an old embedding space to be
    trained into.
    Raises `ArchitectureError` for a network that is no ResNet; `BudgetTooSmall`, before anything is trained, where one
    channel in every inner width is too much; `DataError` where teacher and recipe do not go together; and what
    `chains.train.fit` raises.
    """
    table, width = start.student.table, start.student.width
    budget = budget_of(start.name, table, width, input, limits)
    torch.manual_seed(seed)
    pruning, classifier, tutor = _begun(start, images, once)

    def train(student: Pruning | ReIDModel, stage: Stage) -> Compression:
        objective = Compression(student, classifier, tutor, recipe, compatible, start.order, budget)
        measure = None if validate is None else (lambda: validate(objective.trained()))
        schedule = recipe.prune if stage == "prune" else recipe.finetune
        fit(objective, images, input, schedule, seed, runs(stage), measure)
        objective.cpu()
        return objective

    train(pruning, "prune")
    norms = pruning.norms()
    kept = kept_channels(norms, channel_macs(table, width, input, prunable(table)), budget)
    network = with_channels(pruning.absorbed(), kept)
    pruned = once("pruned", lambda: settled(network, images if settling is None else settling, input).state_dict())
    network.load_state_dict(pruned)
    network.requires_grad_(True)
    network.neck.bias.requires_grad_(False)
    trained = train(network, "finetune").trained()
    every = np.concatenate(list(norms.values()))
    return Compressed(
        trained,
        network.table.group_sizes(width),
        {group: len(channels) for group, channels in kept.items()},
        vanished=float((every == 0).mean()),
    )


def _begun(start: Start, images: Images, once: Once) -> tuple[Pruning, nn.Parameter, Tutor]:
    """What the first training starts from, and the teacher with the classifier that it had then."""
    pruning, teacher = Pruning(start.student), start.tutor.trained
    fresh = new_classifier(images, start.student.backbone.channels).detach()
    tensors = dict(
        once("start", lambda: {**pruning.state_dict(), "classifier": fresh, "teacher_classifier": teacher.classifier})
    )
    classifier = nn.Parameter(tensors.pop("classifier"))
    tutor = replace(start.tutor, trained=Trained(teacher.model, tensors.pop("teacher_classifier")))
    pruning.load_state_dict(tensors)
    return pruning, classifier, tutor


def terminal_chain(
    model: ReIDModel,
    input: InputSpec,
    *,
    name: str,
    license: str,
    provenance: Mapping[str, Any],
    order: Indices | None = None,
) -> Chain:
    """`model` as a terminal chain with the statistics it has, in an embedding space of its own. order: as of `Start`.
    Raises `ChainMismatch` for one that does not fit."""
    state = numpy_state(model)
    tensors = {key: values for key, values in state.items() if key.rpartition(".")[2] not in STATISTICS}
    return terminal(
        model.table,
        model.width,
        state,
        input,
        name=name,
        license=license,
        embedding_space=f"es-{fingerprint(tensors)}",
        provenance=provenance,
        order=order,
    )
