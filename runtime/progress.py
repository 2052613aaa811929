"""Progress on stderr: a bar on a terminal once work takes longer than two seconds, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

PATIENCE_SECONDS = 2.0


class Progress:
    """Tells the steps of a run.  Use as a context manager; call it with the text of each step as it starts."""

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self.steps = steps
        self.quiet = quiet
        self.start = time.monotonic()
        self._done = 0
        self._bar: Any = None
        self._task: Any = None
        self._timer: threading.Timer | None = None
        self._shown = False

    def __call__(self, text: str) -> None:
        """A step starts."""
        if self.quiet:
            return
        if self._bar is None:
            print(f"[{time.monotonic() - self.start:6.1f} s] {text}", file=sys.stderr, flush=True)
            return
        self._bar.update(self._task, description=text, completed=min(self._done, self.steps))
        self._done += 1

    def __enter__(self) -> Progress:
        if self.quiet or not shows_bars():
            return self
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        # Console(file=None, stderr=True) looks stderr up when it writes, after redirections.
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=self.steps)
        self._timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if self._shown:
            self._bar.stop()

    def _show(self) -> None:
        self._shown = True
        self._bar.start()


def shows_bars() -> bool:
    """Whether stderr is a terminal that wants bars: not in CI, not a dumb one."""
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
