"""Attention whose queries share key-value heads, without the copies that give every query head its own.

%u = unsqueeze(%k, 2); %e = expand(%u, [B, 2, 4, N, 64]); %r = reshape(%e, [B, 8, N, 64])      k: [B, 2, N, 64]
attention(%q, %r, ...)                            ->      attention(%q, %k, ..., enable_gqa=True)
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..graph import op_name
from .sites import NAMES, SDPA

COPIES = {"expand", "unsqueeze", "reshape", "view", "_unsafe_view", "flatten", "clone", "contiguous", "repeat"}
COPIES |= {"repeat_interleave", "index_select"}


def share_heads(graph: fx.Graph) -> None:
    """Give attention its key-value heads as they were before each was repeated for a group of query heads, in place.

    However the repetition is spelled, it is run on numbers and must be that of grouped queries: query head h reads
    key-value head h // (H / Hk).  Keys and values are changed together or not at all.
    """
    for node in graph.nodes:
        if node.target in NAMES:
            k, v = map(_unrepeated, node.args[1:3])
            if k is not None and v is not None and k.meta["val"].shape[1] == v.meta["val"].shape[1]:
                node.args = (node.args[0], k, v, *node.args[3:])
                if node.target is SDPA:  # ours shares heads without being told
                    node.update_kwarg("enable_gqa", True)


def _unrepeated(repeated: fx.Node) -> fx.Node | None:
    """The value [B, Hk, N, D] with the fewest heads that `repeated` [B, H, N, D] repeats; None if there is none."""
    best, chain, node = None, [], repeated
    while node.op == "call_function" and op_name(node) in COPIES:
        chain.append(node)
        node = node.args[0]
        if _has_fewer_heads(node, repeated) and _repeats(node, list(reversed(chain))):
            best = node
    return best


def _has_fewer_heads(node: Any, repeated: fx.Node) -> bool:
    few, many = (one.meta.get("val") if isinstance(one, fx.Node) else None for one in (node, repeated))
    if not isinstance(few, Tensor) or not isinstance(many, Tensor) or few.dim() != 4 or many.dim() != 4:
        return False
    heads = (few.shape[1], many.shape[1])
    return all(isinstance(h, int) for h in heads) and heads[0] < heads[1] and heads[1] % heads[0] == 0


def _repeats(start: fx.Node, chain: list[fx.Node]) -> bool:
    """Whether the chain of nodes after `start` repeats each head of it so many times in a row."""
    sizes = _Sizes()
    shape = [sizes(size) for size in start.meta["val"].shape]
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    env = {start: numbers}

    def value(arg: fx.Node) -> Any:
        return env[arg] if arg in env else sizes(arg.meta["val"])

    try:
        for node in chain:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # it needs a tensor that is not there, or sizes that numbers made up here do not fit
        return False
    heads = chain[-1].meta["val"].shape[1]
    return torch.equal(env[chain[-1]], numbers.repeat_interleave(heads // shape[1], 1))


class _Sizes:
    """Numbers for sizes: each symbol gets a prime of its own, so that equal numbers are equal sizes."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def __call__(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.numbers.setdefault(symbol, int(sympy.prime(len(self.numbers) + 2)))
        return int(expression.subs(self.numbers))
