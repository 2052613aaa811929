"""Recognising attention written out as matmul, softmax, matmul, and saying why one is not recognised."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from .attention_operands import factor_of, guarded, keys_of, without_scale
from .folded import NotFolded, Unfolder
from .nodes import RESHAPES, op_of, same_shape

Mask = tuple[str, Any, Any]  # ("add", None, bias) or ("fill" / "keep", condition, value at hidden / other keys)

MATMULS = {"aten.matmul", "aten.bmm"}
PRODUCTS = {*MATMULS, "aten.baddbmm"}  # of queries and keys
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
    unfolder: Unfolder | None = None  # where heads are folded into the batch
    zeros: bool = False  # whether a query without any key gets zeros


@dataclass(order=True, unsafe_hash=True)
class NearMiss(Exception):
    """A softmax that is part of an attention that cannot be raised.

    step    how far recognising it came: more is further
    reason  why it went no further
    node    name of the softmax
    """

    step: int
    reason: str
    node: str = ""


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
    probabilities = guarded(softmax)
    out = _product(probabilities)
    if out is None:
        return None
    dims = _value(softmax).ndim
    if softmax.args[1] not in (-1, dims - 1):
        raise NearMiss(1, f"the softmax is over axis {softmax.args[1]}, not the last one")
    if dims not in (3, 4):
        raise NearMiss(1, f"its logits have {dims} axes, not 4 (batch, heads, queries, keys)")
    _require_unused(probabilities, out)
    product, masks, scale, softcap = _logits(softmax.args[0])
    if not same_shape(_value(softmax).shape, _value(out.args[0]).shape):
        raise NearMiss(4, f"the probabilities are reshaped before they meet the values (at {out.name})")
    q, q_scale = without_scale(product.args[-2])
    k, transposed, k_scale = keys_of(product.args[-1])
    v = out.args[1]
    if len({_value(x).dtype for x in (q, k, v)}) > 1:
        raise NearMiss(4, "queries, keys and values have different types")
    if any(_value(x).ndim != dims for x in (q, k, v)):
        raise NearMiss(4, f"queries, keys and values do not all have {dims} axes")
    unfolder = _unfolder(q, k, v, out, masks) if dims == 3 else None
    scale, zeros = scale * q_scale * k_scale, probabilities is not softmax
    return Match(q, k, transposed, v, out, scale, softcap, masks, unfolder, zeros)


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


def _require_unused(softmax: fx.Node, out: fx.Node) -> None:
    node = softmax
    while node is not out:
        if len(node.users) > 1:
            others = ", ".join(u.name for u in node.users if u is not out and op_of(u) not in PASSED_ON) or "a cast"
            raise NearMiss(2, f"the probabilities are used elsewhere too (by {others})")
        node = next(iter(node.users))


def _logits(node: Any) -> tuple[fx.Node, list[Mask], float, float | None]:
    """Walk from the softmax's input to `q @ k^T`: it, masks from the inside out, scale and soft cap."""
    masks: list[Mask] = []
    scale, scaled, softcap = 1.0, "", None
    while op_of(node) not in PRODUCTS:
        factor = factor_of(node)
        if factor is not None:
            scale, scaled = scale * factor, node.name
            node = node.args[0]
        elif (mask := _mask(node)) is not None:
            if scaled or softcap is not None:
                how = f"scaled (at {scaled})" if scaled else "capped"
                raise NearMiss(3, f"the logits are {how} after a mask was applied (at {node.name})")
            node, addition = mask
            masks.insert(0, addition)
        elif op_of(node) in PASSED_ON:
            node = node.args[0]
        elif op_of(node) == "aten.tanh" and softcap is None and scale > 0:
            softcap, scale, scaled, node = scale, 1.0, "", node.args[0]
        else:
            raise NearMiss(3, f"{_name(node)} stands between the product of queries and keys and the softmax")
    if op_of(node) == "aten.baddbmm":
        if scaled or softcap is not None or node.kwargs.get("beta", 1) != 1:
            raise NearMiss(3, f"the logits are scaled after a bias was added (at {node.name})")
        masks.insert(0, ("add", None, node.args[0]))
        scale = float(node.kwargs.get("alpha", 1))
    return node, masks, scale * (softcap or 1.0), softcap


def _mask(node: Any) -> tuple[fx.Node, Mask] | None:
    """(logits before, what is done to them) if the node adds a bias or hides keys."""
    match op_of(node):
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
    if op_of(value) == "aten.full":
        number = value.args[1]
    elif op_of(value) == "aten.scalar_tensor":
        number = value.args[0]
    if not isinstance(number, int | float):
        raise NearMiss(3, f"hidden logits are set to {_name(value)}, which is not a constant")
    if number > HIDDEN:
        raise NearMiss(3, f"hidden logits are set to {number}, which does not hide them")
    return float(number)


def _leads_to_product(node: Any) -> bool:
    """Whether walking towards the inputs, through what may stand between, ends at a matmul of this site's shape."""
    while isinstance(node, fx.Node):
        if op_of(node) in PRODUCTS:
            return True
        if op_of(node) in {"aten.add", "aten.where"}:
            return any(_leads_to_product(a) for a in node.args)
        if op_of(node) not in {"aten.mul", "aten.div", "aten.masked_fill", "aten.tanh", *PASSED_ON}:
            return False
        node = node.args[0]
    return False


def _value(node: Any) -> Tensor:
    return node.meta["val"]


def _name(node: Any) -> str:
    return f"{node.name} ({op_of(node) or node.op})" if isinstance(node, fx.Node) else str(node)
