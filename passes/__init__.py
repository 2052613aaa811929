"""Rewrite passes.  Importing this package registers every method in `methods/`: a new file there is a new pass."""

if __name__ != "tamis.passes":
    raise ImportError("import tamis.passes, not passes: a second copy would register every op twice")

from importlib import import_module
from pkgutil import iter_modules

from . import methods
from .reduction import TokenReduction as TokenReduction

_found = {name: import_module(f"{methods.__name__}.{name}") for _, name, _ in iter_modules(methods.__path__)}

from ..rewrite import _REGISTRY  # noqa: E402

globals().update({cls.__name__: cls for cls in _REGISTRY.values()})
__all__ = ["TokenReduction", *sorted(cls.__name__ for cls in _REGISTRY.values())]
