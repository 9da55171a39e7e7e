"""The threat model names tests that exist, and a test for every attack."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
ATTACKS = PAGE[PAGE.index("\n## Attacks") : PAGE.index("\n## What does not stop")]


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_every_named_test_exists(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_attack_has_a_test() -> None:
    rows = [line for line in ATTACKS.splitlines() if line.startswith("| ") and not line.startswith("| attack")]
    assert len(rows) > 35
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::\w+`", row), row
