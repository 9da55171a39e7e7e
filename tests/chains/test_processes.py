"""Training runs that are killed, and runs shared out among processes: real programs, real SIGKILL, real torchrun."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from chains.errors import DataError
from chains.processes import Processes, joined, local_device
from chains.train import Progress
from tests.chains.worker import an_objective, train

ROOT = Path(__file__).parents[2]
STEPS = 50
SHARED, TWO = (f"--steps={STEPS}", "--micro-batches=2"), ("--nproc-per-node=2",)


def run_worker(folder: Path, *arguments: str, torchrun: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run `worker.py` as a program of its own, under torchrun where options of it are given."""
    start = ["-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else []
    command = [sys.executable, *start, str(Path(__file__).with_name("worker.py")), str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, counters of batches aside: each process counts its own."""
    kept = [name for name, tensor in one.items() if tensor.is_floating_point()]
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in kept)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of `alone` and `nested`, two micro-batches of 32 images a step."""
    folder = tmp_path_factory.mktemp("shared")
    done = run_worker(folder, "alone", "nested", *SHARED, torchrun=TWO)
    assert done.returncode == 0, done.stderr
    return folder


class BrokenOff(Exception):
    """Ends a training from within."""


def break_off(progress: Progress) -> None:
    if progress.step == 5:
        raise BrokenOff


def require_same_after_resuming(name: str, checkpoint: Path) -> None:
    """A run of 8 steps that ended after its fifth goes on behind its checkpoint, and ends as one in a single go."""
    steps: list[int] = []
    resumed = train(an_objective(name), 8, checkpoint=checkpoint, report=lambda p: steps.append(p.step))
    assert steps == [4, 5, 6, 7, 8]
    assert same(resumed, train(an_objective(name), 8))


def test_a_run_killed_and_resumed_ends_with_the_very_same_bits(tmp_path: Path) -> None:
    killed = run_worker(tmp_path, "alone", "--steps=8", "--kill-at=5")
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "alone").exists()
    require_same_after_resuming("alone", tmp_path / "alone.checkpoint")


@pytest.mark.parametrize("name", ["nested", "oskt"])
def test_a_refinement_broken_off_and_resumed_ends_with_the_very_same_bits(name: str, tmp_path: Path) -> None:
    """Without a process of its own; `test_cli` kills one in the middle of a refinement."""
    with pytest.raises(BrokenOff):
        train(an_objective(name), 8, checkpoint=tmp_path / "checkpoint", report=break_off)
    require_same_after_resuming(name, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["alone", "nested"])
def test_two_processes_equal_one_that_accumulates(name: str, shared: Path) -> None:
    """Two processes × 32 images against one that accumulates 2 × 32; running statistics and centers included."""
    accumulated, two = train(an_objective(name), STEPS, micro_batches=2), load_file(shared / name)
    assert two.keys() == accumulated.keys()
    for key, tensor in accumulated.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=0)


def test_two_processes_resume_after_the_first_was_killed(shared: Path, tmp_path: Path) -> None:
    assert run_worker(tmp_path, "alone", *SHARED, "--kill-at=20", torchrun=TWO).returncode != 0
    assert not (tmp_path / "alone").exists()
    finished = run_worker(tmp_path, "alone", *SHARED, torchrun=TWO)
    assert finished.returncode == 0, finished.stderr
    assert same(load_file(tmp_path / "alone"), load_file(shared / "alone"))


def test_micro_batches_are_shared_out_evenly_or_not_at_all() -> None:
    assert [list(Processes(rank, 2).share(4)) for rank in (0, 1)] == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="3 micro-batches a step cannot be shared out among 2 processes"):
        Processes(0, 2).share(3)


def test_without_torchrun_a_process_is_alone() -> None:
    with joined("cpu") as team:
        assert (team.rank, team.count, team.is_first) == (0, 1, True)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(DataError, match="'cpu' or 'cuda', not 'tpu'"):
        local_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="torch finds no GPU"):
        local_device("cuda")
