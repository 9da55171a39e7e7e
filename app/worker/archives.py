"""Uploaded archives of images, unpacked so that none of them can do harm.

An archive is written by somebody else. It is refused as a whole, with the name of the member and the reason, when a
name leads out of the folder, when two members have one name on a file system that ignores case, when a member is a
link, a device or a hole, when it is encrypted, or when there is more in it than the limits allow. Files that no reader
of data sets reads (other archives, programs, notes) are never written; they are counted.

The one surprise: sizes are counted while bytes come out of the archive and never believed, and the whole may not grow
beyond `MAX_EXPANSION` times the archive. Images are compressed already, so an honest archive stays far below that.

Call this in the sandbox only (`app.worker.inspection`): the standard library parses headers before anybody can look at
them, and memory has a limit there.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, Protocol

from app.errors import DatasetRefused
from chains.data.files import MAX_BYTES, SUFFIXES

READ_SUFFIXES = SUFFIXES | {".txt", ".csv"}  # images, and the lists and tables that name them
MAX_EXPANSION = 50
SLACK_BYTES = 16 * 1024**2  # small archives of text may grow more
MAX_NAME_BYTES = 1024
MAX_DEPTH = 32
CHUNK_BYTES = 256 * 1024
NOT_READ = "not an image, list or table by its name"
HIDDEN = "hidden, or left behind by a file manager"
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})


@dataclass(frozen=True)
class Limits:
    """What a data set may have at most; counted over everything in it, also what is left out."""

    max_files: int
    max_bytes: int


@dataclass(frozen=True)
class Unpacked:
    """What came out of an archive. left_out: members that were not written, by reason."""

    files: int
    size_bytes: int
    left_out: dict[str, int]


class _Source(Protocol):
    """What bytes can be read from."""

    def read(self, size: int = ..., /) -> bytes: ...


def unpack(archive: Path, target: Path, limits: Limits) -> Unpacked:
    """Write the images, lists and tables of a zip, tar or tar.gz below the empty folder `target`.

    Raises `DatasetRefused`; what was written until then stays and is the caller's to remove.
    """
    writer = _Writer(target, limits, archive.stat().st_size)
    with _refusals(), archive.open("rb") as file:
        kind = _kind(file)
        if kind == "zip":
            _unpack_zip(file, writer)
        else:
            _unpack_tar(file, kind == "tar.gz", writer)
    return Unpacked(writer.files, writer.written_bytes, dict(writer.left_out))


def checked_name(name: str) -> PurePosixPath:
    """`name` as a relative path that stays below its folder on every system. Raises `DatasetRefused`."""
    shown = ascii(name[:120])
    if not name.isprintable() or "\\" in name:
        raise DatasetRefused(f"the name {shown} has characters that file names cannot have everywhere")
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).drive:
        raise DatasetRefused(f"the name {shown} is absolute; names are relative to the data set")
    if ".." in path.parts or not path.parts:
        raise DatasetRefused(f"the name {shown} leads out of the data set")
    if len(path.parts) > MAX_DEPTH or len(name.encode()) > MAX_NAME_BYTES:
        raise DatasetRefused(
            f"the name {shown}… is deeper than {MAX_DEPTH} folders or longer than {MAX_NAME_BYTES} bytes"
        )
    return path


def why_not_read(path: PurePosixPath) -> str | None:
    """Why no reader of data sets reads this file, None when one may."""
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return HIDDEN
    return None if path.suffix.lower() in READ_SUFFIXES else NOT_READ


@dataclass
class Names:
    """Names seen so far: `take` refuses the second of two that are one where case or composition does not count."""

    limits: Limits
    _seen: set[str] = field(default_factory=set)

    def take(self, name: str) -> PurePosixPath:
        """Raises `DatasetRefused`."""
        path = checked_name(name)
        key = unicodedata.normalize("NFC", path.as_posix()).casefold()
        if key in self._seen:
            raise DatasetRefused(f"two files are called {path.as_posix()!a} but for upper and lower case")
        self._seen.add(key)
        if len(self._seen) > self.limits.max_files:
            raise too_many(self.limits)
        return path


def too_many(limits: Limits) -> DatasetRefused:
    return DatasetRefused(f"more than {limits.max_files:,} files; raise WIDTHWISE_DATASET_MAX_FILES if that is meant")


def too_large(limits: Limits) -> DatasetRefused:
    return DatasetRefused(
        f"more than {limits.max_bytes:,} bytes unpacked; raise WIDTHWISE_DATASET_MAX_BYTES if that is meant"
    )


def check_file_size(name: PurePosixPath, size_bytes: int) -> None:
    """Raises `DatasetRefused` for a file that is no crop of a person and no list of them."""
    if size_bytes > MAX_BYTES:
        raise DatasetRefused(f"{name.as_posix()!a} has more than {MAX_BYTES:,} bytes; a crop is far smaller")


class _Writer:
    """Writes members below a folder and counts all that comes out of the archive."""

    def __init__(self, target: Path, limits: Limits, archive_bytes: int) -> None:
        self.target = str(target)
        self._limits = limits
        self._names = Names(limits)
        self._most_bytes = MAX_EXPANSION * archive_bytes + SLACK_BYTES
        self._counted_bytes = 0
        self._entries = 0
        self.files = 0
        self.written_bytes = 0
        self.left_out: Counter[str] = Counter()

    def enter(self) -> None:
        """One more entry, of whatever kind. Raises `DatasetRefused` when that are too many."""
        self._entries += 1
        if self._entries > 2 * self._limits.max_files:  # files, and as many folders
            raise too_many(self._limits)

    def wants(self, name: str, announced_bytes: int) -> PurePosixPath | None:
        """The path to write this member to, None when it is left out. Raises `DatasetRefused`."""
        path = self._names.take(name)
        if self.written_bytes + announced_bytes > self._limits.max_bytes:
            raise too_large(self._limits)
        reason = why_not_read(path)
        if reason is not None:
            self.left_out[reason] += 1
            return None
        check_file_size(path, announced_bytes)
        return path

    def write(self, path: PurePosixPath, source: _Source, announced_bytes: int) -> None:
        """Raises `DatasetRefused` when there is another number of bytes than announced, or too many in all."""
        place = Path(self.target, path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        except (FileExistsError, NotADirectoryError) as error:
            raise DatasetRefused(f"{path.as_posix()!a} is a file and a folder at once") from error
        written = 0
        with os.fdopen(handle, "wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                written += len(chunk)
                check_file_size(path, written)
                file.write(chunk)
        if written != announced_bytes:
            raise DatasetRefused(f"{path.as_posix()!a} announces {announced_bytes:,} bytes and has {written:,}")
        self.files += 1
        self.written_bytes += written

    def count(self, size_bytes: int) -> None:
        """Bytes came out of the archive. Raises `DatasetRefused` when that are too many."""
        self._counted_bytes += size_bytes
        if self._counted_bytes > self._most_bytes:
            raise DatasetRefused(
                f"the archive unpacks to more than {MAX_EXPANSION} times its size, which images never do"
            )
        if self._counted_bytes > self._limits.max_bytes + SLACK_BYTES:
            raise too_large(self._limits)


def _kind(file: BinaryIO) -> str:
    head = file.read(512)
    file.seek(0)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if head[:3] == b"\x1f\x8b\x08":
        return "tar.gz"
    if head[257:262] == b"ustar":
        return "tar"
    raise DatasetRefused("the archive is no zip, tar or tar.gz; pack the images as one of these")


def _unpack_zip(file: BinaryIO, writer: _Writer) -> None:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            writer.enter()
            name = member.orig_filename  # `filename` is cut at a NUL
            _check_zip_member(name, member)
            if member.is_dir():
                checked_name(name)
                continue
            path = writer.wants(name, member.file_size)
            if path is not None:
                with archive.open(member) as source:
                    writer.write(path, _Counted(source, writer), member.file_size)


def _check_zip_member(name: str, member: zipfile.ZipInfo) -> None:
    if member.flag_bits & 0x1:
        raise DatasetRefused(f"{name[:120]!a} is encrypted; pack the images without a password")
    if member.compress_type not in _METHODS:
        raise DatasetRefused(f"{name[:120]!a} is packed by another method than deflate")
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DatasetRefused(f"{name[:120]!a} is {_what(mode)}; only files and folders are unpacked")


def _what(mode: int) -> str:
    return "a link" if stat.S_ISLNK(mode) else "a device or another special file"


class _Counted:
    """A stream whose bytes are counted before anybody gets them."""

    def __init__(self, source: _Source, writer: _Writer) -> None:
        self._source = source
        self._writer = writer

    def read(self, size: int = -1) -> bytes:
        chunk = self._source.read(size)
        self._writer.count(len(chunk))
        return chunk


def _unpack_tar(file: BinaryIO, is_gzip: bool, writer: _Writer) -> None:
    # Unpacked by gzip and not by tarfile, so that a header that claims gigabytes is counted before it is in memory.
    stream = _Counted(gzip.GzipFile(fileobj=file) if is_gzip else file, writer)
    with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members = []  # tarfile would keep them all
            writer.enter()
            _unpack_tar_member(archive, member, writer)


def _unpack_tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo, writer: _Writer) -> None:
    shown = ascii(member.name[:120])
    if member.issym() or member.islnk():
        raise DatasetRefused(f"{shown} is a link; only files and folders are unpacked")
    if member.isdir():
        if member.name not in (".", "./"):  # how `tar -C folder .` begins
            checked_name(member.name)
        return
    if not member.isreg() or member.issparse():
        raise DatasetRefused(
            f"{shown} is a device, a hole or another special file; only files and folders are unpacked"
        )
    path = writer.wants(member.name, member.size)
    if path is None:
        return
    tarfile.data_filter(member, writer.target)  # the library's own opinion, after ours
    source = archive.extractfile(member)
    if source is None:
        raise DatasetRefused(f"{shown} cannot be read")
    writer.write(path, source, member.size)


@contextmanager
def _refusals() -> Iterator[None]:
    """What a broken archive makes the standard library raise, as `DatasetRefused`."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DatasetRefused(f"the archive is damaged or cut short: {error}") from error
    except (NotImplementedError, UnicodeError, ValueError, RuntimeError, OverflowError) as error:
        raise DatasetRefused(f"the archive cannot be read: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a disk that fails is not the archive's fault
            raise
        raise DatasetRefused("the archive is damaged: it points before its own beginning") from error
    except MemoryError as error:
        raise DatasetRefused("the archive's lists need more memory than a check is given") from error
