"""Running ONNX models in a process of its own, which may die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx_graphs import model, node

from tamis.capture.onnx.runs import Runner
from tamis.capture.onnx.table import Unsupported

NEGATED = model([node("Neg", "x", "y")]).SerializeToString()
EXPONENTIAL = model([node("Exp", "x", "y")]).SerializeToString()
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


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
def test_after_an_interrupted_run_the_next_gets_its_own_answer(run: Runner, kind: type[BaseException]) -> None:
    run(NEGATED, [X])
    stopped = _stopped(run)

    def interrupt(*_: object) -> None:
        raise kind

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(kind):
            run(EXPONENTIAL, [X])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    with pytest.raises(ProcessLookupError):  # killed and waited for
        os.kill(stopped, signal.SIGCONT)
    (y,) = run(NEGATED, [X])
    np.testing.assert_array_equal(y, -X)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_starts_its_own(run: Runner) -> None:
    run(NEGATED, [X])
    stopped, answers = _stopped(run), []
    thread = threading.Thread(target=lambda: answers.append(run(EXPONENTIAL, [X])))
    thread.start()
    time.sleep(0.2)  # it waits for its answer now
    forked = os.fork()
    if not forked:
        _exit_with(lambda: np.array_equal(run(NEGATED, [X])[0], -X))
    _, status = os.waitpid(forked, 0)
    os.kill(stopped, signal.SIGCONT)
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_allclose(answers[0][0], np.exp(X), rtol=1e-6)
    (y,) = run(NEGATED, [X])
    np.testing.assert_array_equal(y, -X)


def test_threads_get_their_own_answers(run: Runner) -> None:
    wrong = []

    def negate(factor: int) -> None:
        for _ in range(20):
            (y,) = run(NEGATED, [X * factor])
            if not np.array_equal(y, -X * factor):
                wrong.append(factor)

    threads = [threading.Thread(target=negate, args=(factor,)) for factor in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == []


def _stopped(run: Runner) -> int:
    """Halt the runner's process, so that its next run takes until it is killed or continued."""
    assert run._process is not None
    os.kill(run._process.pid, signal.SIGSTOP)
    return run._process.pid


def _exit_with(right: Callable[[], bool]) -> None:
    """End a forked process: 0 where the answer is right, and killed where there is none."""
    signal.alarm(30)
    try:
        os._exit(0 if right() else 1)
    finally:
        os._exit(2)
