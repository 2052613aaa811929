"""Rewrite passes.  Importing this package registers every method in `methods/`: a new file there is a new pass."""

if __name__ != "tamis.passes":
    raise ImportError("import tamis.passes, not passes: a second copy would register every op twice")

from importlib import import_module
from pkgutil import iter_modules

from . import methods
from .plans import keep_plan as keep_plan
from .plans import match_plan as match_plan
from .reduction import TokenReduction as TokenReduction

_found = {name: import_module(f"{methods.__name__}.{name}") for _, name, _ in iter_modules(methods.__path__)}

from ..registry import _REGISTRY, origin_of  # noqa: E402

_own = [cls for cls in _REGISTRY.values() if origin_of(cls) == "tamis"]
globals().update({cls.__name__: cls for cls in _own})
__all__ = ["TokenReduction", "keep_plan", "match_plan", *sorted(cls.__name__ for cls in _own)]
