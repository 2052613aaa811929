"""Passes from outside: installed distributions (entry points `tamis.passes`) and files that the user names.

Nothing else is ever run: not the neighbours of a model, not what a recipe names.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from .recipe_errors import PluginFailed, PluginMissing
from .registry import register, set_origin
from .user_file import import_file, neighbours_importable, told

GROUP = "tamis.passes"
_problems: dict[Any, str] = {}  # entry point -> what went wrong, "" when nothing did


def load_installed() -> None:
    """Load every entry point of the group once.  One that fails is a warning: it must not take the others with it."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP):
        if entry in _problems:
            continue
        _problems[entry] = ""
        try:
            _load(entry)
        except (Exception, SystemExit) as error:
            text = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
            reason = f"{type(error).__name__}: {text}"
            _problems[entry] = f"plug-in {_shown(entry)} could not be loaded ({entry.value}): {reason}"
            logging.getLogger("tamis").warning(_problems[entry])


def problems() -> list[str]:
    """What went wrong with installed plug-ins, one line each."""
    return [problem for problem in _problems.values() if problem]


def load_plugin(path: str | Path) -> list[str]:
    """Run a Python file whose classes register themselves; returns the names of its passes.

    Raises:
        PluginMissing: there is no such file.
        PluginFailed: it raises, or registers nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise PluginMissing(path=path)
    try:
        with neighbours_importable(path):
            module = import_file(path, "plugin")
    except (Exception, SystemExit) as error:
        raise PluginFailed(path=path, reason=told(error, path)) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    names = set_origin(f"{path.name} (sha256 {digest})", lambda name: name == module.__name__)
    if not names:
        raise PluginFailed(path=path, reason="it registers no pass")
    return names


def _load(entry: Any) -> None:
    """An entry point names a module whose classes register themselves, or a pass, then called as the entry point is."""
    loaded = entry.load()
    if isinstance(loaded, type) and not loaded.__dict__.get("name"):
        register(entry.name)(loaded)
    package = entry.module.partition(".")[0]
    set_origin(_shown(entry), lambda name: name.partition(".")[0] == package)


def _shown(entry: Any) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.name
