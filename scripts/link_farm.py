"""A folder in which `tamis` looks like an ordinary package: `build/typing/tamis`, made of symbolic links.

The editable install maps root folders to sub-packages with an import hook, which mypy does not run and a machine
without pip cannot have.  Linking core's files and the other folders into one directory shows both what they expect.
"""

from __future__ import annotations

import shutil
from pathlib import Path

FOLDERS = ("kernels", "capture", "passes", "lowering", "runtime")


def build(root: Path) -> Path:
    """Make the farm of the checkout at `root` anew; returns the directory that holds `tamis`."""
    farm = root / "build" / "typing"
    package = farm / "tamis"
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for path in sorted((root / "core").iterdir()):
        if path.suffix in (".py", ".typed"):
            (package / path.name).symlink_to(path)
    for folder in FOLDERS:
        if (root / folder).is_dir():
            (package / folder).symlink_to(root / folder)
    return farm


def real_path(text: str) -> str:
    """`tamis/passes/x.py: ...` as mypy prints it -> `passes/x.py: ...`, the file to open."""
    inside = text.removeprefix("tamis/")
    if inside == text:
        return text
    return inside if inside.split("/")[0] in FOLDERS else f"core/{inside}"
