"""Who a worker is.

Its id says where it runs, so that one that starts can tell that an earlier one on the same machine is gone, without
waiting for its lease: `HOST.PLACE.PID.RANDOM`. The place is a digest of the kernel's boot and of the process namespace,
the only surroundings in which a process id means anything. Every process has its own id: two that share one would run
each other's jobs.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from functools import cache
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


def new_executor_id() -> str:
    """At most 64 characters of a-z, 0-9, '-', '_' and '.'."""
    host = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower())[:24] or "host"
    return f"{host}.{place()}.{os.getpid()}.{secrets.token_hex(4)}"


@cache
def place() -> str:
    """Where process ids are comparable: this boot of this machine, and this container of it."""
    surroundings = f"{_BOOT.read_text().strip()} {_NAMESPACE.readlink()}"
    return hashlib.sha256(surroundings.encode()).hexdigest()[:12]


def is_here(executor: str) -> bool:
    """Whether it runs, or ran, where process ids are ours."""
    return executor.split(".")[1:2] == [place()]


def is_surely_gone(executor: str, but: str) -> bool:
    """True when it ran here and its process is no more. `but`: our own id, whose process id can have been another's."""
    if executor == but or not is_here(executor):
        return False
    pid = executor.split(".")[2:3]
    if not pid or not pid[0].isdecimal():
        return False  # a folder of somebody else's in the folder of executors
    return int(pid[0]) == os.getpid() or not Path(f"/proc/{pid[0]}").exists()
