"""The GPU benchmarks run: on tiny models, on the CPU.  What they measure there means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.full
@pytest.mark.parametrize("script", ["gpu_models.py", "gpu_kernels.py", "gpu_sparse.py"])
def test_rehearsal(script, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / script), "--rehearse", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["rehearsal"] is True
    assert result["rows"]
    assert result["left_out"] == []
