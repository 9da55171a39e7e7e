"""Which layout a folder has, and the call that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chains.data.readers.dataset import DataSet, ReadOptions
from chains.data.readers.folder import read_folder, why_not_folder
from chains.data.readers.market1501 import read_cuhk03, read_market1501, why_not_cuhk03, why_not_market1501
from chains.data.readers.msmt17 import read_msmt17, why_not_msmt17
from chains.data.readers.table import read_table, why_not_table
from chains.data.readers.viper import read_viper, why_not_viper
from chains.errors import DataError


@dataclass(frozen=True)
class Layout:
    """why_not: what a path lacks to be this layout, None when it has all; read: the reader."""

    why_not: Callable[[Path], str | None]
    read: Callable[[Path, ReadOptions], DataSet]


# The order is that of `detect`: a layout whose folders another would take for identities comes first.
LAYOUTS: dict[str, Layout] = {
    "market1501": Layout(why_not_market1501, read_market1501),
    "cuhk03-np": Layout(why_not_cuhk03, read_cuhk03),
    "msmt17": Layout(why_not_msmt17, read_msmt17),
    "viper": Layout(why_not_viper, read_viper),
    "csv": Layout(why_not_table, read_table),
    "folder": Layout(why_not_folder, read_folder),
}
KINDS = tuple(LAYOUTS)


@dataclass(frozen=True)
class Detection:
    """kind: the layout found; why_not: for each layout tried before it, what was missing."""

    kind: str
    why_not: Mapping[str, str]


def detect(root: Path) -> Detection:
    """The first layout that `root` has. Raises `DataError` with the reason for each when there is none, and with the
    name of a folder below that has one."""
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: there is no such file or folder")
    reasons: dict[str, str] = {}
    for kind in KINDS:
        reason = _why_not(kind, root)
        if reason is None:
            return Detection(kind, reasons)
        reasons[kind] = reason
    raise DataError(f"{root}: no known layout{_hint(root)}; " + "; ".join(f"{k}: {why}" for k, why in reasons.items()))


def read(kind: str | None, root: Path, options: ReadOptions | None = None) -> DataSet:
    """Read a data set of one of `KINDS`; None: of the layout that `detect` finds. No image is opened."""
    root = Path(root)
    if kind is None:
        kind = detect(root).kind
    if kind not in LAYOUTS:
        raise DataError(f"no data set layout is called {kind!r}; there are {', '.join(KINDS)}")
    return LAYOUTS[kind].read(root, options or ReadOptions())


def _why_not(kind: str, root: Path) -> str | None:
    if root.is_dir() == (kind == "csv"):
        return "this is a folder" if root.is_dir() else "this is a file"
    return LAYOUTS[kind].why_not(root)


def _hint(root: Path) -> str:
    """Archives often hold the data set one folder down."""
    below = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for path in below:
        for kind in KINDS:
            if kind != "folder" and _why_not(kind, path) is None:
                return f" (but {path} looks like {kind}: give that)"
    return ""
