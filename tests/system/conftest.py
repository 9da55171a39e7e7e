"""One cluster for all tests of this folder; each leaves it running."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.app.conftest import lacking
from tests.system.ceph import missing_programs, rados_gateway


@pytest.fixture(scope="session")
def real_s3_url() -> Iterator[str]:
    """A RADOS gateway of this test run."""
    if missing := missing_programs():
        lacking(f"a real S3 server ({', '.join(missing)}; Debian: ceph-mon ceph-osd ceph-common radosgw)")
    with short_lived_folder() as home, rados_gateway(home) as url:
        yield url


@contextmanager
def short_lived_folder() -> Iterator[Path]:
    """Not pytest's own: its long names leave no room for sockets."""
    with tempfile.TemporaryDirectory(prefix="widthwise-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
