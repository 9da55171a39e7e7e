"""Promises about importing: seen in a fresh interpreter, because this one has loaded everything already."""

import os
import subprocess
import sys

import pytest

SERVING = [
    "app.main",
    "app.cli",
    "chains.artifact",
    "chains.budget",
    "chains.cost",
    "chains.data.synthetic",
    "chains.expand",
    "chains.onnxfile",
    "chains.ranking",
]


def modules_after(statement: str, **environment: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return set(run.stdout.split())


@pytest.mark.parametrize("module", SERVING)
def test_importing_the_serving_path_loads_neither_torch_nor_scipy(module):
    loaded = modules_after(f"import {module}")
    assert module in loaded
    assert not {"torch", "scipy"} & loaded


def test_importing_the_service_loads_no_cloud_client():
    assert "boto3" not in modules_after("import app.main")


def test_importing_the_service_reads_no_setting():
    """A value that no setting would accept goes unnoticed until the service is made."""
    assert "app.main" in modules_after("import app.main", WIDTHWISE_PORT="no port", WIDTHWISE_HOST="0.0.0.0")
