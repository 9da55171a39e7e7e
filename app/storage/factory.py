"""From a storage URL to a store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from app.errors import StorageUnavailable
from app.storage.local import LocalStore
from app.storage.port import ObjectStore


def open_store(url: str, s3_endpoint_url: str | None = None) -> ObjectStore:
    """`file:///folder` or `s3://bucket/prefix`; contacts nothing yet. Raises `StorageUnavailable` for other URLs."""
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return LocalStore(Path(url2pathname(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        from app.storage.s3 import S3Store  # boto3 takes a third of a second to import; folders do without

        return S3Store(parts.netloc, parts.path, s3_endpoint_url)
    raise StorageUnavailable("a storage URL is file:///folder or s3://bucket/prefix")
