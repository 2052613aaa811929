"""Traces of functions that are used again where only the names of symbols differ.

Twelve layers call an op twelve times; with counts as symbols the calls trace to the same nodes.  A trace costs ten
times what a copy does.  It is made with large examples for all symbols, so that what it decides holds for every length;
where tokens are a number and their count a symbol, the number decides, and only the same example may use it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..kernels.symbols import generic_examples


class Template:
    """What a function of a node's arguments traces to, over symbols of its own."""

    def __init__(self, node: fx.Node, shape: Shape, function: Callable[..., Any], mode: Any) -> None:
        inputs = node.all_input_nodes
        values, self.symbols = [one.meta["val"] for one in inputs], shape.symbols
        if shape.is_open:
            symbols = [mode.shape_env.create_symintnode(symbol, hint=None) for symbol in shape.symbols]
            mode, generic = generic_examples([*values, *symbols])
            values, self.symbols = generic[: len(inputs)], [one.node.expr for one in generic[len(inputs) :]]
            assert all(size >= 0 for value in values for size in _example(value))
        values = _each_its_own(values, mode)

        def call(*values: Any) -> Any:
            by_node = dict(zip(inputs, values, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), by_node.__getitem__)
            return function(*args, **kwargs)

        tracer = make_fx(call, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
        with torch.no_grad(), mode:
            traced = tracer(*values)
        self.graph = traced.graph
        self.graph.eliminate_dead_code()


def _each_its_own(values: list[Any], mode: Any) -> list[Any]:
    """The values, none of them the same tensor twice: the tracer would take two inputs for one."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor) and any(value is other for other in found):
            with mode:
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        found.append(value)
    return found


class Shape:
    """What a trace depends on: the arguments of a node, its symbols numbered in the order in which they appear."""

    def __init__(self, node: fx.Node) -> None:
        self.symbols: list[Any] = []
        inputs = {one: i for i, one in enumerate(node.all_input_nodes)}
        arguments = repr(fx.map_arg((node.args, node.kwargs), lambda n: f"{inputs[n]}:{self._value(n.meta['val'])}"))
        tokens_known = any(_has_known_tokens(one.meta["val"]) for one in inputs)
        # a symbol alone is the batch, whose example is as good as any
        self.is_open = len(self.symbols) > 1 and not tokens_known
        examples = [] if self.is_open else [_example(one.meta["val"]) for one in inputs]
        self.key = f"{arguments}{examples}"

    def _value(self, value: Any) -> str:
        if not isinstance(value, Tensor):
            return self._size(value)
        sizes = [self._size(one) for one in (*value.shape, *value.stride())]
        return f"{value.dtype}{value.device}{sizes}"

    def _size(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self.symbols:
                self.symbols.append(symbol)
        return str(expression.xreplace({s: _Numbered(self.symbols.index(s)) for s in expression.free_symbols}))


def _has_known_tokens(value: Any) -> bool:
    """Whether the token axis of a tensor ([B, N], [B, N, C], [B, H, N, D]) is a number other than 1."""
    axis = 2 if isinstance(value, Tensor) and value.ndim == 4 else 1
    if not isinstance(value, Tensor) or value.ndim <= axis:
        return False
    tokens = value.shape[axis]
    is_number = not isinstance(tokens, torch.SymInt) or tokens.node.expr.is_number  # a symbol may have become one
    return is_number and int(tokens) != 1


def _example(value: Any) -> tuple[Any, ...]:
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes)


def _Numbered(index: int) -> Any:
    import sympy

    return sympy.Symbol(f"n{index}", integer=True)


class Renaming:
    """Values of a trace as values of another fake mode, with that mode's symbols in place of the trace's own."""

    def __init__(self, mode: Any, symbols: dict[Any, Any]) -> None:
        self.mode = mode
        self.symbols = symbols
        self.known: dict[Any, Any] = {}

    def __call__(self, value: Any) -> Any:
        """The value (tensor, size, or several) renamed."""
        return pytree.tree_map(self._one, value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if not isinstance(value, Tensor):
            return value
        sizes, strides = (tuple(map(self._size, one)) for one in (value.shape, value.stride()))
        key = value.dtype, value.device, *(getattr(one, "node", one) for one in (*sizes, *strides))
        if key not in self.known:  # one tensor stands for all of a shape: making them is what takes time here
            with self.mode:
                self.known[key] = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return self.known[key]

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        if expression not in self.known:
            renamed = expression.xreplace(self.symbols)
            known = int(renamed) if renamed.is_number else self.mode.shape_env.create_symintnode(renamed, hint=None)
            self.known[expression] = known
        return self.known[expression]
