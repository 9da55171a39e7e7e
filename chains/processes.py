"""One training run over several processes, on one machine or many: plain torch.distributed, started by torchrun.

`with joined("cuda"):` around everything that trains makes this process one of the group that torchrun started, or does
nothing where there is none. Code inside asks `processes()`; nobody else reads torchrun's variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from chains.errors import DataError

PATIENCE = timedelta(hours=2)  # how long the others wait while the first process validates; torchrun ends a dead group


@dataclass(frozen=True)
class Processes:
    """A process among those of a run: `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """The one that reports, validates and writes checkpoints."""
        return self.rank == 0

    def share(self, micro_batches: int) -> range:
        """Which of a step's micro-batches are this process's. Raises `DataError` when they cannot be shared evenly."""
        each, rest = divmod(micro_batches, self.count)
        if rest:
            raise DataError(
                f"{micro_batches} micro-batches a step cannot be shared out among {self.count} processes; "
                f"start a number of processes that divides {micro_batches}, or change micro_batches"
            )
        return range(self.rank * each, (self.rank + 1) * each)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def take_from_first(self, tensor: Tensor, device: torch.device) -> None:
        """Overwrite `tensor` with the first process's; it travels by way of `device`, which the group can reach."""
        if self.count > 1:
            copy = tensor.to(device)
            distributed.broadcast(copy, src=0)
            tensor.copy_(copy)


def processes() -> Processes:
    """Where this process stands; alone unless inside `joined` under torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return Processes(distributed.get_rank(), distributed.get_world_size())
    return Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started (gloo for "cpu", nccl for "cuda", a GPU for each) and leave together.

    The barrier before leaving matters: a group that is destroyed while another process still talks can crash it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Processes()
        return
    if device == "cuda":
        _require_gpu()
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield processes()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def local_device(name: str) -> torch.device:
    """The device "cpu" or "cuda" (this process's own GPU). Raises `DataError` for another, or without a GPU."""
    if name not in {"cpu", "cuda"}:
        raise DataError(f"a device is 'cpu' or 'cuda', not '{name}'; under torchrun each process takes its own GPU")
    if name == "cuda":
        _require_gpu()
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise DataError("device 'cuda' was asked for, but torch finds no GPU; install a CUDA build or use 'cpu'")
