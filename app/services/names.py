"""What chains, teachers and data sets may be called: what a chain file can hold, and what is safe in a path."""

from __future__ import annotations

import re

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
PATTERN = f"^{NAME.pattern}$"  # for descriptions of the interface
