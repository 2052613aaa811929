"""Attention written out as matmul, softmax, matmul, raised to one `scaled_dot_product_attention` node."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.attention import ATTENTION

aten = torch.ops.aten
Mask = tuple[str, Any, Any]  # ("add", None, bias) or ("fill" / "keep", condition, value at hidden / other keys)

MATMULS = {"aten.matmul", "aten.bmm"}
SOFTMAXES = {"aten.softmax", "aten._softmax", "aten.special_softmax"}
HIDDEN = -1e4  # what half-precision models use; the softmax of anything below is zero
PASSED_ON = {"aten.to", "aten._to_copy", "aten.type_as", "aten.clone", "aten.contiguous"}


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


class NearMiss(Exception):
    """The softmax is part of an attention that cannot be raised; the text says why."""


def raise_attention(graph: fx.Graph) -> list[fx.Node]:
    """Raise every written-out attention of the graph, in place; dead nodes are left to dead code elimination.

    The pattern is softmax over the last axis of `q @ k^T` of 4-D q and k (one head axis), with any of: scaling of q,
    k or the logits by numbers; a soft cap (tanh); masks and biases added, filled in or selected; casts around the
    softmax; `@ v`.  The probabilities must have no other use.  The node is scaled_dot_product_attention, or with a soft
    cap tamis.attention.  It has `attn_mask` (additive, in q's dtype; boolean masks are made
    additive with the model's own negative value, so that rows without any key stay finite) and `scale`.

    Returns the new nodes.  See `find_near_misses` for those that do not fit.
    """
    made = []
    for node in list(graph.nodes):
        try:
            match = _match(node)
        except NearMiss:
            continue
        if match is not None:
            made.append(_emit(graph, match))
    return made


def find_near_misses(graph: fx.Graph) -> list[tuple[str, str]]:
    """(name of the softmax node, why it was not raised) for every softmax whose result is multiplied by a matrix."""
    found = []
    for node in graph.nodes:
        try:
            _match(node)
        except NearMiss as reason:
            found.append((node.name, str(reason)))
    return found


# --- recognising ----------------------------------------------------------------------------------------------------


def _match(softmax: fx.Node) -> Match | None:
    """The attention around a softmax; None if it is no attention; raises NearMiss."""
    if _op(softmax) not in SOFTMAXES or not isinstance(softmax.args[0], fx.Node):
        return None
    out = _product(softmax)
    if out is None:
        return None
    dims = _value(softmax).ndim
    if softmax.args[1] not in (-1, dims - 1):
        raise NearMiss(f"the softmax is over axis {softmax.args[1]}, not the last one")
    if dims != 4:
        raise NearMiss(f"its logits have {dims} axes, not 4 (batch, heads, queries, keys)")
    _require_unused(softmax, out)
    product, masks, scale, softcap = _logits(softmax.args[0])
    q, q_scale = _scaled(product.args[0])
    k, transposed, k_scale = _keys(product.args[1])
    v = out.args[1]
    if len({_value(x).dtype for x in (q, k, v)}) > 1:
        raise NearMiss("queries, keys and values have different types")
    if any(_value(x).ndim != 4 for x in (q, k, v)):
        raise NearMiss("queries, keys and values do not all have 4 axes")
    return Match(q, k, transposed, v, out, scale * q_scale * k_scale, softcap, masks)


def _product(softmax: fx.Node) -> fx.Node | None:
    """The matmul with the probabilities on its left, through casts; None if there is none."""
    for user in softmax.users:
        if _op(user) in MATMULS and user.args[0] is softmax:
            return user
        if _op(user) in PASSED_ON and user.args[0] is softmax:
            return _product(user)
    return None


def _require_unused(softmax: fx.Node, out: fx.Node) -> None:
    node = softmax
    while node is not out:
        if len(node.users) > 1:
            others = ", ".join(u.name for u in node.users if u is not out and _op(u) not in PASSED_ON) or "a cast"
            raise NearMiss(f"the probabilities are used elsewhere too (by {others})")
        node = next(iter(node.users))


def _logits(node: Any) -> tuple[fx.Node, list[Mask], float, float | None]:
    """Walk from the softmax's input to `q @ k^T`: it, masks from the inside out, scale and soft cap."""
    masks: list[Mask] = []
    scale, scaled, softcap = 1.0, "", None
    while _op(node) not in MATMULS:
        factor = _factor(node)
        if factor is not None:
            scale, scaled = scale * factor, node.name
            node = node.args[0]
        elif (mask := _mask(node)) is not None:
            if scaled or softcap is not None:
                how = f"scaled (at {scaled})" if scaled else "capped"
                raise NearMiss(f"the logits are {how} after a mask was applied (at {node.name})")
            node, addition = mask
            masks.insert(0, addition)
        elif _op(node) in PASSED_ON:
            node = node.args[0]
        elif _op(node) == "aten.tanh" and softcap is None and scale > 0:
            softcap, scale, scaled, node = scale, 1.0, "", node.args[0]
        else:
            raise NearMiss(f"{_name(node)} stands between the product of queries and keys and the softmax")
    return node, masks, scale * (softcap or 1.0), softcap


def _mask(node: Any) -> tuple[fx.Node, Mask] | None:
    """(logits before, what is done to them) if the node adds a bias or hides keys."""
    match _op(node):
        case "aten.add" if isinstance(node.args[1], fx.Node) and node.kwargs.get("alpha", 1) == 1:
            left, right = node.args
            inside, bias = (left, right) if _leads_to_product(left) else (right, left)
            return inside, ("add", None, bias)
        case "aten.masked_fill":
            return node.args[0], ("fill", node.args[1], _hiding(node.args[2]))
        case "aten.where" if _leads_to_product(node.args[1]):
            return node.args[1], ("keep", node.args[0], _hiding(node.args[2]))
        case "aten.where" if _leads_to_product(node.args[2]):
            return node.args[2], ("fill", node.args[0], _hiding(node.args[1]))
    return None


def _hiding(value: Any) -> float:
    """The number that hidden logits are set to; adding it has the same effect only if it is very negative."""
    number = value
    if _op(value) == "aten.full":
        number = value.args[1]
    elif _op(value) == "aten.scalar_tensor":
        number = value.args[0]
    if not isinstance(number, int | float):
        raise NearMiss(f"hidden logits are set to {_name(value)}, which is not a constant")
    if number > HIDDEN:
        raise NearMiss(f"hidden logits are set to {number}, which does not hide them")
    return float(number)


def _leads_to_product(node: Any) -> bool:
    """Whether walking towards the inputs, through what may stand between, ends at a matmul of this site's shape."""
    while isinstance(node, fx.Node):
        if _op(node) in MATMULS:
            return True
        if _op(node) in {"aten.add", "aten.where"}:
            return any(_leads_to_product(a) for a in node.args)
        if _op(node) not in {"aten.mul", "aten.div", "aten.masked_fill", "aten.tanh", *PASSED_ON}:
            return False
        node = node.args[0]
    return False


def _scaled(node: Any) -> tuple[fx.Node, float]:
    """The value without the numbers it is multiplied by, and their product."""
    factor = _factor(node)
    if factor is not None:
        inside, more = _scaled(node.args[0])
        return inside, factor * more
    return node, 1.0


def _keys(node: Any) -> tuple[fx.Node, bool, float]:
    """(keys, whether they are still transposed, scale) from the right operand of the product."""
    node, scale = _scaled(node)
    if not _is_transposed(node):
        return node, True, scale
    inside, more = _scaled(node.args[0])
    return inside, False, scale * more


def _factor(node: Any) -> float | None:
    if (
        _op(node) in {"aten.mul", "aten.div"}
        and isinstance(node.args[1], int | float)
        and "rounding_mode" not in node.kwargs
    ):
        return float(node.args[1]) if _op(node) == "aten.mul" else 1.0 / float(node.args[1])
    return None


def _is_transposed(node: Any) -> bool:
    """Whether the node swaps the last two axes of its argument."""
    dims = _value(node).ndim if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) else 0
    if dims < 2:
        return False
    if _op(node) == "aten.transpose":
        return {axis % dims for axis in node.args[1:3]} == {dims - 2, dims - 1}
    if _op(node) == "aten.permute":
        return [axis % dims for axis in node.args[1]] == [*range(dims - 2), dims - 1, dims - 2]
    return _op(node) == "aten.mT"


