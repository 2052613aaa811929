"""`Runner`: runs ONNX models that may crash ONNX Runtime, or never end, in a process of its own."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from . import trial_worker
from .known import Array
from .table import Unsupported

SECONDS = 60.0  # that one run may take
SCRIPT = Path(trial_worker.__file__)


class Runner:
    """A process that is started when first needed, and again after it died."""

    def __init__(self, script: Path = SCRIPT, seconds: float = SECONDS) -> None:
        """Prepare; `script` is what the process runs, see `trial_worker`."""
        self.script, self.seconds = script, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, model: bytes, arrays: list[Array]) -> list[Any]:
        """The outputs of a model for its inputs in their order.

        Raises:
            RuntimeError: ONNX Runtime does, with its text.
            Unsupported: it crashes, or takes more than the seconds allowed.
        """
        with self._lock:
            return self._answer(model, arrays)

    def _answer(self, model: bytes, arrays: list[Array]) -> list[Any]:
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(self.seconds, stop)
        watch.start()
        try:
            trial_worker.send(process.stdin, (model, arrays))  # type: ignore[arg-type]
            results, reason = trial_worker.receive(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError) as error:
            self._process = None
            code = process.wait()
            why = f"does not finish it in {self.seconds:g} s" if late.is_set() else f"crashes on it ({_cause(code)})"
            raise Unsupported(f"ONNX Runtime {why}") from error
        finally:
            watch.cancel()
        if reason:
            raise RuntimeError(reason)
        return list(results)

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", os.fspath(self.script)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """End the process, if one runs."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@functools.cache
def runner() -> Runner:
    """The one that is kept while Python runs; its process ends with Python's, whose end of the pipe closes then."""
    return Runner()
