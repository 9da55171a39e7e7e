"""Files below the root of a data set, and nothing else: a name or a link that leads out of it is refused."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from chains.data.files import SUFFIXES
from chains.errors import DataError

NO_IMAGE = "not an image file by its name"


@dataclass
class Listing:
    """The files below `root`, and the reasons why some of them were left out so far. Names that begin with a dot are
    passed over: file managers leave them behind."""

    root: Path
    left_out: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        if not self.root.is_dir():
            raise DataError(f"{self.root}: there is no such folder")
        self._real_root = self.root.resolve()
        self._known_folders: set[Path] = set()

    def folders(self, name: str = ".") -> list[str]:
        """Names of the folders in a folder, sorted."""
        return sorted(entry.name for entry in self._entries(name) if entry.is_dir())

    def images(self, name: str = ".", may_hold_folders: bool = False) -> Iterator[Path]:
        """Image files directly in a folder, sorted by name; all else there is left out."""
        for entry in sorted(self._entries(name), key=lambda entry: entry.name):
            path = self.root / name / entry.name
            if entry.is_file() and path.suffix.lower() in SUFFIXES:
                yield path
            elif not entry.is_dir():
                self.leave_out(NO_IMAGE, path)
            elif not may_hold_folders:
                self.leave_out("a folder where only images belong", path)

    def file(self, name: str, where: str) -> Path:
        """A file named by a table or list; `where` says which line. Raises `DataError` when the name leads out of the
        root, or to nothing."""
        written = PurePosixPath(name)
        if written.is_absolute() or PureWindowsPath(name).drive or ".." in written.parts or "\0" in name:
            raise DataError(f"{where}: {name!r} leads out of {self.root}; name files relative to it, without '..'")
        path = self.root / written
        if path.parent not in self._known_folders:
            self._check_inside(path.parent)
            self._known_folders.add(path.parent)
        try:
            if path.is_symlink():
                self._check_inside(path)
            is_file = path.is_file()
        except OSError as error:
            raise DataError(f"{where}: {path}: {error.strerror}") from error
        if not is_file:
            hint = "; write folders with /, not \\" if "\\" in name else ""
            raise DataError(f"{where}: there is no file {path}{hint}")
        return path

    def leave_out(self, reason: str, path: Path) -> None:
        self.left_out[reason].append(path)

    def reasons(self) -> dict[str, tuple[Path, ...]]:
        """The files left out so far, by reason."""
        return {reason: tuple(paths) for reason, paths in self.left_out.items()}

    def text(self, name: str) -> str:
        """A text file in UTF-8, with or without byte order mark."""
        path = self.root / name
        self._check_inside(path)
        try:
            return path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error

    def _entries(self, name: str) -> list[os.DirEntry[str]]:
        folder = self.root / name
        self._check_inside(folder)
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed: {error.strerror}") from error
        for entry in entries:
            if entry.is_symlink():
                self._check_inside(Path(entry.path))
        return entries

    def _check_inside(self, path: Path) -> None:
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:  # a link to itself
            raise DataError(f"{path}: cannot be resolved: {error}") from error
        if not target.is_relative_to(self._real_root):
            raise DataError(
                f"{path}: leads to {target}, out of {self.root}; put a copy there, or give the folder that holds both"
            )


def missing(root: Path, folders: Iterable[str] = (), files: Iterable[str] = ()) -> str | None:
    """What of a layout is not there, in words; None when all is."""
    lacking = [f"folder {name}" for name in folders if not (root / name).is_dir()]
    lacking += [f"file {name}" for name in files if not (root / name).is_file()]
    return f"no {' and no '.join(lacking)}" if lacking else None