# --- rewriting ------------------------------------------------------------------------------------------------------


def _emit(graph: fx.Graph, match: Match) -> fx.Node:
    with graph.inserting_before(match.out):
        mask = _additive(graph, match)
        k = _call(graph, match, aten.transpose.int, (match.k, -2, -1)) if match.transposed else match.k
        if match.softcap is None:
            kwargs = {"scale": match.scale} if mask is None else {"attn_mask": mask, "scale": match.scale}
            node = _named(graph, aten.scaled_dot_product_attention.default, (match.q, k, match.v), kwargs)
        else:
            args = (match.q, k, match.v, None, mask, match.scale, False, match.softcap)
            node = _named(graph, ATTENTION.call, args, {})
    node.meta = copy.copy(match.out.meta)
    match.out.replace_all_uses_with(node)
    return node


def _named(graph: fx.Graph, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    return graph.create_node("call_function", op, args, kwargs, op._schema.name.split("::")[1])


def _additive(graph: fx.Graph, match: Match) -> fx.Node | None:
    """One tensor in q's dtype that added to the logits does what all masks do."""
    total: fx.Node | None = None
    for kind, condition, value in match.masks:
        if kind != "add":
            values = (value, 0.0) if kind == "fill" else (0.0, value)
            value = _call(graph, match, aten.where.Scalar, (condition, *values))
        term = _cast(graph, value, match)
        total = term if total is None else _call(graph, match, aten.add.Tensor, (total, term))
    if len(match.masks) < 2 or total is None:
        return total
    # two masks may add up to -inf, and a row of nothing else to NaN, where filling twice stays finite
    return _call(graph, match, aten.clamp.default, (total, torch.finfo(_value(match.q).dtype).min))


def _cast(graph: fx.Graph, node: fx.Node, match: Match) -> fx.Node:
    dtype = _value(match.q).dtype
    return node if _value(node).dtype == dtype else _call(graph, match, aten.to.dtype, (node, dtype))


def _call(
    graph: fx.Graph, match: Match, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """A new node with the site's provenance and a value computed by the op's shape rule."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta = {k: v for k, v in match.out.meta.items() if k != "val"}
    _infer(node)
    return node


def _infer(node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = next(m for n in node.graph.nodes if (m := getattr(n.meta.get("val"), "fake_mode", None)) is not None)
    with mode:
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _op(node: Any) -> str:
    packet = getattr(getattr(node, "target", None), "overloadpacket", None)
    return str(packet) if packet is not None else ""


def _value(node: Any) -> Tensor:
    return node.meta["val"]


def _name(node: Any) -> str:
    return f"{node.name} ({_op(node) or node.op})" if isinstance(node, fx.Node) else str(node)
