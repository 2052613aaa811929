"""Attention and the log-sum-exp of its logits by one launch, where a statistic asked for the second.

    %out = tamis.attention(%q, %k, %v, %bias, %mask, scale, causal)     ->   %both = tamis.attention_with_lse(...)
    %lse = tamis.attention_lse(%q, %k, %bias, %mask, scale, causal)          %out = %both[0];  %lse = %both[1]

scaled_dot_product_attention counts as attention without a bias.  Operands must be the same nodes, or aliases of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels.attention import ATTENTION
from ..kernels.attention_lse import ATTENTION_LSE
from ..kernels.attention_with_lse import ATTENTION_WITH_LSE
from ..op import all_arguments
from .fusion import Fired, insert_op
from .splice import op_of

name = "attention"
CHAIN = ("attention", "attention_lse")
SDPA = torch.ops.aten.scaled_dot_product_attention.default
Operands = tuple[Any, ...]  # as attention_lse takes them


def apply(graph: fx.Graph) -> list[Fired]:
    """Fuse at every attention_lse."""
    known: dict[Operands, fx.Node] = {}
    sums: dict[Operands, fx.Node] = {}
    fired = []
    for node in list(graph.nodes):
        operands = _operands(node)
        if operands is not None:
            known[operands] = node
        elif op_of(node) is ATTENTION_LSE:
            fired.append(_fuse(node, known, sums))
    return fired


def _operands(node: fx.Node) -> Operands | None:
    """What the log-sum-exp of an attention node would be taken of; None for other nodes."""
    if op_of(node) is ATTENTION:
        q, k, _, key_bias, mask, scale, causal, *softcap = _all_arguments(node)
        return None if softcap[0] is not None else (q, k, key_bias, mask, scale, causal)
    if node.target is SDPA:
        q, k, _, mask, dropout, causal, scale, _ = _all_arguments(node)
        width = q.meta["val"].shape[-1]
        if dropout or not isinstance(width, int) or q.meta["val"].dim() != 4:
            return None
        return q, k, None, mask, width**-0.5 if scale is None else scale, causal
    return None


def _all_arguments(node: fx.Node) -> list[Any]:
    """The arguments with defaults, each as the node that computes it."""
    return [_behind(value) for value in all_arguments(node.target, node.args, node.kwargs)]


def _behind(value: Any) -> Any:
    while isinstance(value, fx.Node) and value.target is torch.ops.aten.alias.default:
        value = value.args[0]
    return value


def _fuse(lse: fx.Node, known: dict[Operands, fx.Node], sums: dict[Operands, fx.Node]) -> Fired:
    operands = tuple(_all_arguments(lse))
    reason = "" if operands in sums else _why_not(operands, known)
    fired = Fired.at(lse, name, () if reason else CHAIN, (reason,) if reason else ())
    if reason:
        return fired
    if operands not in sums:
        attention = known[operands]
        q, k, *rest = operands
        out, sums[operands] = insert_op(ATTENTION_WITH_LSE, (q, k, attention.args[2], *rest), attention)
        attention.replace_all_uses_with(out)
        attention.graph.erase_node(attention)
    lse.replace_all_uses_with(sums[operands])
    lse.graph.erase_node(lse)
    return fired


def _why_not(operands: Operands, known: dict[Operands, fx.Node]) -> str:
    from ..kernels.triton.attention_with_lse import TWIN

    if operands in known:
        q, k, *rest = fx.map_arg(operands, lambda one: one.meta["val"])
        return TWIN.why_not(q, k, known[operands].args[2].meta["val"], *rest)  # type: ignore[union-attr]
    if any(q is operands[0] and k is operands[1] for q, k, *_ in known):
        return "the attention of these queries and keys has another mask, bias or scale"
    return f"no attention has the queries {operands[0].name} and the keys {operands[1].name}"
