"""The passes there are, by name, and where each comes from (tamis, a plug-in, a file, the running program)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UnknownPass
from .recipe_errors import NotAPass, PassNameTaken

if TYPE_CHECKING:
    from .rewrite import Pass

P = TypeVar("P", bound="type[Pass]")
_REGISTRY: dict[str, type[Pass]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a pass available by its kebab-case name.

    A class of the same module and name replaces the one before it (a notebook's cell run twice).

    Raises:
        NotAPass: the class is no subclass of `Pass`.
        PassNameTaken: another pass has the name.
    """

    def add(cls: P) -> P:
        from .rewrite import Pass

        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise NotAPass(name=name, got=_place(cls))
        known = _REGISTRY.get(name)
        if known is not None and _place(known) != _place(cls):
            raise PassNameTaken(name=name, origin=origin_of(known), taken_by=_place(known), got=_place(cls))
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def registered_passes() -> dict[str, type[Pass]]:
    """Every known pass by name, those of installed plug-ins included."""
    from .plugins import load_installed

    import_module("tamis.passes")
    load_installed()
    return dict(sorted(_REGISTRY.items()))


def find_pass(name: str) -> type[Pass]:
    """The pass called `name`; raises UnknownPass with the nearest names, and with the plug-ins that failed to load."""
    from .plugins import problems

    known = registered_passes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=2)
    error = UnknownPass(name=name, nearest=f"; did you mean {' or '.join(near)}?" if near else ".")
    for problem in problems():
        error.add_note(problem)
    raise error


def origin_of(cls: type[Pass]) -> str:
    """Where a pass comes from: `tamis`, `largest-methods 0.3`, `largest.py (sha256 1a2b3c4d5e6f)`, `module largest`."""
    own = cls.__module__.partition(".")[0] == "tamis"
    return cls.origin or ("tamis" if own else f"module {cls.__module__}")


def set_origin(origin: str, belongs: Callable[[str], bool]) -> list[str]:
    """Say where the passes of some modules come from; returns their names.  Those of tamis stay its own."""
    found = [cls for cls in _REGISTRY.values() if belongs(cls.__module__)]
    for cls in found:
        cls.origin = origin
    return [cls.name for cls in found]


def _place(cls: Any) -> str:
    return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', repr(cls))}"
