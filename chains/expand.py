"""The core: from a chain's tensors and a cut per channel group to a student. Rows are averaged, columns are summed.

    W'[i, k] = mean_{i' ∈ rows(i)}  Σ_{k' ∈ parts(k)}  W[i', k']          weights
    v'[i]    = mean_{j ∈ parts(i)} v[j]                                    norm weights and biases
    Q'[i, k] = √(m / N) Σ_{i' ∈ rows(i)}  Σ_{k' ∈ parts(k)}  W[i', k']    queries of an attention, biases too

Queries meet keys in a product over channels, where a channel that stands for several must count as often. So their rows
are summed, not averaged; and because a head of m channels divides its products by √m where the teacher's of N divides
by √N, the factor makes a student with the usual scale attend as the teacher does (methods/oskt.md §4).

With rows stored at teacher resolution this is the nested chain's formula; with one stored row per cluster the mean is
over a single row and it is OSKT's row repeat and column sum (ICCV 2025, §3.3). Functions are pure and the same for
numpy arrays and torch tensors with gradients; this module imports neither torch nor anything that does.

Sums run left to right in leaf order, rows first, then columns, then the division: served bytes depend on it, so the
order is part of the chain format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from chains.arch import Axes
from chains.chain import Chain
from chains.cut import Cuts, Indices, Runs
from chains.errors import ChainMismatch
from chains.nodes import Channels
from chains.width import Width

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", NDArray[np.float32], NDArray[np.float64], "torch.Tensor")


def expand(tensors: Mapping[str, Array], axes: Mapping[str, Axes], cuts: Cuts) -> dict[str, Array]:
    """Every tensor of the student that `cuts` (one per group) describe.

    tensors: name -> conv weight `(out, in, kh, kw)` or norm vector `(out,)`, in leaf order. Returns new tensors of the
    same kind; where nothing is merged it may return the input itself. Raises `ChainMismatch` when a tensor's channels
    are not those of its group.
    """
    return {name: expand_tensor(name, tensors[name], axes[name], cuts) for name in axes}


def expand_tensor(name: str, tensor: Array, axes: Axes, cuts: Cuts) -> Array:
    """One tensor of the student, as in `expand`."""
    cut = cuts.of(axes.rows)
    rows = cut.rows if tensor.ndim > 1 else cut.parts
    _require_channels(name, axes.rows, len(tensor), rows)
    columns = None if axes.columns is None else cuts.of(axes.columns).parts
    if axes.columns is not None and columns is not None:
        _require_channels(name, axes.columns, tensor.shape[1], columns)
    merged = merge(tensor, rows, columns, sums_rows=axes.sums_rows)
    return merged * query_factor(rows) if axes.sums_rows and len(rows) < rows.of else merged


def query_factor(rows: Runs) -> float:
    """√(m / N) of queries of m channels that were merged from N, rounded to float32."""
    return float(np.float32(np.sqrt(len(rows) / rows.of)))


def merge(tensor: Array, rows: Runs, columns: Runs | None = None, *, sums_rows: bool = False) -> Array:
    """Mean (or sum) over runs of rows, sum over runs of columns. A slice of `rows` or of `columns` gives that slice of
    the result, bit for bit.

    >>> merge(
    ...     np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]),
    ...     Runs.between(np.array([0, 2])),
    ...     Runs.between(np.array([0, 1, 3])),
    ... )
    array([[2., 7.]])
    """
    merged = sum_runs(tensor, rows, axis=0)
    if columns is not None:
        merged = sum_runs(merged, columns, axis=1)
    return merged if rows.is_single or sums_rows else merged / _column_of(rows.sizes, merged)


def sum_runs(tensor: Array, runs: Runs, axis: int) -> Array:
    """Sum over each run along `axis` (0 or 1), left to right; a view where nothing is merged.

    Runs are walked longest first: at every step those that still have a channel are the first ones, so that a step is
    one gather and one addition in place.
    """
    lead: Any = (slice(None),) * axis
    if runs.is_plain:
        return tensor[(*lead, slice(int(runs.starts[0]), int(runs.stops[-1])))]
    if runs.is_single:
        return _take(tensor, runs.starts, axis)
    if not isinstance(tensor, np.ndarray):
        return _add_runs(tensor, runs, axis)
    total = _take(tensor, runs.heads, axis)
    for positions in runs.tails:
        longer = total[(*lead, slice(len(positions)))]
        longer += _take(tensor, positions, axis)
    return _take(total, runs.rank, axis)


def _add_runs(tensor: torch.Tensor, runs: Runs, axis: int) -> torch.Tensor:
    """`sum_runs` in one differentiable call, an order of magnitude faster with gradients than step by step. On a CPU it
    adds left to right as well; a GPU picks its own order."""
    first, last = int(runs.starts[0]), int(runs.stops[-1])
    if runs.is_gapless:
        source = tensor[:, first:last] if axis else tensor[first:last]
    else:
        source = _take(tensor, runs.covered, axis)
    run_of = source.new_empty(0).long().new_tensor(np.repeat(np.arange(len(runs)), runs.sizes))
    shape = (*source.shape[:axis], len(runs), *source.shape[axis + 1 :])
    return source.new_zeros(shape).index_add(axis, run_of, source)


def _take(tensor: Array, positions: Indices, axis: int) -> Array:
    """A copy of the channels at `positions` along `axis`. Numpy's `take` is twice as fast as its indexing."""
    if isinstance(tensor, np.ndarray):
        return tensor.take(positions, axis=axis)
    return tensor[:, positions] if axis else tensor[positions]


def _column_of(sizes: NDArray[np.int64], like: Any) -> Any:
    """`sizes` as a column that divides the rows of `like`, in its kind and precision."""
    column = sizes.reshape((-1,) + (1,) * (like.ndim - 1))
    return column.astype(like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(column)


def _require_channels(name: str, channels: Channels, found: int, runs: Runs) -> None:
    if found != runs.of:
        groups = f"its group '{channels[0]}' has" if len(channels) == 1 else f"its {len(channels)} groups have"
        raise ChainMismatch(f"{name} has {found} channels where {groups} {runs.of} in this chain")


def student(chain: Chain, width: Width) -> dict[str, NDArray[np.float32]]:
    """The student of `chain` at `width`: expanded tensors and, under `<norm>.running_mean` and `.running_var`, its
    calibrated statistics. Raises `NotCalibrated` when the width has none."""
    statistics = chain.require_calibrated(width)
    return {**student_weights(chain, width), **statistics}


def student_weights(chain: Chain, width: Width) -> dict[str, NDArray[np.float32]]:
    """The expanded tensors of the student at `width`, with the norms of its own where the chain has them."""
    return {**expand(chain.tensors, chain.axes, chain.cuts(width)), **chain.own_norms.get(width, {})}
