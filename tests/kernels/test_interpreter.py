"""Kernels in Triton's interpreter: each file of tests/interpreter in a process of its own (see its conftest)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "interpreter").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_file_passes_in_the_interpreter(file, pytestconfig):
    selected = pytestconfig.getoption("-m")
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(file), *(["-m", selected] if selected else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
