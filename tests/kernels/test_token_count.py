"""Counts as graph values: exact, and fresh symbols while tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.counts import HALF, CountRule, at_most, keep_at_least
from tamis.kernels.symbols import backed_symbol, fresh_count, generic_examples, symbolic_counts

RULE = CountRule(1, (at_most(13), HALF))


def fake(tokens: int, *, dynamic: bool) -> tuple[Any, Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.STATIC, DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC, DimDynamic.STATIC]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode, mode.from_tensor(torch.empty(2, tokens, 4), symbolic_context=context)


@pytest.mark.parametrize("rule", [RULE, CountRule(2, (keep_at_least(0.7),), added=1), CountRule(0, (HALF,))])
def test_counts_are_those_of_the_rule(rule):
    for tokens in range(1, 60):
        got = torch.ops.tamis.token_count(torch.empty(1, tokens), 1, rule.prefix, rule.flat())
        assert got == rule.out(tokens)


def test_the_published_trace_of_vit():
    counts, rule = [197], CountRule(1, (at_most(16), HALF))
    for _ in range(12):
        counts.append(torch.ops.tamis.token_count(torch.empty(0, counts[-1]), 1, 1, rule.flat()))
    assert counts == [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]


def test_a_symbolic_count_gets_a_symbol_without_history():
    mode, x = fake(31, dynamic=True)
    with mode:
        count = fresh_count(x, 1, 1, RULE.flat())
    assert isinstance(count, torch.SymInt)
    assert count.node.hint == 18
    assert count.node.expr.is_Symbol
    assert count.node.expr not in x.shape[1].node.expr.free_symbols
    assert not x.shape[1].node.shape_env.guards


def test_twelve_layers_stay_symbols_in_a_trace():
    mode, x = fake(64, dynamic=True)

    def shrink(x):
        for _ in range(12):
            count = torch.ops.tamis.token_count(x, 1, 1, RULE.flat())
            x = torch.ops.tamis.restore_tokens(x, x.new_zeros((x.shape[0], count), dtype=torch.int64))
        return x

    with mode:
        traced = make_fx(shrink, tracing_mode="real", pre_dispatch=True)(x)
    counts = [node for node in traced.graph.nodes if node.target is torch.ops.tamis.token_count.default]
    symbols = {node.meta["val"].node.expr for node in counts}
    assert len(counts) == len(symbols) == 12
    assert all(symbol.is_Symbol for symbol in symbols)
    out = [64]
    for _ in range(12):
        out.append(RULE.out(out[-1]))
    assert traced(torch.empty(2, 64, 4)).shape == (2, out[-1], 4)
    assert traced(torch.empty(2, 300, 4)).shape == (2, 144, 4)


def test_a_known_count_is_a_number_unless_symbols_are_asked_for():
    mode, x = fake(31, dynamic=False)
    with mode:
        assert fresh_count(x, 1, 1, RULE.flat()) == 18
        with symbolic_counts():
            count = fresh_count(x, 1, 1, RULE.flat())
        assert isinstance(fresh_count(x, 1, 1, RULE.flat()), int)
    assert isinstance(count, torch.SymInt)
    assert (count.node.hint, count.node.expr.is_Symbol) == (18, True)


@pytest.mark.parametrize("value", [0, 1, 2])
def test_an_example_of_one_token_does_not_become_the_only_length(value):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    count = backed_symbol(mode.shape_env, value)
    with mode:
        total = torch.empty(count, 3) + torch.empty(1, 3)
    assert total.shape[0].node.maybe_as_int() is None
    assert total.shape[0].node.expr == count.node.expr


def test_generic_examples_keep_what_is_shared_and_what_is_known():
    mode, x = fake(3, dynamic=True)
    with mode:
        count = fresh_count(x, 1, 1, RULE.flat())
        y = x.new_empty((2, count, 4))
    new_mode, (new_x, new_y, new_count, number) = generic_examples([x, y, count, 7])
    assert (new_mode is mode, number) == (False, 7)
    assert new_x.fake_mode is new_mode
    assert new_x.shape[0] == 2
    assert new_y.shape[1].node.expr == new_count.node.expr
    assert new_x.shape[1].node.hint - 1 > new_count.node.hint > 1000
