"""Objects that somebody else keeps below a prefix of a bucket, to be read and never written.

Their names are not ours, so they are any text: who writes them to a disk checks them first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from app.storage.port import CHUNK_BYTES
from app.storage.s3 import s3_client, s3_errors


@dataclass(frozen=True)
class S3Object:
    """name: the key without the prefix. etag: changes with the content, so that a file is read as it was listed."""

    name: str
    size_bytes: int
    etag: str


class S3Prefix:
    """The objects of `bucket` whose keys begin with `prefix`, which is empty or ends with `/`."""

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None = None) -> None:
        self._bucket = bucket
        self._prefix = prefix
        with s3_errors():
            self._client = s3_client(endpoint_url)

    def objects(self) -> Iterator[S3Object]:
        """In ascending order of key; folder markers, which hold nothing, are passed over. Raises `StorageError`."""
        with s3_errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    name = item["Key"].removeprefix(self._prefix)
                    if name and not (name.endswith("/") and item["Size"] == 0):
                        yield S3Object(name, item["Size"], item["ETag"])

    def read(self, found: S3Object) -> Iterator[bytes]:
        """The bytes of a listed object. Raises `StorageError`, also when it has changed since."""
        with s3_errors():
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + found.name, IfMatch=found.etag)
            yield from answer["Body"].iter_chunks(CHUNK_BYTES)
