"""Ports that stay a server's while it is away."""

from __future__ import annotations

import random
import socket

LOWEST, HIGHEST = 15_000, 32_000  # below the kernel's own, which it gives to clients while a server is restarted
TRIES = 100


def lasting_port() -> int:
    """A port on loopback that is free, and that no client's connection takes before a server does, or in between."""
    for port in random.sample(range(LOWEST, HIGHEST), TRIES):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"of {TRIES} ports from {LOWEST} on none is free")
