"""Every error of the weight-chain library.

    ChainsError
    ├── WidthError          a width cannot be read, or is outside what the chain can give
    ├── ArchitectureError   no such architecture
    ├── CutError            a tree or a cut of a channel group is malformed
    ├── ChainMismatch       tensors do not fit the axis table they came with
    ├── ChainFileError      a file is not a chain file this version can trust
    ├── NotCalibrated       a width has no normalisation statistics, so it must not be served
    ├── LimitsError         the stated limits make no sense
    ├── BudgetTooSmall      no width fits the stated limits
    ├── UnsupportedOption   the ONNX writer cannot emit what was asked for
    ├── DataError           images or labels are unusable
    └── WeightsRefused      somebody else's weights cannot be trusted, read or used

Messages are for people: what was wrong, with the number, and what to do. They know no HTTP.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class ChainsError(Exception):
    """Base of all errors raised on purpose by this library."""


class WidthError(ChainsError):
    """A width cannot be read, or is outside what the chain can give."""


class ArchitectureError(ChainsError):
    """No such architecture."""


class CutError(ChainsError):
    """A tree or a cut of a channel group is malformed."""


class ChainMismatch(ChainsError):
    """Tensors do not fit the axis table they came with; the message names the tensor and its group."""


class ChainFileError(ChainsError):
    """A file is not a chain file this version can trust."""


class NotCalibrated(ChainsError):
    """A width has no normalisation statistics in this chain, so a model of it must not be served."""


class LimitsError(ChainsError):
    """The stated limits make no sense."""


class BudgetTooSmall(ChainsError):
    """No width of the chain fits, or nothing that a compression can reach.

    `limit` is the name of the binding limit, `requested` what was asked, `smallest_available` what the narrowest
    student needs, all in the unit that the limit's name carries. `what` does not fit, and what to do about it.
    """

    def __init__(
        self,
        chain: str,
        limit: str,
        requested: int,
        smallest_available: int,
        *,
        what: str = "student of chain",
        advice: str = "refine a narrower chain",
    ) -> None:
        super().__init__(
            f"no {what} '{chain}' fits: the smallest needs {smallest_available:,} "
            f"{limit.removeprefix('max_').replace('_', ' ')}, {limit} allows {requested:,}. "
            f"Raise {limit} or {advice}."
        )
        self.chain = chain
        self.limit = limit
        self.requested = requested
        self.smallest_available = smallest_available
        self._what, self._advice = what, advice

    def __reduce__(self) -> tuple[Any, ...]:
        """By its arguments: raised in a worker process it must reach the one that waits, which is done by pickling."""
        arguments = (self.chain, self.limit, self.requested, self.smallest_available)
        return partial(type(self), what=self._what, advice=self._advice), arguments


class UnsupportedOption(ChainsError):
    """The ONNX writer cannot emit what was asked for."""


class DataError(ChainsError):
    """Images or labels are unusable; the message names the file, array or index."""


class WeightsRefused(ChainsError):
    """Somebody else's weights cannot be trusted, read or used; the message is the reason, for whoever has them."""
