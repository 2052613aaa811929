"""What the house tests look at: the checkout, its files, and their syntax trees."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("core", "kernels", "capture", "passes", "lowering", "runtime")
ALL = (*ORDER, "tests", "scripts", "benchmarks")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """Python files below these root folders, paths relative to the checkout."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts]


@cache
def tree(path: Path) -> ast.Module:
    """Syntax tree of a file named relative to the checkout."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def functions(module: ast.Module) -> Iterator[Function]:
    """All functions and methods, nested ones included."""
    for node in ast.walk(module):
        if isinstance(node, Function):
            yield node


def tracked_files() -> list[Path]:
    """Files that git tracks and that exist, relative to the checkout; empty outside a git checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
