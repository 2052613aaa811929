"""Finding the sub-layers of every stream: what is computed from the tokens and added back to them.

`find_layers` knows one stream, the one that reductions shorten for good.  Here are the branches of all of them (a U-Net
has one per resolution): self-attention, cross-attention and MLP, each with its first and its last value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..graph import Site, TokenGraph, module_path
from .closure import ancestors, descendants
from .nodes import op_of
from .sizes import same
from .stream import ADDS

aten = torch.ops.aten
MIXES = {"aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.einsum"}
CONVOLUTIONS = {"aten.convolution", "aten.conv1d", "aten.conv2d", "aten.conv3d"}


@dataclass(frozen=True)
class Branch:
    """One sub-layer: `stream + exit`, where exit is computed from entry and entry from stream.

    kind    "self" attention, "cross" attention (keys are not of this stream) or "mlp"
    stream  node name of the residual [B, N, C]
    entry   node name of the value [B, N, C] that the first products of the branch read: behind the norm of a pre-norm
            block, the residual itself where they read different values
    exit    node name of what is added to the residual [B, N, C], before anything else is
    site    index of its attention site; None for an MLP
    block   index of the self-attention site of its block, whose residual its block started with; None where unknown
    module  path in the user's model, as far as it is known
    reason  why tokens cannot be merged around it; "" where they can
    """

    kind: str
    stream: str
    entry: str
    exit: str
    site: int | None = None
    block: int | None = None
    module: str = ""
    reason: str = ""


def find_branches(graph: TokenGraph) -> tuple[Branch, ...]:
    """The branches of all streams in order of the graph; attention that is added to no residual is left out."""
    finder = _Finder(graph)
    found = [branch for site in graph.sites if (branch := finder.of_site(site)) is not None]
    found += finder.of_products()
    found.sort(key=lambda branch: finder.order[finder.by_name[branch.exit]])
    return tuple(finder.with_block(branch, found) for branch in found)


class _Finder:
    def __init__(self, graph: TokenGraph) -> None:
        self.graph = graph
        self.by_name = {node.name: node for node in graph.graph.nodes}
        self.order = {node: place for place, node in enumerate(graph.graph.nodes)}
        self.sites = {self.by_name[site.node] for site in graph.sites}

    def of_site(self, site: Site) -> Branch | None:
        attention, q, k = (self.by_name[name] for name in (site.node, site.q, site.k))
        meeting = self._meeting(attention, ancestors(q, through_sizes=False))
        if meeting is None:
            return None
        out, stream = meeting
        below = descendants(stream, through_sizes=False)
        kind = "self" if k in below else "cross"
        entry = self._entry(stream, [q, k, self.by_name[site.v]] if kind == "self" else [q])
        branch = Branch(kind, stream.name, entry.name, out.name, site.index, None, site.module)
        tokens = q.meta["val"].shape[-2]
        if q.meta["val"].dim() != 4 or not same(tokens, entry.meta["val"].shape[1]):
            what = f"it attends over {tokens} tokens of which the stream has {entry.meta['val'].shape[1]}"
            return replace(branch, reason=what)
        return replace(branch, reason=why_leaks(between(entry, out), out))

    def _meeting(self, attention: fx.Node, above: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
        """The last value of a branch before another value is added to it, and the residual it comes from."""
        below, out = {attention}, None
        for node in sorted(descendants(attention, through_sizes=False), key=self.order.__getitem__):
            if node.target in ADDS:
                inside = [a for a in node.args[:2] if a in below]
                outside = [a for a in node.args[:2] if isinstance(a, fx.Node) and a not in below]
                if len(inside) == len(outside) == 1 and are_tokens(node, inside[0], outside[0]):
                    out = out or inside[0]
                    if outside[0] in above:
                        return out, outside[0]  # type: ignore[return-value]
            below.add(node)
        return None

    def _entry(self, stream: fx.Node, ends: list[fx.Node]) -> fx.Node:
        """The last value of the stream's shape that everything on the way to `ends` comes through before a product."""
        below = descendants(stream, through_sizes=False)
        above = set(ends).union(*(ancestors(end, through_sizes=False) for end in ends))
        entry, reach = stream, self._last_user(stream, above)
        for node in sorted(below & above, key=self.order.__getitem__):
            if op_of(node) in MIXES | CONVOLUTIONS or node in self.sites:
                break
            if reach <= self.order[node] and are_tokens(node, stream):
                entry = node
            reach = max(reach, self._last_user(node, above))
        return entry

    def _last_user(self, node: fx.Node, above: set[fx.Node]) -> int:
        return max((self.order[user] for user in node.users if user in above), default=-1)

    def of_products(self) -> list[Branch]:
        """Branches without attention: x + f(x) where f multiplies by weights."""
        found = []
        for node in self.order:
            operands = [a for a in node.args[:2] if isinstance(a, fx.Node)] if node.target in ADDS else []
            if len(operands) != 2 or not are_tokens(node, *operands):
                continue
            for stream, out in (operands, operands[::-1]):
                inside = between(stream, out)
                if out in inside and not inside & self.sites and any(op_of(one) in MIXES for one in inside):
                    found.append(self._mlp(stream, out))
        return found

    def _mlp(self, stream: fx.Node, out: fx.Node) -> Branch:
        entry = self._entry(stream, [out])
        inside = between(entry, out)
        mixed = next((one for one in inside if op_of(one) in CONVOLUTIONS), None)
        reason = f"its node {mixed.name} mixes neighbours" if mixed is not None else why_leaks(between(entry, out), out)
        return Branch("mlp", stream.name, entry.name, out.name, module=module_path(out), reason=reason)

    def with_block(self, branch: Branch, found: list[Branch]) -> Branch:
        """The branch with the self-attention before it on its stream."""
        if branch.kind == "self":
            return replace(branch, block=branch.site)
        stream = self.by_name[branch.stream]
        above, tokens = ancestors(stream, through_sizes=False), stream.meta["val"].shape[1]
        blocks = [
            one.site
            for one in found
            if one.kind == "self"
            and self.by_name[one.exit] in above
            and same(self.by_name[one.stream].meta["val"].shape[1], tokens)
        ]
        return replace(branch, block=blocks[-1] if blocks else None)


