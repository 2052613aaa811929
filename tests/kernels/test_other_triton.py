"""The budget of `test_compiled_kernels` and the keys of `test_kernel_cache` under the oldest Triton supported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

OLDEST = "3.6.0"
ROOT = Path(__file__).parents[2]
TESTS = ("test_compiled_kernels.py", "test_kernel_cache.py")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kernels_fit_under_the_oldest_triton(tmp_path):
    if triton.__version__ == OLDEST:
        pytest.skip("it is the one installed")
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), f"triton=={OLDEST}"]
    done = subprocess.run([sys.executable, *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    environment = {**os.environ, "PYTHONPATH": str(site), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    check = "import triton, tamis.kernels; print(triton.__version__)"
    seen = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True)
    assert seen.stdout.strip() == OLDEST, seen.stderr[-2000:]
    paths = [str(ROOT / "tests" / "kernels" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
