"""The Python in the pages runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

from chains.artifact import load
from chains.nodes import Node

ROOT = Path(__file__).parents[2]


def python_of(page: str, folder: str = "docs") -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / folder / page).read_text(), re.DOTALL))


def printed(script: str, folder: Path) -> str:
    """What a script prints when it is run in `folder` with nothing but the repository."""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_how_to_refines_a_chain_that_loads(tmp_path):
    script = "import torch; torch.set_num_threads(1)\n" + python_of("how-to/publish-a-chain.md")
    output = printed(script, tmp_path)
    stored = load(tmp_path / "my-site.safetensors")
    assert output.strip() == stored.digest
    assert stored.chain.frontier is not None


def test_the_page_on_data_sets_prints_what_it_says(tmp_path):
    output = printed(python_of("reference/datasets.md"), tmp_path)
    page = (ROOT / "docs" / "reference" / "datasets.md").read_text()
    promised = re.findall(r"^print\(.*\)  # (.*)$", page, re.MULTILINE)
    assert len(promised) == 5
    assert [line for line in output.splitlines() if line in promised] == promised
    (table,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert table in output


def test_a_backbone_is_added_in_under_eighty_lines(tmp_path):
    script = python_of("add_a_backbone.md", "examples")
    assert sum(bool(line.strip()) for line in script.splitlines()) < 80
    output = printed("import torch; torch.set_num_threads(1)\n" + script, tmp_path).splitlines()
    assert [line.partition(":")[0] for line in output] == ["w4", "w8", "w12", "w16"]


def test_links_of_the_example_lead_somewhere():
    page = ROOT / "examples" / "add_a_backbone.md"
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert targets
    assert all((page.parent / target).resolve().is_file() for target in targets)


def test_the_page_on_architectures_lists_them_with_what_they_cost(tmp_path):
    page = (ROOT / "docs" / "reference" / "architectures.md").read_text()
    (table,) = re.findall(r"\| architecture \|.*\n\|[-|:]+\|\n((?:\|.*\n)+)", page)
    assert printed(python_of("reference/architectures.md"), tmp_path) == table


def test_the_page_on_architectures_names_every_node():
    page = (ROOT / "docs" / "reference" / "architectures.md").read_text()
    section = page.partition("## The table")[2].partition("\n## ")[0]
    named = {
        name
        for row in section.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named == {node.__name__ for node in get_args(Node)}
