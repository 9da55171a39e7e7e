"""One thread per test process: pytest runs several, and small nets on shared cores only wait for each other. And the
command line, for tests of commands."""

from __future__ import annotations

import sys

import pytest
import torch

from app.cli import main
from tests.chains.toys import Command, Done

torch.set_num_threads(1)


@pytest.fixture
def widthwise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["widthwise", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        printed = capsys.readouterr()
        return Done(code if isinstance(code, int) else int(code is not None), printed.out, printed.err)

    return run
