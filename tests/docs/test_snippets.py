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


def test_the_how_to_refines_a_chain_that_loads(tmp_path):
    script = "import torch; torch.set_num_threads(1)\n" + python_of("how-to/publish-a-chain.md")
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    stored = load(tmp_path / "my-site.safetensors")
    assert ran.stdout.strip() == stored.digest
    assert stored.chain.frontier is not None
