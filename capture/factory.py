"""`file.py:function`: a model from the user's own Python, run because the user named it."""

from __future__ import annotations

import difflib
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import FactoryFailed
from ..user_file import import_file, neighbours_importable, told


def call_factory(path: Path, function: str) -> tuple[nn.Module | ExportedProgram, Any, dict[str, Any]]:
    """Load the file, call the function without arguments; returns (model, args, kwargs).

    The file's directory is importable meanwhile.  Raises FactoryFailed with the line of the user's file.
    """
    spec = f"{path}:{function}"
    with neighbours_importable(path):
        module = _loaded(path, spec)
        make = getattr(module, function, None)
        if not callable(make):
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            near = difflib.get_close_matches(function, names, n=1)
            suggestion = f"; did you mean {near[0]}?" if near else ""
            raise FactoryFailed(spec=spec, reason=f"the file has no function {function!r}{suggestion}")
        try:
            result = make()
        except Exception as error:
            raise FactoryFailed(spec=spec, reason=told(error, path)) from error
    return _unpacked(result, spec)


def _loaded(path: Path, spec: str) -> ModuleType:
    try:
        return import_file(path, "factory")
    except (Exception, SystemExit) as error:
        raise FactoryFailed(spec=spec, reason=told(error, path)) from error


def _unpacked(result: Any, spec: str) -> tuple[nn.Module | ExportedProgram, Any, dict[str, Any]]:
    model, args = result, ()
    kwargs: Any = {}
    if isinstance(result, tuple) and 2 <= len(result) <= 3:
        model, args = result[:2]
        kwargs = result[2] if len(result) == 3 else {}
    args = (args,) if isinstance(args, Tensor) else args
    if not isinstance(model, nn.Module | ExportedProgram) or not isinstance(kwargs, dict):
        got = (
            f"({', '.join(type(part).__name__ for part in result)})"
            if isinstance(result, tuple)
            else type(result).__name__
        )
        raise FactoryFailed(spec=spec, reason=f"it returned {got}")
    return model, args, kwargs
