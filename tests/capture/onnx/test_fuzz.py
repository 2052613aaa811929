"""Damaged files, for a minute: whatever a file says, the answer is a model or one of our errors, and soon."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_mutations
import pytest
from onnx_mutations import damaged

SECONDS = 60


def fuzzed(first: int, folder: Path) -> dict[str, Any]:
    """What became of files damaged by the seeds from `first` on; a seed that goes wrong is told."""
    command = [sys.executable, onnx_mutations.__file__, str(first), str(SECONDS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5 * SECONDS, check=False)
    seed = (folder / "seed").read_text()
    assert done.returncode == 0, f"seed {seed} ended the process ({done.returncode}): {done.stderr[-2000:]}"
    found = json.loads(done.stdout)
    assert found["seed"] is None, f"seed {seed}: {found['error']}"
    return found["answers"]


def test_damaged_files_end_in_models_or_errors_of_ours(tmp_path: Path) -> None:
    answers = fuzzed(0, tmp_path)
    assert sum(answers.values()) > 100
    assert answers.keys() >= {"evaluated", "exported", "CorruptModel", "MalformedGraph", "NodeFailed"}


@pytest.mark.full
def test_other_seeds_every_time(tmp_path: Path) -> None:
    assert sum(fuzzed(random.SystemRandom().randrange(2**32), tmp_path).values()) > 100


def test_a_seed_says_what_is_damaged() -> None:
    assert damaged(7) == damaged(7)
    assert len({damaged(seed) for seed in range(40)}) > 35
