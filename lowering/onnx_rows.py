"""Queries that see no key, in ONNX: torch.onnx writes attention as a plain softmax, which makes NaN of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..capture.closure import ancestors
from ..capture.nodes import new_node
from ..capture.sites import SDPA, attention_argument

aten = torch.ops.aten
SMALL = 64  # entries of a constant that is looked through


def guard_rows(program: ExportedProgram, graph: fx.Graph) -> None:
    """Give zeros to queries whose additive mask is -inf everywhere, as scaled_dot_product_attention does, in place.

    Only where -inf is among the numbers that a mask is made of; torch.onnx guards boolean masks itself.
    """
    endless = _endless(program)
    known: dict[fx.Node, bool] = {}
    for node in list(graph.nodes):
        mask: Any = attention_argument(node, "mask") if node.target is SDPA else None
        if mask is None or mask.meta["val"].dtype == torch.bool:
            continue
        if mask not in known:
            known[mask] = any(_holds(one, endless) for one in ancestors(mask) | {mask})
        if known[mask]:
            users = list(node.users)
            with graph.inserting_after(node):
                seen = new_node(node, aten.gt.Scalar, (mask, -math.inf))
            with graph.inserting_after(seen):
                some = new_node(node, aten.any.dim, (seen, -1, True))
            with graph.inserting_after(some):
                guarded = new_node(node, aten.where.ScalarOther, (some, node, 0.0))
            for user in users:
                user.replace_input_with(node, guarded)


def _endless(program: ExportedProgram) -> set[str]:
    """Placeholders of small constants that hold -inf."""
    signature = program.graph_signature
    places = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
    places |= signature.inputs_to_parameters
    values = {place: program.constants.get(name, program.state_dict.get(name)) for place, name in places.items()}
    return {
        place
        for place, value in values.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.numel() <= SMALL
        and bool((value == -math.inf).any())
    }


def _holds(node: fx.Node, endless: set[str]) -> bool:
    """Whether -inf is one of a node's numbers."""
    return node.name in endless or any(one == -math.inf for one in node.args if isinstance(one, float))