def between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on the way from a value to another, the second one included if it comes from the first."""
    return descendants(start, through_sizes=False) & (ancestors(end, through_sizes=False) | {end})


def queries_only(graph: TokenGraph, site: Site, start: fx.Node, end: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """What of a layer is computed for each query by itself, from `start` to `end`, and the values that enter it.

    Keys and values, and what they alone are computed from, are outside.
    """
    by_name = {node.name: node for node in graph.graph.nodes}
    keys = {by_name[site.k], by_name[site.v]}
    beside = keys.union(*(ancestors(one, through_sizes=False) for one in keys))
    way = between(start, end)
    inside = way - beside
    entries = {
        one
        for node in inside
        for one in node.all_input_nodes
        if one in way | {start} and one not in inside and not (node.name == site.node and one in keys)
    }
    order = [node for node in graph.graph.nodes if node in entries and node is not start]
    return inside, [start, *order]


def are_tokens(*nodes: Any) -> bool:
    """Whether nodes are values [B, N, C] of one shape."""
    shapes = [value.shape for node in nodes if isinstance(value := node.meta.get("val"), torch.Tensor)]
    return len(shapes) == len(nodes) and all(
        len(shape) == 3 and all(same(a, b) for a, b in zip(shape, shapes[0], strict=True)) for shape in shapes
    )


def why_leaks(inside: set[fx.Node], end: fx.Node) -> str:
    """Why the length of values inside may not change: because something outside reads one; "" when nothing does."""
    for node in end.graph.nodes:
        if node in inside and node is not end:
            read = [user for user in node.users if user not in inside and user.target is not aten.sym_size.int]
            if read:
                return f"its value {node.name} is read outside of it, by {read[0].name}"
    return ""
