"""Recognising attention written out as matmul, softmax, matmul, and saying why one is not recognised."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from ..kernels.quantized_attention import PROBABILITIES
from .attention_logits import MATMULS, PASSED_ON, Mask, NearMiss, Rounding, read_logits
from .attention_operands import ends_of, keys_of, without_scale
from .folded import NotFolded, Unfolder
from .nodes import MOVES, RESHAPES, op_of, same_shape
from .quantizers import quantizer_of

SOFTMAXES = {"aten.softmax", "aten._softmax", "aten.special_softmax"}


@dataclass
class Match:
    """One attention: softmax(q @ keys * scale, capped, then `masks` from the inside out) @ v, ending in `out`."""

    q: fx.Node
    k: fx.Node
    transposed: bool  # whether k is [..., D, M], as the product takes it
    v: fx.Node
    out: fx.Node
    scale: float
    softcap: float | None = None  # the logits x are softcap * tanh(x / softcap)
    masks: list[Mask] = field(default_factory=list)
    unfolder: Unfolder | None = None  # where heads are folded into the batch
    zeros: bool = False  # whether a query without any key gets zeros
    rounded: list[Rounding] = field(default_factory=list)  # by place: values that are quantised on the way


def find_near_misses(graph: fx.Graph) -> list[NearMiss]:
    """Every softmax whose result is multiplied by a matrix, with what keeps it from being raised."""
    found = []
    for node in graph.nodes:
        try:
            match_attention(node)
        except NearMiss as miss:
            found.append(replace(miss, node=node.name))
    return found


def match_attention(softmax: fx.Node) -> Match | None:
    """The attention around a softmax; None if it is no attention; raises NearMiss."""
    if op_of(softmax) not in SOFTMAXES or not isinstance(softmax.args[0], fx.Node):
        return None
    ends = ends_of(softmax)
    probabilities = ends[-1]
    out = _product(probabilities)
    if out is None:
        _require_nothing_like_it(probabilities)
        return None
    dims = _value(softmax).ndim
    if softmax.args[1] not in (-1, dims - 1):
        raise NearMiss(1, f"the softmax is over axis {softmax.args[1]}, not the last one")
    if dims not in (3, 4):
        raise NearMiss(1, f"its logits have {dims} axes, not 4 (batch, heads, queries, keys)")
    _require_unused(softmax, out)
    logits = read_logits(softmax.args[0])
    product, masks, rounded = logits.product, logits.masks, list(logits.rounded)
    if not same_shape(_value(softmax).shape, _value(out.args[0]).shape):
        raise NearMiss(4, f"the probabilities are reshaped before they meet the values (at {out.name})")
    rounded += [Rounding(PROBABILITIES, one) for end in ends if (one := quantizer_of(end))]
    # what is rounded is calibrated with the scale inside
    q, q_scale = (product.args[-2], 1.0) if rounded else without_scale(product.args[-2])
    k, transposed, k_scale = keys_of(product.args[-1], scaled=not rounded)
    v = out.args[1]
    if len({_value(x).dtype for x in (q, k, v)}) > 1:
        raise NearMiss(4, "queries, keys and values have different types")
    if any(_value(x).ndim != dims for x in (q, k, v)):
        raise NearMiss(4, f"queries, keys and values do not all have {dims} axes")
    unfolder = _unfolder(q, k, v, out, masks) if dims == 3 else None
    scale, zeros = logits.scale * q_scale * k_scale, any(op_of(end) == "aten.where" for end in ends)
    return Match(q, k, transposed, v, out, scale, logits.softcap, masks, unfolder, zeros, rounded)


def _unfolder(q: fx.Node, k: fx.Node, v: fx.Node, out: fx.Node, masks: list[Mask]) -> Unfolder:
    """What gives heads their axis back, once it is sure that it can for all that goes in."""
    try:
        unfolder = Unfolder(out, _value(q).shape[0])
        for node in (q, k, v):
            unfolder.check(node)
        for node in _mask_nodes(masks):
            unfolder.check_mask(node)
    except NotFolded as reason:
        raise NearMiss(4, str(reason)) from None
    return unfolder


def _mask_nodes(masks: list[Mask]) -> list[fx.Node]:
    return [node for mask in masks for node in mask[1:] if isinstance(node, fx.Node)]


def _product(softmax: fx.Node) -> fx.Node | None:
    """The matmul with the probabilities on its left, through casts (and reshapes); None if there is none."""
    for user in softmax.users:
        if op_of(user) in MATMULS and user.args[0] is softmax:
            return user
        if op_of(user) in PASSED_ON | RESHAPES and user.args[0] is softmax:
            return _product(user)
    return None


def _require_nothing_like_it(softmax: fx.Node) -> None:
    """Raise NearMiss where the probabilities meet other values than in a product with them on its left."""
    if _value(softmax).ndim < 3:
        return
    for user in softmax.users:
        if op_of(user) in MATMULS and user.args[1] is softmax:
            where = f"on the right of their product (at {user.name})"
            raise NearMiss(0, f"the probabilities are {where}, not in front of the values")
        if op_of(user) == "aten.einsum":
            raise NearMiss(0, f"the values are mixed by aten.einsum (at {user.name}), not by a product")
        if op_of(user) in PASSED_ON | RESHAPES | MOVES | {"aten.mT"} and user.args[0] is softmax:
            _require_nothing_like_it(user)


def _require_unused(softmax: fx.Node, out: fx.Node) -> None:
    between, pending = {out}, [out.args[0]]
    while pending:
        node: Any = pending.pop()
        if node not in between and node is not softmax:
            between.add(node)
            pending.extend(node.all_input_nodes)
    inside = [softmax]
    for node in inside:
        if any(user not in between for user in node.users):
            others = ", ".join(u.name for u in node.users if u not in between and op_of(u) not in PASSED_ON) or "a cast"
            raise NearMiss(2, f"the probabilities are used elsewhere too (by {others})")
        inside.extend(user for user in node.users if user is not out)


def _value(node: Any) -> Tensor:
    return node.meta["val"]
