"""Which samples of an op are like an earlier one: those are left to `--full` where a test is slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch


def one_of_each_kind(cases: Iterable[Any]) -> list[Any]:
    """The cases, each (op, ..., args); those with arguments of the same kinds as an earlier one's are marked `full`.

    What kernels and references branch on is there once: which arguments there are, types, ranks, flags, and numbers
    that are 0.  Lengths and contents differ within a kind.
    """
    seen: set[Any] = set()

    def marks(case: Any) -> list[Any]:
        kinds = (case.values[0].name, *map(kind, case.values[-1]))
        if kinds in seen:
            return [pytest.mark.full]
        seen.add(kinds)
        return []

    return [pytest.param(*case.values, id=case.id, marks=marks(case)) for case in cases]


def kind(arg: Any) -> Any:
    """What of an argument a reference may branch on."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.dim()
    if isinstance(arg, list | tuple):
        return len(arg)
    return arg if arg is None or isinstance(arg, bool | str) else (type(arg), arg == 0)
