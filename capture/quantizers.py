"""Looking through values that are rounded to integers and taken back: quantize_linear, then dequantize_linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..kernels.dequantize_linear import DEQUANTIZE
from ..kernels.quantize_linear import QUANTIZE
from .nodes import op_of

OPS = {QUANTIZE.call, DEQUANTIZE.call}


@dataclass(frozen=True)
class Quantizer:
    """A rounding of `inside` by one scale and one zero point for all entries."""

    inside: fx.Node
    scale: fx.Node
    zero: fx.Node


def quantizer_of(node: Any) -> Quantizer | None:
    """The rounding that ends at a node; None where none does, or one that is different along an axis."""
    if getattr(node, "target", None) is not DEQUANTIZE.call:
        return None
    whole, *parameters = node.args[:3]
    if getattr(whole, "target", None) is not QUANTIZE.call or list(whole.args[1:3]) != parameters:
        return None
    if any(not isinstance(one, fx.Node) or one.meta["val"].numel() != 1 for one in parameters):
        return None
    return Quantizer(whole.args[0], *parameters)


def rounding_of(node: fx.Node) -> fx.Node | None:
    """Where a rounding of the node ends; None where none starts."""
    ends = [end for user in node.users if user.target is QUANTIZE.call for end in user.users]
    return next((end for end in ends if (one := quantizer_of(end)) and one.inside is node), None)


def after_rounding(node: fx.Node) -> fx.Node:
    """What everything after a node is computed from: the node, or where all that reads it is one rounding, its end."""
    while True:
        users = [user for user in node.users if op_of(user) != "aten.sym_size"]
        if len(users) != 1 or users[0].target not in OPS or users[0].args[0] is not node:
            return node
        node = users[0]


def is_weight(node: fx.Node) -> bool:
    """Whether a node is a weight, or one kept as integers."""
    return node.op == "placeholder" or (node.target is DEQUANTIZE.call and node.args[0].op == "placeholder")  # type: ignore[union-attr]
