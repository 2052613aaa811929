"""tamis: fewer tokens for transformer models, as a rewrite of their graph.

    fast = tamis.compile(model, (images,), passes="tome:r=13")

Public names are imported when first used, so that `import tamis` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "compile": "runtime.api",
    "load": "runtime.api",
    "attention_recall": "runtime.recall",
    "calibrate": "runtime.calibrate",
    "find_break_even": "runtime.break_even",
    "Calibration": "runtime.calibrate",
    "CompiledModel": "runtime.compiled",
    "Recipe": "runtime.recipe",
    "TokenGraph": "graph",
    "Tokens": "tokens",
    "Plan": "tokens",
    "Schedule": "schedule",
    "Pass": "rewrite",
    "Outcome": "rewrite",
    "Pipeline": "rewrite",
    "register": "registry",
    "Target": "target",
    "TamisError": "errors",
}
_MODULES = {"passes": "passes", "prompts": "runtime.prompts"}

if TYPE_CHECKING:
    from . import passes as passes
    from .errors import TamisError as TamisError
    from .graph import TokenGraph as TokenGraph
    from .registry import register as register
    from .rewrite import Outcome as Outcome
    from .rewrite import Pass as Pass
    from .rewrite import Pipeline as Pipeline
    from .runtime import prompts as prompts
    from .runtime.api import compile as compile
    from .runtime.api import load as load
    from .runtime.break_even import find_break_even as find_break_even
    from .runtime.calibrate import Calibration as Calibration
    from .runtime.calibrate import calibrate as calibrate
    from .runtime.compiled import CompiledModel as CompiledModel
    from .runtime.recall import attention_recall as attention_recall
    from .runtime.recipe import Recipe as Recipe
    from .schedule import Schedule as Schedule
    from .target import Target as Target
    from .tokens import Plan as Plan
    from .tokens import Tokens as Tokens

__all__ = ["__version__", *_MODULES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tamis' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
