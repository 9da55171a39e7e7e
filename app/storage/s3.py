"""An S3 bucket, or a prefix in one, as object store; any S3-compatible server, by boto3.

What is put is spooled and hashed before anything is sent, so a wrong digest stores nothing. `put` looks before it
writes and does not use conditional writes, which some servers get wrong: two racing writers of one key may both write.
Under a content-addressed key both write the same bytes. To begin the age of such an object anew it is sent again: not
every server counts a copy onto itself as a change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from app.errors import ObjectNotFound, StorageUnavailable
from app.storage.port import CHUNK_BYTES, ObjectStat, checked_key, content_key, copy_hashed

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SPOOL_BYTES = 16 * 1024**2  # above this a put is spooled to a temporary file instead of memory
YOUNG = timedelta(minutes=10)  # far below any grace time of garbage collection: what is younger is not sent again
_MISSING = frozenset({"404", "NoSuchKey", "NotFound"})
_BEYOND_END = frozenset({"416", "InvalidRange"})


class S3Store:
    """Objects under `prefix` in `bucket`."""

    def __init__(self, bucket: str, prefix: str = "", endpoint_url: str | None = None) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        with s3_errors():
            self._client = s3_client(endpoint_url)

    def prepare(self) -> None:
        """Make the bucket when it is missing. Raises `StorageUnavailable`, also when making buckets is not allowed."""
        try:
            with s3_errors():
                self._client.head_bucket(Bucket=self._bucket)
        except ObjectNotFound:
            with s3_errors():
                self._client.create_bucket(Bucket=self._bucket)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        if stop is not None and stop <= start:
            self.stat(key)
            return
        last = "" if stop is None else stop - 1
        with s3_errors():
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=self._name(key), Range=f"bytes={start}-{last}")
            except ClientError as error:
                if _code(error) in _BEYOND_END:
                    return
                raise
            yield from found["Body"].iter_chunks(CHUNK_BYTES)

    def put(self, key: str, chunks: Iterable[bytes], sha256: str) -> bool:
        name = self._name(key)
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as file:
            with s3_errors():  # the disk may be full
                copy_hashed(chunks, file, sha256)
            known = self._known(key)
            if known is not None and (key != content_key(sha256) or _is_young(known)):
                return False
            file.seek(0)
            with s3_errors():
                self._client.upload_fileobj(file, self._bucket, name, Config=TransferConfig(use_threads=False))
        return known is None

    def stat(self, key: str) -> ObjectStat:
        with s3_errors():
            found = self._client.head_object(Bucket=self._bucket, Key=self._name(key))
        return ObjectStat(key, found["ContentLength"], found["LastModified"].astimezone(UTC))

    def delete(self, key: str) -> None:
        with s3_errors():
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def list(self, prefix: str = "") -> Iterator[str]:
        with s3_errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for item in page.get("Contents", []):
                    yield item["Key"].removeprefix(self._prefix)

    def drop_drafts(self, before: datetime, *, dry_run: bool = False) -> int:
        """Parts of large objects whose last part never came; they cost space and are in no list."""
        with s3_errors():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            drafts = [draft for page in pages for draft in page.get("Uploads", []) if draft["Initiated"] < before]
            for draft in drafts if not dry_run else ():
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=draft["Key"], UploadId=draft["UploadId"])
        return len(drafts)

    def _known(self, key: str) -> ObjectStat | None:
        try:
            return self.stat(key)
        except ObjectNotFound:
            return None

    def _name(self, key: str) -> str:
        return self._prefix + checked_key(key)


def s3_client(endpoint_url: str | None) -> S3Client:
    """A client of that server, or of the provider's own. Raises `StorageUnavailable` for what is no URL."""
    # Servers other than AWS often know neither virtual-host buckets nor boto3's default checksums, which break ranged
    # reads on some; we check our own sha256 in any case.
    foreign = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # A server that hangs must not hold a worker thread for long: 20 s at worst.
    patience = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 2})
    config = patience.merge(foreign) if endpoint_url else patience
    try:
        return boto3.client("s3", endpoint_url=endpoint_url, config=config)
    except ValueError as error:
        raise StorageUnavailable("WIDTHWISE_S3_ENDPOINT_URL is no http URL") from error


def _is_young(found: ObjectStat) -> bool:
    return datetime.now(UTC) - found.modified_at < YOUNG


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def s3_errors() -> Iterator[None]:
    """What goes wrong with the server inside the block, as `StorageError`."""
    try:
        yield
    except ClientError as error:
        if _code(error) in _MISSING:
            raise ObjectNotFound(str(error)) from error
        raise StorageUnavailable(f"the S3 server refused: {error}") from error
    except (BotoCoreError, Boto3Error, OSError) as error:
        raise StorageUnavailable(f"the S3 server failed: {error}") from error
