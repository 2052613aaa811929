"""Fresh symbols for token counts: the one place that touches torch's private symbol API (tested on torch 2.11, 2.15).

A count written as an expression over the count before it grows with every layer and makes a 12-layer rewrite 50 times
slower.  A fresh *backed* symbol does not: it has the right value for the example and no history.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..counts import CountRule

_ALL_SYMBOLIC: ContextVar[bool] = ContextVar("tamis_all_counts_symbolic", default=False)
_NUMBER = itertools.count()


@contextmanager
def symbolic_counts() -> Iterator[None]:
    """While tracing inside, known token counts become symbols too, so that one compiled graph serves them all."""
    token = _ALL_SYMBOLIC.set(True)
    try:
        yield
    finally:
        _ALL_SYMBOLIC.reset(token)


def fresh_count(like: Tensor, axis: int, prefix: int, rule: list[int]) -> Any:
    """Tokens left of the `like.shape[axis]` before, while tracing.

    An int where the count before is an int (a symbol inside `symbolic_counts()`), else a fresh backed symbol; where a
    symbol has no example value (it is unbacked), the expression, for want of anything better.
    """
    before, count_rule = like.shape[axis], CountRule.from_flat(prefix, rule)
    if isinstance(before, int):
        shape_env = _shape_env(like) if _ALL_SYMBOLIC.get() else None
        after = count_rule.out(before)
        return after if shape_env is None else backed_symbol(shape_env, after)
    hint = before.node.hint if before.node.has_hint() else None
    return count_rule.out(before) if hint is None else backed_symbol(before.node.shape_env, count_rule.out(int(hint)))


def backed_symbol(shape_env: Any, value: int) -> torch.SymInt:
    """A new symbol of this ShapeEnv with `value` as its example, tied to nothing and not specialised at 0 or 1."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(f"__tamis_count_{next(_NUMBER)}")
    symbol = shape_env.create_symbol(
        value,
        source,
        dynamic_dim=DimDynamic.DYNAMIC,
        constraint_dim=None,
        do_not_specialize_zero_one=True,
    )
    return shape_env.create_symintnode(symbol, hint=value, source=source)


def _shape_env(like: Tensor) -> Any:
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([like])
    return mode.shape_env if mode is not None else None
