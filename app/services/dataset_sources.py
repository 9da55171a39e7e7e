"""Where data sets may come from: folders below allowed roots, allowed buckets, archives.

The API asks before it registers one, the worker again before it reads one: what lies at a path may have changed, and
an API server need not see the folders of the workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from app.errors import DatasetSourceRefused

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class SourceRules:
    """roots: absolute folders; buckets: `name` or `name/prefix`. What is in neither is refused; the default is none."""

    roots: Sequence[Path]
    buckets: Sequence[str]

    def folder(self, path: str) -> Path:
        """The real folder at an absolute path, links followed. Raises `DatasetSourceRefused` outside of every root."""
        if not path.startswith("/") or not path.isprintable():
            raise DatasetSourceRefused("path is the absolute path of a folder on the workers")
        if not self.roots:
            raise DatasetSourceRefused(
                "folders are not allowed as sources of data sets: set WIDTHWISE_DATASET_ROOTS to the folders below "
                "which they may lie, on the API servers and on the workers, or upload an archive"
            )
        found = _resolved(Path(path))
        if not any(found.is_relative_to(_resolved(root)) for root in self.roots):
            raise DatasetSourceRefused(
                f"{path[:200]} leads to no folder below those of WIDTHWISE_DATASET_ROOTS; put the data set there, or "
                "add its folder to that setting"
            )
        return found

    def prefix(self, url: str) -> tuple[str, str]:
        """(bucket, prefix) of `s3://bucket/prefix`; the prefix is empty or ends with `/`. Raises
        `DatasetSourceRefused` for other URLs and for buckets that are not allowed."""
        parts = urlsplit(url)
        if parts.scheme != "s3" or _BUCKET.fullmatch(parts.netloc) is None or parts.query or parts.fragment:
            raise DatasetSourceRefused("url is s3://bucket/prefix")
        folders = [part for part in parts.path.split("/") if part]
        if not url.isprintable() or any(folder in (".", "..") for folder in folders):
            raise DatasetSourceRefused("url is s3://bucket/prefix, without '.' and '..'")
        prefix = "".join(f"{folder}/" for folder in folders)
        if not any(_covers(allowed, parts.netloc, prefix) for allowed in self.buckets):
            raise DatasetSourceRefused(
                f"bucket '{parts.netloc}' is not allowed as a source of data sets: add it, or bucket/prefix, to "
                "WIDTHWISE_DATASET_BUCKETS on the API servers and on the workers"
            )
        return parts.netloc, prefix


def _resolved(path: Path) -> Path:
    """As it is on this machine; what is not there stays as it is written. Raises `DatasetSourceRefused`."""
    try:
        return Path(os.path.normpath(path)).resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise DatasetSourceRefused(f"{str(path)[:200]} cannot be resolved") from error


def _covers(allowed: str, bucket: str, prefix: str) -> bool:
    name, _, below = allowed.removeprefix("s3://").partition("/")
    start = f"{below.strip('/')}/" if below.strip("/") else ""
    return name == bucket and prefix.startswith(start)
