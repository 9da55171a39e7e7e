"""Landlock: a program may write below some folders and nowhere else, whoever it runs as.

File modes do not stop a process of the owner, or of root; this does. The kernel's own interface is called (Linux 5.13
and later), because the standard library has none. Reading stays free. The ruleset is made by the worker and handed down
as a descriptor; the program's guard (`app/worker/guard.py`) puts itself under it, and so everything that it starts.

    with write_only_below([folder]) as ruleset:  # or None, where the kernel has no Landlock
        subprocess.Popen([…, str(ruleset), …], pass_fds=(ruleset,))
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import structlog

from app.errors import LandlockFailed

# Numbers of the system calls, the same on every architecture that came after 2011 and on those before it that matter.
_CREATE_RULESET, _ADD_RULE = 444, 445
_ARCHITECTURES = frozenset({"x86_64", "aarch64", "riscv64", "ppc64le", "s390x"})
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_WRITE_FILE, _REMOVE_TO_MAKE = 1 << 1, range(4, 13)  # REMOVE_DIR … MAKE_SYM
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # from version 2 and 3 on
_OF_FILES = _WRITE_FILE | _TRUNCATE  # the rights a rule for a single file may name
_log = structlog.get_logger(__name__)


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """The version of Landlock that the running kernel has; 0: none, or switched off."""
    if platform.machine() not in _ARCHITECTURES:
        return 0
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)))


def write_only_below(paths: Sequence[Path]) -> AbstractContextManager[int] | None:
    """A ruleset, as an open descriptor, to write below these folders, below /dev, and nowhere else; None, and a line in
    the log, where the kernel has no Landlock. Raises `LandlockFailed`, and `OSError` when a path is not there."""
    known = version()
    if known == 0:
        _log.warning("no landlock", reason="this kernel cannot keep a child from writing; data sets are hashed again")
        return None
    return _ruleset([*paths, Path("/dev")], _handled(known))  # null, shm, GPUs


@contextmanager
def _ruleset(paths: Sequence[Path], handled: int) -> Iterator[int]:
    ruleset = _create(handled)
    try:
        for path in paths:
            _allow(ruleset, path, handled)
        yield ruleset
    finally:
        os.close(ruleset)


def _handled(known: int) -> int:
    """Every right to change a file system that this version can take away."""
    rights = _WRITE_FILE | sum(1 << bit for bit in _REMOVE_TO_MAKE)
    return rights | (_REFER if known >= 2 else 0) | (_TRUNCATE if known >= 3 else 0)


def _create(handled: int) -> int:
    attributes = _RulesetAttributes(handled)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = int(_libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), size, 0))
    if ruleset < 0:
        raise LandlockFailed(f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}")
    return ruleset


def _allow(ruleset: int, path: Path, handled: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _PathBeneath(handled if path.is_dir() else handled & _OF_FILES, handle)
        if _libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0):
            raise LandlockFailed(f"landlock_add_rule for {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(handle)
