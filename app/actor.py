"""Who does something: handed from the API or the command line down to the audit trail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scope = Literal["device", "admin"]


@dataclass(frozen=True)
class Actor:
    """id: of an API key, or `anonymous` (an open server on loopback), `admin-key` (WIDTHWISE_ADMIN_KEY),
    `command-line`, `worker`. request_id: of the HTTP request, where there is one."""

    id: str
    scope: Scope = "admin"
    request_id: str | None = None


COMMAND_LINE = Actor("command-line")
WORKER = Actor("worker")
