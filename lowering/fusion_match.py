"""Matching straight from the keys: the mean over heads is part of the launch that matches.

    %m = mean(%keys, [1], dtype=float32)
    %plan = tamis.bipartite_match(%m, valid, out, prefix, rule)     ->     %plan = tamis.match_keys(%keys, ...)

A mean that something else reads too is computed in any case, and stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.bipartite_match import BIPARTITE_MATCH
from ..kernels.match_keys import MATCH_KEYS
from .fusion import Fired
from .splice import op_of

name = "match"
CHAIN = ("mean", "bipartite_match")


def apply(graph: fx.Graph) -> list[Fired]:
    """Fuse at every bipartite_match.  The node keeps its name and its results: they have the same shapes."""
    return [_fuse(node) for node in graph.nodes if op_of(node) is BIPARTITE_MATCH]


def _fuse(node: fx.Node) -> Fired:
    metric, *rest = node.args
    reason = _why_not(node, metric, rest)
    if not reason:
        node.target, node.args = MATCH_KEYS.call, (metric.args[0], *rest)  # type: ignore[union-attr]
    return Fired.at(node, name, () if reason else CHAIN, (reason,) if reason else ())


def _why_not(node: fx.Node, metric: Any, rest: list[Any]) -> str:
    if metric.target is not torch.ops.aten.mean.dim:
        return f"the metric {metric.name} is no mean"
    keys, axes, *keepdim = metric.args
    value = keys.meta["val"]
    if value.dim() != 4 or list(axes) not in ([1], [-3]) or any(keepdim) or metric.kwargs.get("keepdim"):
        return f"{metric.name} is no mean over the second of four axes"
    if metric.meta["val"].dtype != torch.float32:
        return f"{metric.name} is in {metric.meta['val'].dtype}, the kernel computes in float32"
    if others := [user.name for user in metric.users if user is not node]:
        return f"the mean {metric.name} is read by {', '.join(others)} too"
    return _twin_refuses(value, fx.map_arg(rest, lambda one: one.meta["val"]))


def _twin_refuses(keys: Tensor, rest: Any) -> str:
    from ..kernels.triton.match_keys import TWIN

    return TWIN.why_not(keys, *rest)
