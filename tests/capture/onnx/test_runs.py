"""Running ONNX models in a process of its own, which may die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx_graphs import model, node

from tamis.capture.onnx.runs import Runner
from tamis.capture.onnx.table import Unsupported

NEGATED = model([node("Neg", "x", "y")]).SerializeToString()
X = np.ones((2, 3, 4), np.float32)


@pytest.fixture
def run() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


def test_a_model_is_run(run: Runner) -> None:
    for x in (X, X * 2):
        (y,) = run(NEGATED, [x])
        np.testing.assert_array_equal(y, -x)


def test_what_onnx_runtime_says_comes_back(run: Runner) -> None:
    with pytest.raises(RuntimeError, match="Got invalid dimensions for input: x"):
        run(NEGATED, [X[:1]])
    (y,) = run(NEGATED, [X])  # the process lives on
    np.testing.assert_array_equal(y, -X)


SCRIPTS = {
    "import os; os.abort()": "ONNX Runtime crashes on it (SIGABRT)",
    "import os, sys; sys.stdin.buffer.read(8); os._exit(7)": "ONNX Runtime crashes on it (exit code 7)",
    "import time; time.sleep(600)": "ONNX Runtime does not finish it in 2 s",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_process_that_dies_or_hangs_is_an_answer(tmp_path: Path, script: str) -> None:
    path = tmp_path / "worker.py"
    path.write_text(script)
    run = Runner(path, seconds=2 if "sleep" in script else 60)
    for _ in range(2):  # a new process each time
        with pytest.raises(Unsupported) as caught:
            run(NEGATED, [X])
        assert str(caught.value) == SCRIPTS[script]
