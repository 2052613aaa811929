"""Comparing sizes that may be symbolic."""

from __future__ import annotations

from typing import Any

import torch


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same expression, without adding a guard."""
    first, second = (x.node.expr if isinstance(x, torch.SymInt) else int(x) for x in (a, b))
    return bool(first == second)
