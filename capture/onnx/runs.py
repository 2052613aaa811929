"""`Runner`: runs ONNX models that may crash ONNX Runtime, or never end, in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from . import trial_worker
from .known import Array
from .table import Unsupported

SECONDS = 60.0  # that one run may take
SCRIPT = Path(trial_worker.__file__)


class Runner:
    """A process that is started when first needed, and again after it died, was interrupted, or this one forked."""

    def __init__(self, script: Path = SCRIPT, seconds: float = SECONDS) -> None:
        """Prepare; `script` is what the process runs, see `trial_worker`."""
        self.script, self.seconds = script, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(_forked, weakref.ref(self)))

    def __call__(self, model: bytes, arrays: list[Array]) -> list[Any]:
        """The outputs of a model for its inputs in their order; of several threads, one at a time.

        Raises:
            RuntimeError: ONNX Runtime does, with its text.
            Unsupported: it crashes, or takes more than the seconds allowed.
        """
        with self._lock:
            return self._answer(model, arrays)

    def _answer(self, model: bytes, arrays: list[Array]) -> list[Any]:
        process = self._process = self._process or self._started()
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(self.seconds, stop)
        try:
            watch.start()
            results, reason = self._exchange(process, (model, arrays), late)
        except BaseException:  # the next run would read the answer to this one
            self._process = None
            _end(process)
            raise
        finally:
            watch.cancel()
        if reason:
            raise RuntimeError(reason)
        return list(results)

    def _exchange(self, process: subprocess.Popen[bytes], message: Any, late: threading.Event) -> Any:
        try:
            trial_worker.send(process.stdin, message)  # type: ignore[arg-type]
            return trial_worker.receive(process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError) as error:
            code = process.wait()
            why = f"does not finish it in {self.seconds:g} s" if late.is_set() else f"crashes on it ({_cause(code)})"
            raise Unsupported(f"ONNX Runtime {why}") from error

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

    def forked(self) -> None:
        """Leave process and lock to the process that this one was forked from."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # no child of this process: nothing to wait for
            for stream in (process.stdin, process.stdout):
                stream.raw.close()  # type: ignore[union-attr]  # closing `stream` would write what is in its buffer


def _forked(runner: weakref.ref[Runner]) -> None:
    if (one := runner()) is not None:
        one.forked()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what is left in a buffer has no reader
            stream.close()  # type: ignore[union-attr]


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@functools.cache
def runner() -> Runner:
    """The one that is kept while Python runs; its process ends with Python's, whose end of the pipe closes then."""
    return Runner()
