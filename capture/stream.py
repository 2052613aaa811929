"""Finding the token stream: the residual adds around attention and MLP, and the cut points between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..graph import Layer, Site
from ..opaque import listed, opaque_of
from .closure import ancestors, descendants
from .masks import user_inputs
from .nodes import MOVES, RESHAPES, op_of
from .quantizers import after_rounding, is_weight
from .rotation import rotation_of
from .sizes import same
from .streams import reached_in_place

aten = torch.ops.aten
ADDS = (aten.add.Tensor, aten.add_.Tensor)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
CARRY = {*MOVES, *RESHAPES, "aten.to", "aten.clone", "aten.contiguous", "aten.expand", "aten.unsqueeze", "aten.squeeze"}
CARRY |= {"aten.select", "aten.slice"}  # what hands keys on without changing them
TAKES, RANKS = {"aten.gather", "aten.index", "aten.index_select"}, {"aten.topk", "aten.sort", "aten.argsort"}
ROOM = {"aten.pad", "aten.constant_pad_nd"}  # what makes a cache longer


LEARNED = "its tokens are learned queries, which no input of the model says anything of: each stands for one answer"


PICKED = "its tokens are those of another stream that scored highest: each stands for one answer"


def find_layers(program: ExportedProgram, sites: tuple[Site, ...]) -> tuple[tuple[Site, ...], tuple[Layer, ...]]:
    """The sites with their roles, and the layers of the stream in order.

    A site is on a stream when its result is added to a value [B, N, C] it was computed from, with the same tokens.  Of
    several streams the one that is not causal and has most layers is taken, the first of equals; never one that starts
    from weights alone or from the best tokens of another (the queries of a detector's decoder).  Sites whose results
    meet before the add (differential attention) are one layer, that of the first.
    """
    graph = program.graph
    by_name = {node.name: node for node in graph.nodes}
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[tuple[Site, Residual]] = []
    judged: list[Site] = []
    for site in sites:
        residual = _residual_add(by_name, order, site)
        if isinstance(residual, str):
            judged.append(replace(site, role=_side_role(by_name, site), reason=residual))
        else:
            judged.append(replace(site, role="stream", cached=residual.cached))
            found.append((judged[-1], residual))
    streams, given = _streams(graph, found), set(user_inputs(program))
    answers = [_answers(stream, streams, given) for stream in streams]
    queries = {site.index: why for stream, why in zip(streams, answers, strict=True) if why for site, _ in stream}
    found = _deepest([stream for stream, why in zip(streams, answers, strict=True) if not why])
    mine = {site.index for site, _ in found}
    found = [layer for i, layer in enumerate(found) if layer[1].add not in [other[1].add for other in found[:i]]]
    judged = [
        replace(site, role="other", reason=queries[site.index]) if site.index in queries else site for site in judged
    ]
    judged = [
        _of_another_stream(site, found, by_name) if site.role == "stream" and site.index not in mine else site
        for site in judged
    ]
    post_norm = sum(_only_norm(residual.add) is not None for _, residual in found) * 2 > len(found)
    limits = [order[by_name[site.node]] for site, _ in found[1:]] + [len(order)] * bool(found)
    layers = [
        _layer(i, site, residual, post_norm, order, limit)
        for i, ((site, residual), limit) in enumerate(zip(found, limits, strict=True))
    ]
    return tuple(_with_rotations(judged, by_name, order, found)), tuple(layers)


def _streams(graph: fx.Graph, found: list[tuple[Site, Residual]]) -> list[list[tuple[Site, Residual]]]:
    """The layers of every stream."""
    streams = []
    while found:
        reached = reached_in_place(graph, found[0][1].stream)
        streams.append([layer for layer in found if layer[1].stream in reached])
        found = [layer for layer in found if layer[1].stream not in reached]
    return streams


def _answers(
    stream: list[tuple[Site, Residual]], streams: list[list[tuple[Site, Residual]]], given: set[fx.Node]
) -> str:
    """Why each token of a stream stands for an answer of its own, so that none may leave; "" when it does not."""
    start = stream[0][1].stream
    above = {start} | ancestors(start, through_sizes=False)
    if given.isdisjoint(above):
        return LEARNED
    others = {residual.add for other in streams if other is not stream for _, residual in other}
    return PICKED if above & others and any(_picks(node, start) for node in above) else ""


def _picks(node: fx.Node, start: fx.Node) -> bool:
    """Whether a node takes as many tokens as `start` has out of more, by places that were found by ranking."""
    if op_of(node) not in TAKES:
        return False
    values = [one.meta.get("val") for one in (node, node.all_input_nodes[0])]
    if not all(isinstance(value, torch.Tensor) and value.dim() == 3 for value in values):
        return False
    taken, source = (value.shape[1] for value in values)  # type: ignore[union-attr]
    places = {a for index in node.all_input_nodes[1:] for a in {index} | ancestors(index, through_sizes=False)}
    return (
        same(taken, start.meta["val"].shape[1])
        and not same(source, taken)
        and any(op_of(place) in RANKS for place in places)
    )


def _deepest(streams: list[list[tuple[Site, Residual]]]) -> list[tuple[Site, Residual]]:
    """The layers of one stream."""
    return max(streams, key=lambda layers: (not layers[0][0].hides_later, len(layers)), default=[])


def _of_another_stream(site: Site, taken: list[tuple[Site, Residual]], by_name: dict[str, fx.Node]) -> Site:
    first = taken[0][0]
    reason = (
        "it works on another stream of tokens; one stream of a model is reduced, the deepest that is not causal, which "
        f"starts at {first.module or first.node}{_parted_by(by_name[site.node], by_name[first.node])}"
    )
    return replace(site, role="other", reason=reason)


def _parted_by(one: fx.Node, other: fx.Node) -> str:
    """What stands between two sites and has no form in torch, as the end of a sentence."""
    for early, late in ((one, other), (other, one)):
        between = ancestors(late) - ancestors(early)
        found = listed((o.op, o.node) for n in between if (o := opaque_of(n)) is not None and early in ancestors(n))
        if early in ancestors(late) and found:
            return f"; between them stands what has no form in torch: {found}"
    return ""


def _with_rotations(
    sites: list[Site], by_name: dict[str, fx.Node], order: dict[fx.Node, int], found: list[tuple[Site, Residual]]
) -> Iterator[Site]:
    """The sites; those of the stream with their rotary position embedding."""
    if not found:
        yield from sites
        return
    start = found[0][1].stream
    stream = {start} | descendants(start, through_sizes=False)
    for site in sites:
        plain = site.role == "stream" and not site.cached
        q, k = (rotation_of(by_name[name], order, stream) if plain else None for name in (site.q, site.k))
        yield replace(site, q_rotation=q, k_rotation=k)


@dataclass(frozen=True)
class Residual:
    """The add that closes an attention branch, the stream it adds to, and whether the MLP joined on the way.

    cached  whether keys that the model was given stand before those of the stream
    """

    add: fx.Node
    stream: fx.Node
    with_mlp: bool
    cached: bool = False


def _residual_add(by_name: dict[str, fx.Node], order: dict[fx.Node, int], site: Site) -> Residual | str:
    """The residual add of a site, or why it has none."""
    attention, q, k = by_name[site.node], by_name[site.q], by_name[site.k]
    if q.meta["val"].dim() != 4:
        return f"its queries have {q.meta['val'].dim()} axes, not batch, heads, tokens, channels"
    above = ancestors(q)
    tokens, keys = q.meta["val"].shape[-2], k.meta["val"].shape[-2]
    below, joined = {attention}, False
    for node in sorted(descendants(attention), key=order.__getitem__):
        inside = [a for a in node.all_input_nodes if a in below]
        outside = [_without_bias(a) for a in node.args[:2] if isinstance(a, fx.Node) and a not in below]
        outside = [a for a in outside if not _is_bias(a)]
        if node.target in ADDS and inside and len(outside) == 1 and outside[0] in above:
            value = outside[0].meta["val"]
            if value.dim() != 3:
                return f"its residual {outside[0].name} has {value.dim()} axes, not batch, tokens, channels"
            if same(value.shape[0], tokens) and not same(value.shape[1], tokens):
                return f"its residual {outside[0].name} has its tokens in front of the batch"
            cached = not same(tokens, keys) and _behind_cache(k, tokens)
            if joined_with := _joined_with(q, value.shape[1]):
                return (
                    f"its queries are the tokens of {joined_with} streams side by side, each with a residual of its own"
                )
            if not (same(value.shape[1], tokens) and (same(tokens, keys) or cached)):
                return f"queries ({tokens}), keys ({keys}) and residual ({value.shape[1]}) are not the same tokens"
            if not same(value.shape[0], q.meta["val"].shape[0]):
                return f"its batch ({q.meta['val'].shape[0]}) is not the stream's ({value.shape[0]})"
            return Residual(node, outside[0], joined, cached)
        if node.target in ADDS and inside and outside and not is_weight(outside[0]):
            joined = True
        below.add(node)
    return "its result is not added to a value it was computed from"


def _joined_with(queries: fx.Node, tokens: Any) -> int:
    """How many streams, one of `tokens` tokens, queries [B, H, M, D] were joined from along their tokens; 0: one."""
    node: Any = queries
    while op_of(node) in CARRY:
        node = node.args[0]
    if op_of(node) != "aten.cat" or same(queries.meta["val"].shape[-2], tokens):
        return 0
    dim, pieces = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim(), node.args[0]
    return len(pieces) if any(same(piece.meta["val"].shape[dim], tokens) for piece in pieces) else 0


def _behind_cache(keys: fx.Node, tokens: Any) -> bool:
    """Whether keys [B, H, M, D] are an input of the model with `tokens` more behind it, or written into it."""
    while op_of(keys) in CARRY:
        keys = keys.args[0]  # type: ignore[assignment]
    cache: Any
    own: Any
    if op_of(keys) == "aten.scatter":
        cache, axis, _, own = keys.args
    elif op_of(keys) == "aten.cat" and len(keys.args[0]) == 2:  # type: ignore[arg-type]
        cache, own = keys.args[0]  # type: ignore[misc]
        axis = keys.args[1] if len(keys.args) > 1 else 0
    else:
        return False
    while op_of(cache) in CARRY | ROOM:
        cache = cache.args[0]
    return cache.op == "placeholder" and same(own.meta["val"].shape[axis], tokens)


def _is_bias(node: fx.Node) -> bool:
    """Whether a node is a weight of one axis, which several layers may share."""
    return is_weight(node) and node.meta["val"].dim() < 2


def _without_bias(node: fx.Node) -> fx.Node:
    """What a bias was added to: that of the branch may be there before the stream and the branch meet."""
    while node.target in ADDS:
        others = [a for a in node.args[:2] if isinstance(a, fx.Node) and not _is_bias(a)]
        if len(others) != 1:
            break
        node = others[0]
    return node


def _side_role(by_name: dict[str, fx.Node], site: Site) -> str:
    tokens, keys = (by_name[name].meta["val"].shape[-2] for name in (site.q, site.k))
    if same(tokens, keys):
        return "other"
    return "pool" if isinstance(tokens, int) and tokens <= 4 else "cross"


def _layer(index: int, site: Site, residual: Residual, post_norm: bool, order: dict[fx.Node, int], limit: int) -> Layer:
    state = _settled(residual.add, post_norm)
    block, parallel = (residual.add, True) if residual.with_mlp else _block_add(state, order, limit)
    after_block = None if block is None else _settled(block, post_norm).name
    notes = []
    if parallel:
        notes.append("attention and MLP run side by side, so there is no place after attention")
    if after_block is None:
        notes.append("no residual add after the MLP was found")
    return Layer(index, site.index, residual.stream.name, None if parallel else state.name, after_block, tuple(notes))


def _settled(add: fx.Node, post_norm: bool) -> fx.Node:
    """The stream's state after an add: in a post-norm block, behind the norm; where it is rounded, behind that."""
    return after_rounding((_only_norm(add) or add) if post_norm else add)


def _only_norm(add: fx.Node) -> fx.Node | None:
    users = [user for user in after_rounding(add).users if user.target is not aten.sym_size.int]
    return users[0] if len(users) == 1 and users[0].target in NORMS else None


def _block_add(state: fx.Node, order: dict[fx.Node, int], limit: int) -> tuple[fx.Node | None, bool]:
    """The add that closes the block; whether its other summand does not come from `state` (a parallel block)."""
    adds = [user for user in state.users if user.target in ADDS and order[user] < limit]
    for add in sorted(adds, key=order.__getitem__):
        other: Any = add.args[1] if add.args[0] is state else add.args[0]
        if not isinstance(other, fx.Node) or other.meta["val"].dim() != 3:
            continue
        return add, state not in ancestors(other)
    return None, False
