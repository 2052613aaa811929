"""What a report says of sparse attention that leaves out no key at the length of its example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import NothingChanged
from ..graph import Site, TokenGraph
from ..passes.sparse import SparseAttention, window_of
from ..passes.sparse_reach import LONGEST, first_sparse, reads_all
from ..rewrite import Outcome, Pass
from .inputs import Call
from .ledger import stream_length, stream_size


def notes_on_reach(
    graph: TokenGraph, passes: Sequence[Pass], outcomes: Sequence[Outcome], call: Call, *, allow_noop: bool
) -> list[str]:
    """A line for every pass that reads all keys at this length, with the length from which it reads fewer.

    Raises:
        NothingChanged: the model has this length and no other, unless allow_noop.
    """
    notes: dict[str, None] = {}
    for one in passes:
        if not isinstance(one, SparseAttention):
            continue
        layers = {o.layer for o in outcomes if o.applied and o.pass_name == str(one)}
        said = reads_every_key(graph, one, layers, call)
        if not said:
            continue
        if has_one_length(graph) and not allow_noop:
            raise NothingChanged(passes=str(one), reasons=f"  {said}")
        notes[f"{replace(one, layers=None, heads=None)}: {said}"] = None
    return list(notes)


def reads_every_key(
    graph: TokenGraph, one: SparseAttention, layers: set[int | None], call: Call, *, search: bool = True
) -> str:
    """That a pass leaves out no key of a call in these layers, and from which length on it does; else "".

    search  whether that length is looked for, which takes up to seconds
    """
    tokens = stream_length(graph, call) or 0
    sites = _unlike(graph, layers)
    if not (sites and tokens):
        return ""
    method = replace(one, layers=None, heads=None)
    if not all(reads_all(method, site, tokens) for site in sites):
        return ""
    only = ", the only length of the model," if has_one_length(graph) else ""
    said = f"at {tokens} tokens{only} it reads every key"
    if not search:
        return said
    starts = [start for site in sites if (start := first_sparse(method, site, tokens)) is not None]
    later = f"it leaves some out from about {min(starts)} on" if starts else f"so it does up to {max(LONGEST, tokens)}"
    return f"{said}; {later}"


def has_one_length(graph: TokenGraph) -> bool:
    """Whether the model takes no other number of tokens than that of its example."""
    return isinstance(stream_size(graph), int)


def _unlike(graph: TokenGraph, layers: set[int | None]) -> list[Site]:
    """The attention of some layers, one of each kind."""
    sites = [graph.sites[layer.site] for layer in graph.layers if layer.index in layers]
    kinds = {(s.heads // s.kv_heads, s.head_dim, s.scale, s.hides_later, s.softcap, window_of(s)): s for s in sites}
    return list(kinds.values())
