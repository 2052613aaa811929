"""Writing an ONNX file whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from ..errors import OutputExists, OutputNotWritable
from .onnx_stream import save_streamed

LIMIT = 2 * 10**9  # bytes of weights; a protobuf message ends at 2 GiB, and the graph needs room too


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise before any work is done for nothing: OutputExists, or OutputNotWritable."""
    if not path.parent.is_dir():
        raise OutputNotWritable(path=str(path), reason=f"there is no directory {str(path.parent)!r}")
    if path.is_dir():
        raise OutputNotWritable(path=str(path), reason="it is a directory")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputNotWritable(path=str(path), reason="permission denied")
    if not overwrite:
        for one in (path, data_path(path)):
            if one.exists():
                raise OutputExists(path=str(one))


def data_path(path: Path) -> Path:
    """The file of large weights beside `path`."""
    return path.with_name(path.name + ".data")


def write_whole(model: ir.Model, path: Path, *, external_over: int, check: Callable[[Path], None]) -> None:
    """Write the model to a directory beside `path`, check it there, then move it into place.

    Weights of more than `external_over` bytes go to `NAME.onnx.data`.  Nothing is left behind when writing or checking
    fails; a file that was there before is then still there.

    Raises:
        OutputNotWritable: the disk is full, or the like; and whatever `check` raises.
    """
    size = sum(one.const_value.nbytes for one in model.graph.initializers.values() if one.const_value is not None)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputNotWritable(path=str(path), reason=error.strerror or str(error)) from error
    try:
        draft = folder / path.name
        _write(model, draft, path, external=size > external_over)
        check(draft)
        _move(draft, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(model: ir.Model, draft: Path, path: Path, *, external: bool) -> None:
    try:
        if external:
            ir.save(model, draft, external_data=data_path(draft).name)
        else:
            save_streamed(model, draft)
    except OSError as error:
        raise OutputNotWritable(path=str(path), reason=error.strerror or str(error)) from error


def _move(draft: Path, path: Path) -> None:
    try:
        if data_path(draft).exists():
            os.replace(data_path(draft), data_path(path))
            os.replace(draft, path)
        else:
            os.replace(draft, path)
            data_path(path).unlink(missing_ok=True)  # of the file that was here before
    except OSError as error:
        raise OutputNotWritable(path=str(path), reason=error.strerror or str(error)) from error
