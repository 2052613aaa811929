"""Running a Python file that the user named: a model's factory, a plug-in."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def import_file(path: Path, kind: str) -> ModuleType:
    """Run the file as a module of its own, called `tamis_KIND_STEM_HASH`; raises what the file raises.

    Running the same file again gives a new module under the same name.
    """
    name = f"tamis_{kind}_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickling look modules up by name
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def neighbours_importable(path: Path) -> Iterator[None]:
    """Let the file import what lies beside it."""
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        yield
    finally:
        sys.path.pop(0)


def told(error: BaseException, path: Path) -> str:
    """`ValueError: text (line 3)`, the last line that is the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text.rstrip('.')}" + (f" (line {line})" if line else "")
