"""`analyse`: everything a `TokenGraph` knows, from a program in canonical form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..errors import NoAttention, NoTokenStream, TamisError, UnknownAttention, WindowedAttention
from ..graph import Mask, Site, TokenGraph, module_path, source_line
from ..onnx_errors import OpaqueInTheWay
from ..opaque import carried_in
from ..stream_errors import PackedBatch
from .closure import ancestors
from .identity import structure_hash
from .prefix import find_grid, find_prefix
from .raise_attention import find_near_misses
from .randomness import warn_of_draws
from .sites import SDPA, attention_argument, find_sites, set_attention_argument
from .sizes import same
from .stream import find_layers

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
REGROUPS = (aten.view.default, aten.reshape.default, aten.permute.default, aten.flatten.using_ints)


def analyse(program: ExportedProgram, name: str = "model", *, any_model: bool = False) -> TokenGraph:
    """Sites, stream, cut points, prefix tokens and grid of a canonical program.

    Raises, unless it may be `any_model`:
        NoAttention, UnknownAttention: there is no attention at all, or none that was recognised.
        WindowedAttention: attention runs inside windows of a regrouped batch (Swin).
        NoTokenStream: no stream of tokens [B, N, C] runs through the attention sites.
        PackedBatch: the stream has one row, which holds the tokens of all images.
        OpaqueInTheWay: one of these, and the program carries operators of an ONNX file that have no form in torch.
    """
    sites, layers = find_layers(program, find_sites(program))
    graph = TokenGraph(program, sites, layers, name=name, source_hash=structure_hash(program))
    if not layers and not any_model:
        error = _why_no_stream(graph) if sites else _why_no_attention(program, name)
        if ops := carried_in(program.graph):
            raise OpaqueInTheWay(reason=str(error).split("\n")[0].rstrip("."), ops=ops) from error
        raise error
    if not layers:
        return graph
    start, end = (
        _node(graph, layers[0].before_attention),
        _node(graph, layers[-1].after_block or layers[-1].after_attention),
    )
    _refuse_packed(graph, start)
    warn_of_draws(program, name)
    prefix, class_token = find_prefix(program, start, end)
    return replace(graph, prefix=prefix, class_token=class_token, grid=find_grid(start, prefix))


def _refuse_packed(graph: TokenGraph, start: fx.Node) -> None:
    """Raise PackedBatch for one row that holds the tokens of several images."""
    batch, tokens = start.meta["val"].shape[:2]
    for node in ancestors(start) if isinstance(batch, int) and batch == 1 else ():
        if node.target in CONVOLUTIONS and not any(same(node.meta["val"].shape[0], size) for size in (1, tokens)):
            site = graph.sites[graph.layers[0].site]
            where = f" ({site.source})" if site.source else ""
            raise PackedBatch(
                model=graph.name, node=site.module or site.node, where=where, images=node.meta["val"].shape[0]
            )


def without_tables(graph: TokenGraph) -> TokenGraph:
    """The graph without masks that need no table: those that hide nothing, and causal ones, which a flag says.

    The program is changed in place.
    """
    sites = tuple(_without_table(graph.node(site.node), site) for site in graph.sites)
    if sites == graph.sites:
        return graph
    graph.graph.eliminate_dead_code()
    graph.program.graph_module.recompile()
    return replace(graph, sites=sites)


def _without_table(node: fx.Node, site: Site) -> Site:
    is_causal = site.mask.kind == "causal" and not site.mask.padded
    if attention_argument(node, "mask") is None or not (is_causal or site.mask.kind == "full"):
        return site
    set_attention_argument(node, "mask", None)
    if is_causal:
        set_attention_argument(node, "causal", True)
    return replace(site, mask=Mask(), causal=site.causal or is_causal)


def _node(graph: TokenGraph, name: str | None) -> fx.Node:
    assert name is not None
    return graph.node(name)


def near_misses(program: ExportedProgram) -> list[dict[str, str]]:
    """Softmaxes that look like attention and are none: where (`node`) and why (`reason`), the furthest first."""
    by_name = {node.name: node for node in program.graph.nodes}
    found = sorted(find_near_misses(program.graph), key=lambda one: -one.step)
    return [{"node": _told(by_name[one.node]), "reason": one.reason} for one in found]


def _told(node: fx.Node) -> str:
    """Where a node is in the user's model: its module, and the line or the ONNX node."""
    source = source_line(node)
    return (module_path(node) or node.name) + (f" ({source})" if source else "")


def _why_no_attention(program: ExportedProgram, name: str) -> TamisError:
    misses = near_misses(program)
    if not misses:
        return NoAttention(model=name, looked_for="scaled_dot_product_attention, or matmul-softmax-matmul")
    return UnknownAttention(model=name, count=len(misses), **misses[0])


def _why_no_stream(graph: TokenGraph) -> TamisError:
    site = graph.sites[0]
    node = graph.node(site.node)
    where = f" ({site.source})" if site.source else ""
    regroup = _regrouped_by(node, graph.program)
    if regroup is not None:
        seen = node.args[0].meta["val"].shape[-2]  # type: ignore[union-attr]
        return WindowedAttention(
            model=graph.name,
            sites=len(graph.sites),
            node=site.module or site.node,
            where=where,
            seen=seen,
            regroup=regroup.name,
        )
    return NoTokenStream(
        model=graph.name,
        sites=len(graph.sites),
        node=site.module or site.node,
        where=where,
        reason=site.reason,
        hint="tamis looks for x + attention(norm(x)) or norm(x + attention(x)) with x of batch, tokens, channels.",
    )


def _regrouped_by(attention: fx.Node, program: ExportedProgram) -> fx.Node | None:
    """The reshape that folds windows into the batch of an attention's queries, if one does."""
    q: Any = attention.args[0]
    batch = q.meta["val"].shape[0]
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    if not isinstance(batch, torch.SymInt) or any(
        same(batch, n.meta["val"].shape[0]) for n in inputs if n.meta["val"].dim()
    ):
        return None
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    chain = sorted((n for n in ancestors(q) | {q} if n.target in REGROUPS), key=order.__getitem__, reverse=True)
    for node in chain:
        before = node.args[0].meta["val"].shape[0]  # type: ignore[union-attr]
        if same(node.meta["val"].shape[0], batch) and not same(before, batch):
            return node
    return None


__all__ = ["SDPA", "analyse", "without_tables"]
