"""Which network a file of tensors holds: every scheme is asked, and the one that explains most of the file reads it.

A scheme is anything with `match`; `schemes.Scheme` is one whose names stand in a table. Where two explain a file
equally well, the first in `SCHEMES` wins. The refusal of a file that none explains is the first mismatch of the best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from chains.architectures import architecture_names, is_architecture
from chains.errors import WeightsRefused
from chains.importers import toolkits, vits
from chains.importers.containers import State
from chains.importers.schemes import Match, Recognised
from chains.importers.strangers import stranger

PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile, around everything
SMALLEST_SHARE = 0.5  # of names: below, a file is somebody else's altogether
SHOWN = 4


class Matcher(Protocol):
    """A way to name tensors. toolkit: whose. `match`: how well it explains a file, `None` for one it knows nothing of;
    `stated`: the architecture that the owner stated, to be taken where no tensor says otherwise."""

    @property
    def toolkit(self) -> str: ...

    def match(self, tensors: State, stated: str | None = None) -> Match | None: ...


SCHEMES: tuple[Matcher, ...] = (*toolkits.SCHEMES, *vits.SCHEMES)


def recognise(state: State, stated: str | None = None, own: str | None = None) -> Recognised:
    """The network in these tensors, in eval mode. stated: the architecture that the owner of the file says it is; own:
    that a file of this project says it is. Raises `WeightsRefused` with the reason."""
    tensors = without_wrapping(state)
    if own is not None:
        return _own(tensors, own)
    known = stated if stated is not None and is_architecture(stated) else None
    matches = [match for scheme in SCHEMES if (match := scheme.match(tensors, known)) is not None]
    best = max(matches, key=lambda match: match.rank, default=None)
    if best is None or best.share < SMALLEST_SHARE:
        raise WeightsRefused(_stranger_in(tensors) or _unknown(tensors))
    return best.take()


def without_wrapping(state: State) -> dict[str, Tensor]:
    """The same tensors without what training wrappers put before every name."""
    tensors = dict(state)
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _own(tensors: Mapping[str, Tensor], name: str) -> Recognised:
    if not is_architecture(name):
        raise WeightsRefused(f"the file says it is a {name[:40]}, which this version does not know")
    match = toolkits.own(name).match(tensors)
    if match is None:
        raise WeightsRefused(f"the file says it is a {name}, and has none of its tensors")
    return match.take()


def _stranger_in(tensors: Mapping[str, Tensor]) -> str | None:
    return next((f"{name[:80]}: {why}" for name in tensors if (why := stranger(name))), None)


def _unknown(tensors: Mapping[str, Tensor]) -> str:
    listed = sorted(tensors)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    names = ", ".join(name[:60] for name in listed[:SHOWN])
    known = dict.fromkeys(scheme.toolkit for scheme in SCHEMES)
    return (
        f"the tensors ({names}{more}) are not named as a ResNet's, nor as any other network's that this version reads, "
        f"after {', '.join(known)}: {', '.join(architecture_names())}"
    )
