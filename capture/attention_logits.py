"""What stands between the product of queries and keys and the softmax of a written-out attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..kernels.quantized_attention import MASKED, PRODUCT, SCALED
from .attention_operands import factor_of
from .nodes import op_of
from .quantizers import OPS, Quantizer, quantizer_of

Mask = tuple[str, Any, Any]  # ("add", None, bias) or ("fill" / "keep", condition, value at hidden / other keys)

MATMULS = {"aten.matmul", "aten.bmm"}
PRODUCTS = {*MATMULS, "aten.baddbmm"}  # of queries and keys
FACTORS = {"aten.mul", "aten.div"}
HIDDEN = -1e4  # what half-precision models use; the softmax of anything below is zero
PASSED_ON = {"aten.to", "aten._to_copy", "aten.type_as", "aten.clone", "aten.contiguous"}


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


@dataclass(frozen=True)
class Rounding:
    """A quantizer, and its place in `quantized_attention`."""

    place: int
    quantizer: Quantizer


@dataclass
class Logits:
    """The logits: product * scale, capped, then `masks` from the inside out.

    rounded  by place: what is quantised on the way
    """

    product: fx.Node
    masks: list[Mask] = field(default_factory=list)
    scale: float = 1.0
    softcap: float | None = None
    rounded: list[Rounding] = field(default_factory=list)


def read_logits(node: Any) -> Logits:
    """Walk from the softmax's input to the product; raises NearMiss at what does not belong between them."""
    found = Logits(node)
    scaled = ""  # where
    seen: list[tuple[Quantizer, int, float | None]] = []  # with the masks and the scale (None: none) outside of it
    while op_of(node) not in PRODUCTS:
        factor = factor_of(node)
        if factor is not None:
            found.scale, scaled = found.scale * factor, node.name
            node = node.args[0]
        elif (mask := _mask(node)) is not None:
            if scaled or found.softcap is not None:
                how = f"scaled (at {scaled})" if scaled else "capped"
                raise NearMiss(3, f"the logits are {how} after a mask was applied (at {node.name})")
            node, addition = mask
            found.masks.insert(0, addition)
        elif op_of(node) in PASSED_ON:
            node = node.args[0]
        elif (quantizer := quantizer_of(node)) is not None:
            seen.insert(0, (quantizer, len(found.masks), found.scale if scaled else None))
            node = quantizer.inside
        elif op_of(node) == "aten.tanh" and found.softcap is None and found.scale > 0:
            found.softcap, found.scale, scaled, node = found.scale, 1.0, "", node.args[0]
        elif op_of(node) in FACTORS and (other := _other_factor(node)) is not None:
            raise NearMiss(3, f"the logits are scaled by {name_of(other)}, which is not a number (at {node.name})")
        else:
            raise NearMiss(3, f"{name_of(node)} stands between the product of queries and keys and the softmax")
    _add_inside_product(found, node, scaled)
    found.product, found.scale = node, found.scale * (found.softcap or 1.0)
    found.rounded = sorted((_placed(found, *one) for one in seen), key=lambda one: one.place)
    return found


def _other_factor(node: fx.Node) -> Any:
    """What the logits are multiplied with or divided by; None where no side leads to the product."""
    left, right = node.args[:2]
    return right if _leads_to_product(left) else left if _leads_to_product(right) else None


def _add_inside_product(found: Logits, node: fx.Node, scaled: str) -> None:
    """The bias and scale of a product that has them of its own."""
    if op_of(node) == "aten.baddbmm":
        if scaled or found.softcap is not None or node.kwargs.get("beta", 1) != 1:
            raise NearMiss(3, f"the logits are scaled after a bias was added (at {node.name})")
        found.masks.insert(0, ("add", None, node.args[0]))
        found.scale = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]


def _placed(found: Logits, quantizer: Quantizer, masks: int, scale: float | None) -> Rounding:
    where = f"the logits are rounded (at {quantizer.scale.name})"
    if found.softcap is not None:
        raise NearMiss(3, f"{where} and capped")
    if masks < len(found.masks):
        if masks:
            raise NearMiss(3, f"{where} between two masks")
        return Rounding(MASKED, quantizer)
    if scale is None:
        return Rounding(SCALED, quantizer)
    if scale != found.scale:
        raise NearMiss(3, f"{where} between two scales")
    return Rounding(PRODUCT, quantizer)


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
        raise NearMiss(3, f"hidden logits are set to {name_of(value)}, which is not a constant")
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
        through = op_of(node) in {"aten.mul", "aten.div", "aten.masked_fill", "aten.tanh", *PASSED_ON}
        if not through and node.target not in OPS:
            return False
        node = node.args[0]
    return False


def name_of(node: Any) -> str:
    """A node's name and operation, for errors."""
    return f"{node.name} ({op_of(node) or node.op})" if isinstance(node, fx.Node) else str(node)
