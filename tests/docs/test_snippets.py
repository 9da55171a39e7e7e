"""The Python in the pages runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

from chains.artifact import load

ROOT = Path(__file__).parents[2]


def python_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL))


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
