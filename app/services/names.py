"""What chains, teachers and data sets may be called: what a chain file can hold, and what is safe in a path."""

from __future__ import annotations

import re

from chains import artifact

PATTERN = artifact.NAME
NAME = re.compile(PATTERN)
