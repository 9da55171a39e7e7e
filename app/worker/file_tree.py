"""The files of a data set on this machine: which they are, and the digest that stands for them.

The digest is the sha256 of what `sha256sum` prints for the files in order of their names' bytes, with two spaces, names
relative to the root, so that anybody can compute it with the usual tools. Only images, lists and tables count, as in
`app.worker.archives`; hidden files do not. Links may lead from one place of the data set to another, never out of it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from app.errors import DatasetRefused
from app.worker.archives import MAX_DEPTH, Limits, check_file_size, checked_name, too_large, too_many, why_not_read


@dataclass(frozen=True)
class TreeFile:
    """name: relative to the root, with `/`; path: where it is read."""

    name: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Tree:
    """The files that count, in order of their names' bytes. left_out: how many others there are, by reason."""

    root: Path
    files: tuple[TreeFile, ...]
    left_out: dict[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def list_tree(root: Path, limits: Limits) -> Tree:
    """The files below `root`. Raises `DatasetRefused` for links that lead out, special files, names that other systems
    could not hold, and more than the limits allow; `OSError` when something cannot be read."""
    real = root.resolve(strict=True)
    if not real.is_dir():
        raise DatasetRefused(f"{root} is no folder; for a table, give the folder that holds it")
    files: list[TreeFile] = []
    left_out: dict[str, int] = {}
    size_bytes = 0
    for seen, (name, path) in enumerate(_walk(root, real, PurePosixPath(), (real,)), start=1):
        if seen > 2 * limits.max_files:  # others may lie beside, but not without end
            raise too_many(limits)
        reason = why_not_read(name)
        if reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        checked_name(name.as_posix())
        file = TreeFile(name.as_posix(), path, path.stat().st_size)
        check_file_size(name, file.size_bytes)
        files.append(file)
        size_bytes += file.size_bytes
        if len(files) > limits.max_files:
            raise too_many(limits)
        if size_bytes > limits.max_bytes:
            raise too_large(limits)
    return Tree(root, tuple(sorted(files, key=lambda file: os.fsencode(file.name))), left_out)


def digest_of(tree: Tree, tick: Callable[[int, int], None] | None = None) -> str:
    """The digest of the files as they are now, 64 hex; `tick` is called with the bytes read and the bytes in all."""
    whole, done, total = hashlib.sha256(), 0, tree.size_bytes
    for file in tree.files:
        whole.update(f"{sha256_of(file.path)}  {file.name}\n".encode())
        done += file.size_bytes
        if tick is not None:
            tick(done, total)
    return whole.hexdigest()


def sha256_of(path: Path) -> str:
    """64 hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(root: Path) -> None:
    """Take the right to write from every file and folder below `root`, and from `root`."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            Path(folder, name).chmod(0o444)
        Path(folder).chmod(0o555)


def remove(root: Path) -> None:
    """Remove a folder with all below it, sealed or not; nothing happens when there is none."""
    for folder, folders, names in os.walk(root):
        Path(folder).chmod(0o755)  # before the walk goes down
        for name in folders:
            if Path(folder, name).is_symlink():
                Path(folder, name).unlink()
        for name in names:
            Path(folder, name).unlink()
    for folder, _, _ in os.walk(root, topdown=False):
        Path(folder).rmdir()


def _walk(
    folder: Path, real_root: Path, name: PurePosixPath, above: tuple[Path, ...]
) -> Iterator[tuple[PurePosixPath, Path]]:
    """Files with their names; hidden folders are not entered. `above`: real folders on the way, against loops."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        child, path = name / entry.name, Path(entry.path)
        if entry.name.startswith("."):
            yield child, path
            continue
        real = _inside(path, real_root, child) if entry.is_symlink() else above[-1] / entry.name
        mode = entry.stat().st_mode
        if stat.S_ISDIR(mode):
            if real in above or len(above) > MAX_DEPTH:
                raise DatasetRefused(f"{child.as_posix()!a} leads back into itself, or is more than {MAX_DEPTH} deep")
            yield from _walk(path, real_root, child, (*above, real))
        elif stat.S_ISREG(mode):
            yield child, path
        else:
            raise DatasetRefused(f"{child.as_posix()!a} is a device, a pipe or another special file")


def _inside(path: Path, real_root: Path, name: PurePosixPath) -> Path:
    """Where a link leads. Raises `DatasetRefused` when that is nowhere, or out of the data set."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise DatasetRefused(f"{name.as_posix()!a} is a link that leads nowhere") from error
    if not real.is_relative_to(real_root):
        raise DatasetRefused(f"{name.as_posix()!a} is a link that leads out of the data set; put a copy there")
    return real
