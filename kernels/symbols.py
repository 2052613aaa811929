"""Fresh symbols for token counts: the one place that touches torch's private symbol API (tested on torch 2.11, 2.15).

A count written as an expression over the count before it grows with every layer and makes a 12-layer rewrite 50 times
slower.  A fresh *backed* symbol does not: it has the right value for the example and no history.

Torch specialises a symbolic size whose example is 0 or 1: from then on the symbol *is* that number, and a graph traced
at 3 tokens is wrong at 30.  So examples made here are never 0 or 1, and `generic_examples` gives large ones to trace
with, whatever the example of the model was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..counts import CountRule

_ALL_SYMBOLIC: ContextVar[bool] = ContextVar("tamis_all_counts_symbolic", default=False)
_LENGTHS_WRITTEN_OUT: ContextVar[bool] = ContextVar("tamis_lengths_written_out", default=False)
# Per ShapeEnv, so that names, which files hold, do not depend on what was captured before.
_NUMBERS: WeakKeyDictionary[Any, itertools.count[int]] = WeakKeyDictionary()


@contextmanager
def symbolic_counts() -> Iterator[None]:
    """While tracing inside, known token counts become symbols too, so that one compiled graph serves them all."""
    token = _ALL_SYMBOLIC.set(True)
    try:
        yield
    finally:
        _ALL_SYMBOLIC.reset(token)


@contextmanager
def lengths_written_out() -> Iterator[None]:
    """While a compiler traces inside, whose counts are all inputs: lengths are differences of counts.

    A symbol made here would be one whose value it cannot know when it is called.
    """
    token = _LENGTHS_WRITTEN_OUT.set(True)
    try:
        yield
    finally:
        _LENGTHS_WRITTEN_OUT.reset(token)


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


def spare_length(tokens: Any, out: Any) -> Any:
    """Length of `moved`, N - N', while tracing: a fresh symbol where that is symbolic, so that no example can be 1."""
    length = tokens - out
    if isinstance(length, int) or not length.node.has_hint() or _LENGTHS_WRITTEN_OUT.get():
        return length
    return backed_symbol(length.node.shape_env, int(length.node.hint))


def backed_symbol(shape_env: Any, value: int) -> torch.SymInt:
    """A new symbol of this ShapeEnv with `value`, at least 2, as its example, and tied to nothing."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    number = next(_NUMBERS.setdefault(shape_env, itertools.count()))
    source, value = ConstantSource(f"__tamis_count_{number}"), max(value, 2)
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


def generic_examples(values: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Fake tensors and counts as they are, but over new symbols with large examples, in a new fake mode.

    What is traced with them holds for every length.  Symbols made later get smaller examples, as counts do; sizes that
    shared a symbol still do, and numbers stay numbers.  -> (the mode, the values)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    new: dict[Any, Any] = {}
    for number in (n for value in values for n in _numbers(value) if isinstance(n, torch.SymInt)):
        known = list(number.node.shape_env.var_to_range)
        for symbol in number.node.expr.free_symbols - new.keys():
            new[symbol] = backed_symbol(shape_env, 4096 - 17 * known.index(symbol)).node.expr

    def renamed(number: Any) -> Any:
        if not isinstance(number, torch.SymInt):
            return number
        expression = number.node.expr.xreplace(new)
        example = getattr(shape_env, "optimization_hint", None) or shape_env.size_hint  # the second is torch 2.11's
        return shape_env.create_symintnode(expression, hint=int(example(expression)))

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return renamed(value)
        shape, stride = ([renamed(n) for n in numbers] for numbers in (value.shape, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)

    with mode:
        return mode, [one(value) for value in values]


def _numbers(value: Any) -> list[Any]:
    return [*value.shape, *value.stride()] if isinstance(value, Tensor) else [value]
