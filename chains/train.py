"""The training engine: one loop for every objective, and a network trained alone by it.

An `Objective` says what is trained and which losses a batch has; `fit` does the rest: schedule, mixed precision,
accumulation, several processes, checkpoints, validation, progress. A run is a function of (objective, images, recipe,
seed): a run that was killed and resumed ends with the very parameters of an uninterrupted one on the same machine with
the same number of threads, and how many processes share the work changes rounding only.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chains.chain import InputSpec
from chains.checkpoint import load_checkpoint, save_checkpoint
from chains.compatible import Anchor, AnchorLoss
from chains.data.batches import Batch, BatchRecipe, Sampler, prefetch
from chains.data.images import Images
from chains.errors import DataError, WidthError
from chains.losses import CENTER_RATE, LossRecipe, ReIDLoss, distillation_loss
from chains.model import ReIDModel, normalise
from chains.processes import Processes, local_device, processes
from chains.width import Width

Precision = Literal["float32", "bfloat16", "float16"]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WARMUP_START = 0.01  # of the full rate, in the schedule "steps"
MAX_SKIPPED = 20  # float16 steps in a row that overflow before a run counts as diverged
PACE_MEMORY = 0.9  # of the moving average over step times


@dataclass(frozen=True)
class TrainRecipe:
    """How long and how fast: Adam with warm-up, then a schedule. It decides the result; how it is run is a `Run`.

    steps: of the optimiser. clip_norm: largest gradient norm; None: not clipped. precision: of the networks' forward
    passes; logits, losses, weights and updates are always float32. micro_batches: batches of `batch.size` per step,
    their losses averaged; processes and accumulation share them out.
    schedule: "cosine" falls to zero; "steps" multiplies by `factor` at every milestone (a step, counted from 0) and
    warms up from 1 % of `lr`. epoch: steps of an epoch; where given, "steps" moves the rate at the start of an epoch
    only, to where it is after it, as schedules written in epochs do.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 5e-4
    warmup_steps: int = 100
    clip_norm: float | None = 5.0
    precision: Precision = "float32"
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    micro_batches: int = 1
    schedule: Literal["cosine", "steps"] = "cosine"
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.micro_batches < 1 or self.warmup_steps < 0 or self.epoch < 0:
            raise DataError(
                f"a recipe has at least one step and one micro-batch, and no negative warm-up or epoch, not "
                f"steps={self.steps}, micro_batches={self.micro_batches}, warmup_steps={self.warmup_steps}, "
                f"epoch={self.epoch}"
            )
        sound = 0 <= self.lr < math.inf and 0 <= self.weight_decay < math.inf and 0 < self.factor <= 1
        if not sound or (self.clip_norm is not None and not self.clip_norm > 0):
            raise DataError(
                f"a recipe has no negative lr or weight_decay, a clip_norm above 0 and a factor in 0..1, not "
                f"lr={self.lr}, clip_norm={self.clip_norm}, weight_decay={self.weight_decay}, factor={self.factor}"
            )
        if list(self.milestones) != sorted(set(self.milestones)) or (self.milestones and self.schedule != "steps"):
            raise DataError(f"milestones {self.milestones} must rise, and go with schedule 'steps'")

    def rate(self, step: int) -> float:
        """Learning rate at `step`, counted from 0."""
        return self.lr * (self._cosine(step) if self.schedule == "cosine" else self._stairs(step))

    def _cosine(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def _stairs(self, step: int) -> float:
        at = (step // self.epoch + 1) * self.epoch if self.epoch else step
        warmth = min(1.0, at / self.warmup_steps) if self.warmup_steps else 1.0
        decay: float = self.factor ** bisect_right(self.milestones, at)
        return (WARMUP_START * (1 - warmth) + warmth) * decay

    @property
    def step_images(self) -> int:
        """Images of one step."""
        return self.micro_batches * self.batch.size

    @property
    def images(self) -> int:
        """Images seen, counting repeats."""
        return self.steps * self.step_images


PAPER_EPOCHS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "teacher": (200, (40, 70, 130)),
    "refine": (100, (50, 70)),
    "finetune": (100, (40, 70, 90)),
}
"""Epochs and milestones of OSKT's ResNets, from the scripts of the authors' code (`OSKT_CNN/run_*.sh`)."""


def paper_recipe(images: Images, stage: Literal["teacher", "refine", "finetune"]) -> TrainRecipe:
    """The schedule of OSKT (ICCV 2025) for ResNets, on a training set of any size: Adam 3.5e-4, weight decay 5e-4, no
    clipping, 10 epochs of warm-up, × 0.1 at the milestones, 16 identities × 4 images, pad 10, random erasing 0.5.

    Epochs become steps by `epoch_steps`. As in the authors' code the rate is constant inside an epoch, is 0.109 of the
    full one in the first, full from the tenth on, and falls at the start of the epoch whose number is a milestone.
    """
    epochs, milestones = PAPER_EPOCHS[stage]
    batch = BatchRecipe(16, 4, pad=10, erasing=0.5, erased_area=0.4, erased_aspect=1 / 0.3)
    epoch = epoch_steps(images, batch)
    return TrainRecipe(
        steps=epochs * epoch,
        lr=3.5e-4,
        weight_decay=5e-4,
        warmup_steps=10 * epoch,
        clip_norm=None,
        batch=batch,
        schedule="steps",
        milestones=tuple(milestone * epoch for milestone in milestones),
        epoch=epoch,
    )


def epoch_steps(images: Images, batch: BatchRecipe) -> int:
    """Batches in an epoch of `images`, as the PK sampler of "bag of tricks" and OSKT counts them: an identity of n
    images gives max(n, K) rounded down to whole groups of K, and a batch takes P groups. At least one. (Their sampler
    ends an epoch when fewer than P identities have groups left, so that it may yield somewhat fewer than it counts.)"""
    _, counts = np.unique(images.pids, return_counts=True)
    groups = int((np.maximum(counts, batch.images_per_identity) // batch.images_per_identity).sum())
    return max(1, groups // batch.identities)


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    step: steps done, 0 before the first. losses: of the last step that was not skipped for an overflow in float16,
    means over its micro-batches. metrics: what validation has just measured, empty in between. eta_s: of the training
    steps that are left.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    learning_rate: float
    seconds_per_step: float
    eta_s: float
    images_per_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[Progress], None]


def every(steps: int, sink: Callable[[str], None]) -> Report:
    """A report that writes one line every `steps` steps, at the last one, and whenever there are metrics."""

    def report(progress: Progress) -> None:
        if progress.metrics or progress.step == progress.steps or (progress.step and progress.step % steps == 0):
            sink(line_of(progress))

    return report


def line_of(progress: Progress) -> str:
    """`step 20/100: loss 6.102, lr 1e-03, 91 images/s, 56 s to go; map 31.20`."""
    words = [f"{name} {value:.3f}" for name, value in progress.losses.items()]
    if progress.step:
        words += [f"lr {progress.learning_rate:.2g}", f"{progress.images_per_s:.0f} images/s"]
        words += [f"{_duration(progress.eta_s)} to go"]
    measured = ", ".join(f"{name} {value:.2f}" for name, value in progress.metrics.items())
    texts = [text for text in (", ".join(words), measured) if text]
    return f"step {progress.step}/{progress.steps}: " + "; ".join(texts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class Run:
    """How a training is run; nothing here changes what it computes, save the rounding of another device.

    device: "cpu" or "cuda". report: called after every step and validation, in the first process only.
    checkpoint: the file to write every `checkpoint_steps` steps and at the end, and to resume from where it exists.
    validate_steps: how often a `validate` callback runs, besides once at the start and once at the end.
    """

    device: str = "cpu"
    report: Report | None = None
    checkpoint: Path | None = None
    checkpoint_steps: int = 500
    validate_steps: int = 1000

    def __post_init__(self) -> None:
        if self.checkpoint_steps < 1 or self.validate_steps < 1:
            raise DataError(
                f"checkpoint_steps {self.checkpoint_steps} and validate_steps {self.validate_steps} must be at least 1"
            )


class Objective(nn.Module, ABC):
    """What is trained: parameters, and the losses of one micro-batch.

    A subclass keeps every trained tensor as a parameter (each takes part in every `forward`, if only times zero), does
    all of a step's passes inside one `forward`, and draws random choices from its own seed and `step`, never from
    torch's generator: then several processes and resumed runs agree. Networks run under `self.autocast(...)`; logits
    and losses outside it, in float32.
    """

    precision: Precision = "float32"
    descent: float = 1.0  # see `by_descent`

    @abstractmethod
    def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """Scalar losses by name; their sum is minimised. pixels: normalised float32 (batch, 3, H, W); labels: int64
        (batch,), position of the identity in the sorted list of pids; step: counted from 0, the same for every
        micro-batch of a step."""

    def settings(self) -> Mapping[str, Any]:
        """What decides the run but is not in the tensors, as JSON values: part of what a checkpoint is checked by."""
        return {}

    def idle(self, step: int) -> Iterable[nn.Parameter]:  # noqa: ARG002
        """Parameters that `step` has no use for. The optimiser leaves them alone: Adam would otherwise go on moving
        them by old momentum and weight decay."""
        return ()

    def autocast(self, device: torch.device) -> torch.autocast:
        """Inside, networks compute in the recipe's precision."""
        half = HALVES.get(self.precision)
        return torch.autocast(device.type, dtype=half, enabled=half is not None)

    def by_descent(self) -> list[nn.Parameter]:
        """Parameters that plain SGD moves, at `descent` times the schedule's rate: those whose steps shall be as long
        as their gradients are, which Adam would even out."""
        return []

    def after_step(self, rate: float) -> None:
        """Called after every step that moved the parameters, in every process, where it must do the same; `rate`: the
        schedule's, of that step. For what is no descent, such as a proximal step on some of `by_descent`."""

    def centers(self) -> list[nn.Parameter]:
        """The centers of every center loss; the engine moves them by SGD."""
        losses = (module for module in self.modules() if isinstance(module, ReIDLoss))
        return [loss.centers for loss in losses if loss.centers is not None]


def fit(
    objective: Objective,
    images: Images,
    input: InputSpec,
    recipe: TrainRecipe,
    seed: int,
    run: Run = Run(),
    validate: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Train `objective` in place and leave it on the run's device.

    Batches are a function of the seed. `validate` may put modules into eval mode but must change no tensor; it runs
    before the first step too, so that a broken evaluation fails in the first minute. Under `chains.processes.joined`
    the micro-batches are shared out among the processes; only the first one reports, validates and writes.
    Raises `DataError` as soon as a loss or the gradient is not finite (in float16: after 20 overflows in a row), before
    the step changes anything; when the checkpoint belongs to another run; when the images fill no batch.
    """
    team, device = processes(), local_device(run.device)
    share = team.share(recipe.micro_batches)
    sampler = Sampler(images, recipe.batch, seed)
    description = describe(objective, images, input, recipe, seed)
    trainer = _Trainer(objective.to(device).train(), recipe, team, device)
    start = trainer.resume(run.checkpoint, description)
    watch = _Watch(recipe, run.report if team.is_first else None, start)

    def measure(step: int) -> None:
        if validate is not None:
            if team.is_first:
                watch.metrics(step, validate())
                objective.train()
            team.wait()

    measure(start)
    indices = (step * recipe.micro_batches + index for step in range(start, recipe.steps) for index in share)
    with closing(prefetch(sampler, indices)) as batches:
        for step in range(start, recipe.steps):
            micro_batches = (_on_device(next(batches), input, device) for _ in share)
            watch.step(step, trainer.step(step, micro_batches, len(share)))
            is_last = step + 1 == recipe.steps
            if run.checkpoint is not None and (is_last or (step + 1) % run.checkpoint_steps == 0):
                trainer.save(run.checkpoint, step + 1, description)
            if is_last or (step + 1) % run.validate_steps == 0:
                measure(step + 1)


def require_startable(images: Images, recipe: TrainRecipe, device: str) -> None:
    """Raises the `DataError` that `fit` would at its start, for callers with work to do before: no such device, too few
    identities for a batch, micro-batches that the processes cannot share."""
    local_device(device)
    processes().share(recipe.micro_batches)
    Sampler(images, recipe.batch, seed=0)


def describe(objective: Objective, images: Images, input: InputSpec, recipe: TrainRecipe, seed: int) -> dict[str, Any]:
    """What decides a run's result, as JSON values: two runs that agree in it are the same run."""
    return {
        "objective": {"name": type(objective).__name__, **objective.settings()},
        "start": digest(objective.state_dict()),
        "recipe": asdict(recipe),
        "seed": seed,
        "input": asdict(input),
        "images": {"count": len(images), "pids": hashlib.sha256(images.pids.tobytes()).hexdigest()[:16]},
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes of `tensors`, shortened: an id for messages and comparisons."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def _on_device(batch: Batch, input: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    pixels = normalise(batch.images, input, device).contiguous(memory_format=torch.channels_last)
    return pixels, torch.from_numpy(batch.labels).to(device)


class _Trainer:
    """The optimisers of an objective and their state; the mathematics of one step."""

    def __init__(self, objective: Objective, recipe: TrainRecipe, team: Processes, device: torch.device) -> None:
        self.objective, self.recipe, self.team, self.device = objective, recipe, team, device
        objective.precision = recipe.precision
        centers = objective.centers()
        descending = objective.by_descent()
        others = {id(parameter) for parameter in (*centers, *descending)}
        self.names = {id(parameter): name for name, parameter in objective.named_parameters()}
        self.parameters = [p for p in objective.parameters() if p.requires_grad and id(p) not in others]
        self.adam = torch.optim.Adam(self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        _prime(self.adam)
        self.optimisers: list[torch.optim.Optimizer] = [self.adam]
        if centers:
            self.optimisers.append(torch.optim.SGD(_center_groups(objective)))
        self.clipped = [*self.parameters, *descending]
        self.descent = torch.optim.SGD(descending, lr=recipe.lr) if descending else None
        self.optimisers += [] if self.descent is None else [self.descent]
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.statistics = _RunningStatistics(objective, recipe.micro_batches, team)
        self.skipped = 0
        self.network: nn.Module = objective
        if team.count > 1:
            places = [device] if device.type == "cuda" else None
            self.network = DistributedDataParallel(objective, places, forward_sync_buffers=False)

    def step(self, step: int, micro_batches: Iterator[tuple[Tensor, Tensor]], count: int) -> dict[str, float]:
        """One step on this process's `count` micro-batches. Returns the mean losses over those of all processes."""
        rate = self.recipe.rate(step)
        for group in self.adam.param_groups:
            group["lr"] = rate
        for group in [] if self.descent is None else self.descent.param_groups:
            group["lr"] = self.objective.descent * rate
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        self.statistics.begin()
        sums: dict[str, Tensor] = {}
        for index, (pixels, labels) in enumerate(micro_batches):
            with nullcontext() if index == count - 1 else self._no_sync():
                losses = self.network(pixels, labels, step)
                total = torch.stack(tuple(losses.values())).sum() / count
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            self.statistics.collect()
            sums = {name: sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
        for parameter in self.objective.idle(step):
            parameter.grad = None
        for optimiser in self.optimisers:
            self.scaler.unscale_(optimiser)
        norm = nn.utils.get_total_norm([p.grad for p in self.clipped if p.grad is not None])
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.clipped, self.recipe.clip_norm, norm)
        means = self.team.add(torch.stack(tuple(sums.values())).float()) / self.recipe.micro_batches
        # The step's one wait for a GPU.
        *values, gradient_norm = torch.cat([means, norm.detach().float()[None]]).tolist()
        named = dict(zip(sums, values, strict=True))
        self._update(step, {**named, "gradient norm": gradient_norm})
        return named

    def _update(self, step: int, values: Mapping[str, float]) -> None:
        """Move the parameters unless something in `values` is not finite."""
        broken = next((name for name, value in values.items() if not math.isfinite(value)), None)
        self.skipped = 0 if broken is None else self.skipped + 1
        self.statistics.end(keep=broken is None)
        if broken is None:
            for optimiser in self.optimisers:
                optimiser.step()
            self.objective.after_step(self.recipe.rate(step))
        elif not self.scaler.is_enabled() or self.skipped > MAX_SKIPPED:
            raise DataError(
                f"step {step + 1} of {self.recipe.steps}: {broken} is {values[broken]}. The step changed nothing, and "
                "the last checkpoint is good. Lower the learning rate "
                f"(now {self.recipe.rate(step):.2g}), check the images, or use a wider precision than "
                f"{self.recipe.precision}"
            )
        self.scaler.update()

    def _no_sync(self) -> Any:
        """Gradients of all micro-batches but the last stay in this process."""
        network = self.network
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Every tensor a later step depends on, by name; no copies, save `counters`."""
        state = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        for parameter in self.parameters:
            for key, tensor in self.adam.state[parameter].items():
                state[f"adam.{key}.{self.names[id(parameter)]}"] = tensor
        return {**state, "counters": self._counters()}

    def _counters(self) -> Tensor:
        scaler = self.scaler.state_dict()
        values = [self.skipped, scaler.get("scale", 1.0), scaler.get("_growth_tracker", 0)]
        return torch.tensor(values, dtype=torch.float64)

    def _set_counters(self, counters: Tensor) -> None:
        skipped, scale, growth = counters.tolist()
        self.skipped = int(skipped)
        if self.scaler.is_enabled():
            changed = {"scale": scale, "_growth_tracker": int(growth)}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **changed})

    def save(self, path: Path, step: int, description: Mapping[str, Any]) -> None:
        if self.team.is_first:
            save_checkpoint(path, step, self.state(), description)
        self.team.wait()

    def resume(self, path: Path | None, description: Mapping[str, Any]) -> int:
        """The step to go on with: that of the checkpoint, or 0. The first process reads, the others get it from it."""
        state, step = self.state(), torch.zeros((), dtype=torch.int64)
        if path is not None and self.team.is_first and path.exists():
            step.fill_(load_checkpoint(path, state, description))
        for tensor in (step, *state.values()):
            self.team.take_from_first(tensor, self.device)
        self._set_counters(state["counters"])
        return int(step)


def _prime(adam: torch.optim.Adam) -> None:
    """Give every parameter the state that Adam would make at its first step, so that the run's state has the same
    tensors from start to end."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),  # where the fused kernel wants it
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def _center_groups(objective: Objective) -> list[dict[str, Any]]:
    """The centers move at CENTER_RATE on the unweighted center loss: its weight in the objective is divided out."""
    losses = (module for module in objective.modules() if isinstance(module, ReIDLoss))
    return [
        {"params": [loss.centers], "lr": CENTER_RATE / loss.recipe.center_weight}
        for loss in losses
        if loss.centers is not None
    ]


class _RunningStatistics:
    """Batch norm's running statistics. They move once a step, by the mean over its micro-batches, so that they do not
    depend on how processes share the work; and not at all in a step that is given up."""

    def __init__(self, objective: Objective, micro_batches: int, team: Processes) -> None:
        self.buffers = [buffer for buffer in objective.buffers() if buffer.is_floating_point()]
        self.micro_batches, self.team = micro_batches, team
        self.starts: list[Tensor] = []
        self.sums: list[Tensor] = []

    def begin(self) -> None:
        self.starts = [buffer.clone() for buffer in self.buffers]
        self.sums = [torch.zeros_like(buffer) for buffer in self.buffers]

    def collect(self) -> None:
        """After a micro-batch: note where it moved them, and put them back for the next one."""
        for buffer, start, total in zip(self.buffers, self.starts, self.sums, strict=True):
            total.add_(buffer)
            buffer.copy_(start)

    def end(self, *, keep: bool) -> None:
        if not self.buffers or not keep:
            return
        flat = self.team.add(torch.cat([total.flatten() for total in self.sums])) / self.micro_batches
        for buffer, mean in zip(self.buffers, torch.split(flat, [b.numel() for b in self.buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))


class _Watch:
    """Times the steps and hands progress to the report."""

    def __init__(self, recipe: TrainRecipe, report: Report | None, start: int) -> None:
        self.recipe, self.report = recipe, report
        self.begun, self.pace = time.monotonic(), 0.0
        self.last: dict[str, float] = {}
        self.start = start

    def step(self, step: int, losses: dict[str, float]) -> None:
        now = time.monotonic()
        taken, self.begun = now - self.begun, now
        if all(map(math.isfinite, losses.values())):
            self.last = losses
        self.pace = taken if step == self.start else PACE_MEMORY * self.pace + (1 - PACE_MEMORY) * taken
        self._tell(step + 1, {})

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tell(step, metrics)
        self.begun = time.monotonic()

    def _tell(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.report is None:
            return
        left = (self.recipe.steps - step) * self.pace
        rate = self.recipe.step_images / self.pace if self.pace else 0.0
        learning_rate = self.recipe.rate(max(0, step - 1))
        self.report(Progress(step, self.recipe.steps, self.last, learning_rate, self.pace, left, rate, dict(metrics)))


@dataclass(frozen=True, eq=False)
class Trained:
    """A model and the classifier it was trained with; classifier weight (pids, D)."""

    model: ReIDModel
    classifier: Tensor


@dataclass(frozen=True, eq=False)
class Distillation:
    """Learn from `teacher`, too: `weight` times the loss on its logits softened by `temperature` (Hinton et al., 2015).
    The teacher must have been trained on the same identities."""

    teacher: Trained
    weight: float = 1.0
    temperature: float = 4.0


class Alone(Objective):
    """One network with its classifier: the ReID loss, and where asked for a teacher's logits and an old space."""

    def __init__(
        self,
        model: ReIDModel,
        classifier: nn.Parameter,
        loss: ReIDLoss,
        distillation: Distillation | None = None,
        compatible: Anchor | None = None,
    ) -> None:
        super().__init__()
        self.anchoring = None if compatible is None else AnchorLoss(compatible, classifier.shape)
        self.model, self.classifier, self.loss, self.distillation = model, classifier, loss, distillation
        if distillation is not None:
            if len(distillation.teacher.classifier) != len(classifier):
                raise DataError(
                    f"a teacher of {len(distillation.teacher.classifier)} identities cannot teach {len(classifier)}; "
                    "distil from one that was trained on the same images"
                )
            # In a tuple, so that it is no submodule: it is neither trained nor checkpointed.
            self._teacher = (copy.deepcopy(distillation.teacher.model).eval().requires_grad_(False),)

    def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:  # noqa: ARG002
        with self.autocast(pixels.device):
            feature, embedding = self.model(pixels)
        logits = embedding.float() @ self.classifier.T
        losses = {"loss": self.loss(feature.float(), logits, labels)}
        if self.distillation is not None:
            losses["distillation"] = self.distillation.weight * distillation_loss(
                logits, self._teacher_logits(pixels, self.distillation), self.distillation.temperature
            )
        if self.anchoring is not None:
            losses["compatible"] = self.anchoring(embedding.float(), labels)
        return losses

    @torch.no_grad()
    def _teacher_logits(self, pixels: Tensor, distillation: Distillation) -> Tensor:
        with self.autocast(pixels.device):
            embedding = self._teacher[0].to(pixels.device).embed(pixels)
        return embedding.float() @ distillation.teacher.classifier.to(pixels.device).T

    def settings(self) -> Mapping[str, Any]:
        settings: dict[str, Any] = {"loss": asdict(self.loss.recipe)}
        if self.distillation is not None:
            settings["distillation"] = {
                "weight": self.distillation.weight,
                "temperature": self.distillation.temperature,
                "teacher": digest(self.distillation.teacher.model.state_dict()),
            }
        if self.anchoring is not None:
            settings["compatible"] = self.anchoring.anchor.settings()
        return settings

    def trained(self) -> Trained:
        """The network as it is now, in eval mode; not a copy."""
        return Trained(self.model.eval(), self.classifier.detach())


def train_alone(
    architecture_name: str,
    width: Width,
    images: Images,
    input: InputSpec,
    recipe: TrainRecipe,
    seed: int,
    run: Run = Run(),
    *,
    validate: Callable[[Trained], Mapping[str, float]] | None = None,
    loss: LossRecipe = LossRecipe(),  # noqa: B008 - frozen
    start: ReIDModel | None = None,
    distillation: Distillation | None = None,
    compatible: Anchor | None = None,
) -> Trained:
    """A network of `width` trained on `images`, its initialisation and batches a function of the seed.

    start: the weights to begin with instead of random ones (left as they are); the classifier is always new. Raises
    `WidthError` where they are of another architecture or width. compatible: an old embedding space to be trained into;
    raises `ChainMismatch` where it is of other identities or another length. The result is on the CPU. See `fit` for
    the rest.
    """
    torch.manual_seed(seed)
    model = ReIDModel(architecture_name, width)
    if start is not None:
        model = begun_with(start, model)
    classifier = new_classifier(images, model.backbone.channels)
    generator = torch.Generator().manual_seed(seed)
    reid = ReIDLoss(len(classifier), model.backbone.channels, loss, generator)
    alone = Alone(model, classifier, reid, distillation, compatible)
    fit(alone, images, input, recipe, seed, run, validate and (lambda: validate(alone.trained())))
    return alone.cpu().trained()


def new_classifier(images: Images, embedding_dim: int, generator: torch.Generator | None = None) -> nn.Parameter:
    """A trainable weight (pids, D) near zero, one row per identity of `images`."""
    identities = len(np.unique(images.pids))
    return nn.Parameter(torch.randn(identities, embedding_dim, generator=generator) * 1e-3)


def begun_with(start: ReIDModel, model: ReIDModel) -> ReIDModel:
    """A copy of `start` to be trained in the place of `model`. Raises `WidthError` where it is of another architecture
    or width."""
    if (start.table.name, start.width) != (model.table.name, model.width):
        raise WidthError(
            f"the start is a {start.table.name} of width {start.width}; "
            f"a {model.table.name} of width {model.width} was to be trained"
        )
    model = copy.deepcopy(start).requires_grad_(True)
    model.neck.bias.requires_grad_(False)
    return model
