"""Attention written out as matmul, softmax, matmul, raised to one `scaled_dot_product_attention` node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..kernels.attention import ATTENTION
from ..kernels.quantized_attention import QUANTIZED_ATTENTION
from .attention_logits import NearMiss
from .attention_match import Match, find_near_misses, match_attention
from .nodes import new_node

aten = torch.ops.aten
__all__ = ["find_near_misses", "raise_attention"]


def raise_attention(graph: fx.Graph) -> list[fx.Node]:
    """Raise every written-out attention of the graph, in place; dead nodes are left to dead code elimination.

    The pattern is softmax over the last axis of `q @ k^T` of q and k with a head axis, or with heads folded into the
    batch axis by a reshape (they get their axis back); with any of: scaling of q, k or the logits by numbers; a soft
    cap (tanh); masks and biases added, filled in or selected; casts around the softmax, and zeros for rows without any
    key; `@ v`.  The probabilities must have no other use.  The node is scaled_dot_product_attention, or with a soft
    cap tamis.attention, with `scale` and `attn_mask` (additive, in q's dtype; boolean masks get the model's own
    negative value, so that rows stay finite).  Where logits or probabilities are rounded to integers it is
    tamis.quantized_attention.

    Returns the new nodes.  See `find_near_misses` for those that do not fit.
    """
    made = []
    for node in list(graph.nodes):
        try:
            match = match_attention(node)
        except NearMiss:
            continue
        if match is not None:
            made.append(_emit(graph, match))
    return made


def _emit(graph: fx.Graph, match: Match) -> fx.Node:
    with graph.inserting_before(match.out):
        match = _with_heads_apart(match)
        mask = _additive(graph, match)
        if mask is not None and mask.meta["val"].dim() < 2:  # a bias [keys], the same for every query
            mask = new_node(match.out, aten.unsqueeze.default, (mask, 0))
        k = new_node(match.out, aten.transpose.int, (match.k, -2, -1)) if match.transposed else match.k
        if match.rounded:
            rounded = ([getattr(one.quantizer, part) for one in match.rounded] for part in ("scale", "zero"))
            args = (match.q, k, match.v, None, mask, match.scale, False, *rounded, [one.place for one in match.rounded])
            node = _named(match, QUANTIZED_ATTENTION.call, args, {})
        elif match.softcap is None:
            kwargs = {"scale": match.scale} if mask is None else {"attn_mask": mask, "scale": match.scale}
            node = _named(match, aten.scaled_dot_product_attention.default, (match.q, k, match.v), kwargs)
        else:
            args = (match.q, k, match.v, None, mask, match.scale, False, match.softcap)
            node = _named(match, ATTENTION.call, args, {})
    if match.unfolder is None:
        match.out.replace_all_uses_with(node)
    else:
        match.unfolder.refold(match.out, node)
    return node


def _named(match: Match, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    return new_node(match.out, op, args, kwargs, op._schema.name.split("::")[1])


def _with_heads_apart(match: Match) -> Match:
    apart = match.unfolder
    if apart is None:
        return match

    def meets(value: Any) -> Any:
        return apart.unfold_mask(value) if isinstance(value, fx.Node) else value

    masks = [(kind, meets(condition), meets(value)) for kind, condition, value in match.masks]
    q, k, v = (apart.unfold(x) for x in (match.q, match.k, match.v))
    return replace(match, q=q, k=k, v=v, masks=masks)


def _additive(graph: fx.Graph, match: Match) -> fx.Node | None:
    """One tensor in q's dtype that added to the logits does what all masks do."""
    total: fx.Node | None = None
    for kind, condition, value in match.masks:
        if kind != "add":
            values = (value, 0.0) if kind == "fill" else (0.0, value)
            value = new_node(match.out, aten.where.Scalar, (condition, *values))
        term = _cast(graph, value, match)
        total = term if total is None else new_node(match.out, aten.add.Tensor, (total, term))
    if len(match.masks) < 2 or total is None or match.zeros:
        return total
    # two masks may add up to -inf, and a row of nothing else to NaN, where filling twice stays finite
    return new_node(match.out, aten.clamp.default, (total, torch.finfo(match.q.meta["val"].dtype).min))


def _cast(graph: fx.Graph, node: fx.Node, match: Match) -> fx.Node:
    dtype = match.q.meta["val"].dtype
    return node if node.meta["val"].dtype == dtype else new_node(match.out, aten.to.dtype, (node, dtype))
