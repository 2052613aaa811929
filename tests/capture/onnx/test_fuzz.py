"""Damaged files: whatever a file says, the answer is a model or one of our errors, and soon."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx_fuzz
import pytest
from onnx_mutations import damaged

COUNT = 1000  # always the same seeds, however fast the machine is
SECONDS = 60  # for seeds that are new every time


def fuzzed(first: int, count: int, seconds: float, folder: Path) -> Counter[str]:
    """What became of files damaged by the seeds from `first` on; a seed that goes wrong is told."""
    command = [sys.executable, onnx_fuzz.__file__, str(first), str(count), str(seconds), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    seed = (folder / "seed").read_text()
    assert done.returncode == 0, f"seed {seed} ended the process ({done.returncode}): {done.stderr[-2000:]}"
    found = json.loads(done.stdout)
    assert found["seed"] is None, f"seed {seed}: {found['error']}"
    return Counter(found["answers"])


def test_damaged_files_end_in_models_or_errors_of_ours(tmp_path: Path) -> None:
    answers = fuzzed(0, COUNT, math.inf, tmp_path)
    assert answers.total() == COUNT
    assert answers.keys() >= {"evaluated", "exported", "CorruptModel", "MalformedGraph", "NodeFailed"}


@pytest.mark.full
def test_other_seeds_every_time(tmp_path: Path) -> None:
    assert fuzzed(random.SystemRandom().randrange(2**32), 10**6, SECONDS, tmp_path).total() > 100


def test_a_seed_says_what_is_damaged() -> None:
    assert damaged(7) == damaged(7)
    assert len({damaged(seed) for seed in range(40)}) > 35
