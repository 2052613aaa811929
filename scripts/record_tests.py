"""A pytest plug-in: `-p record_tests --record FILE` writes what was run, how it ended and how long it took as JSON."""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("tamis", "torch", "triton", "onnx", "onnxruntime", "onnxscript", "timm", "transformers", "numpy")
SLOWEST = 20


def versions() -> dict[str, str]:
    """Versions of what results depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checked-out commit, with `+` when files differ from it; "" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def header() -> dict[str, Any]:
    """What every result file begins with."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "commit": commit(), "machine": platform.machine(), "versions": versions()}


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", metavar="FILE", help="write counts and durations as JSON")


def pytest_configure(config: Any) -> None:
    # Under xdist the workers load this too; only the process that collects all reports writes.
    if config.getoption("--record") and not hasattr(config, "workerinput"):
        marked = config.getoption("markexpr")
        config.pluginmanager.register(_Recorder(Path(config.getoption("--record")), marked))


class _Recorder:
    def __init__(self, path: Path, marked: str) -> None:
        self.path, self.marked = path.resolve(), marked
        self.start = time.monotonic()
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.outcome: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if self.outcome.get(report.nodeid, "passed") == "passed":
            xfail = hasattr(report, "wasxfail")
            self.outcome[report.nodeid] = f"x{report.outcome}" if xfail else report.outcome

    def pytest_sessionfinish(self) -> None:
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        result = {
            **header(),
            "marked": self.marked,  # what `-m` left of the tests; "": all
            "counts": dict(sorted(collections.Counter(self.outcome.values()).items())),
            "failed": sorted(name for name, outcome in self.outcome.items() if outcome == "failed"),
            "seconds": round(time.monotonic() - self.start, 1),
            "slowest": {name: round(seconds, 2) for name, seconds in slowest},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.rename(self.path)
