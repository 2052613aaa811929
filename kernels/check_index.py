"""`check_index`: whether an index keeps the rules that `block_sparse_attention` relies on; for tests and debugging.

With TAMIS_CHECK_INDEX=1 in the environment every call of the op on a CPU checks the index it is given; a model that
Inductor compiled to another form of it calls none.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..sparse_errors import IndexBroken
from .sparse_pairs import Pairs, gathered


def asked_for() -> bool:
    """Whether the environment asks for checks."""
    return os.environ.get("TAMIS_CHECK_INDEX", "") not in ("", "0")


def check_index(index: Pairs, tokens: int, heads: int, key_heads: int, *, part: bool = False) -> None:
    """Check the values of an index for `tokens` queries and keys.

    Lists have a row for every `rows` queries and one set for each who shares; tiles are ascending, do not overlap, come
    before unused entries, and where `aligned` begin at multiples of their width; columns are ascending, unused entries
    anywhere among them; all begin inside the sequence, and where attention is causal and keys lie in order before the
    row ends; no column is in a tile; `positions` name every token once; every real token reads some key, unless the
    index is but a `part` of what is read.

    Raises:
        IndexBroken: the first rule that does not hold, and where.
    Source: methods (llm) 6.3, the invariants.
    """
    sets = {"layer": 1, "kv": key_heads, "query": heads}[index.share]
    for name, lists, width in (("tiles", index.tiles, index.width), ("columns", index.columns, 1)):
        if lists is not None:
            _check_lists(index, name, lists, width, sets, tokens)
    if index.tiles is not None and index.columns is not None:
        tiles, columns = index.tiles.unsqueeze(-2), index.columns.unsqueeze(-1)
        both = ((tiles >= 0) & (columns >= tiles) & (columns < tiles + index.width)).any(-1)
        _expect(~both, "no column is in a tile of its row", index.columns)
    if index.positions is not None:
        named = index.positions.sort(-1).values
        _expect(named == torch.arange(tokens), "positions name every token once", index.positions)
    if not part:
        _check_rows(index, tokens, heads, key_heads)


def _check_lists(index: Pairs, name: str, lists: Tensor, width: int, sets: int, tokens: int) -> None:
    count = -(-tokens // index.rows)
    if tuple(lists.shape[1:3]) != (sets, count):
        rule = f"{name} of {sets} sets (share={index.share}) and {count} rows of {index.rows} are expected"
        raise IndexBroken(rule=rule, got=f"they are {list(lists.shape)}")
    if not lists.numel():
        return
    used = lists >= 0
    _expect((lists >= -1) & (lists < tokens), f"{name} begin at places 0 to {tokens - 1}, unused ones at -1", lists)
    if name == "tiles":
        _expect(used[..., :-1] | ~used[..., 1:], "unused tiles come last", lists)
        if index.aligned:
            _expect(~used | (lists % width == 0), f"aligned tiles begin at multiples of {width}", lists)
    apart = lists[..., 1:] - lists.cummax(-1).values[..., :-1] >= width
    _expect(apart | ~used[..., 1:], f"{name} of a row are ascending and {width} or more apart", lists)
    if index.causal and index.positions is None:
        ends = ((torch.arange(count) + 1) * index.rows).unsqueeze(1)
        _expect(lists < ends, f"{name} begin before the last query of their row", lists)


def _check_rows(index: Pairs, tokens: int, heads: int, key_heads: int) -> None:
    """Every real token reads a key."""
    _, pairs = gathered(index, tokens, heads, key_heads, torch.device("cpu"))
    seen = pairs.any(-1).flatten(2)[..., :tokens]
    ends = torch.tensor([tokens]) if index.lengths is None else index.lengths
    query = torch.arange(tokens)
    dense = (query < index.first) | (query >= ends.unsqueeze(1) - index.last) | (query >= ends.unsqueeze(1))
    reads = seen | dense.unsqueeze(1)
    _expect(reads, "every real token reads a key", query.expand(reads.shape))


def _expect(holds: Tensor, rule: str, values: Tensor) -> None:
    """Raise IndexBroken where not all of `holds` does, naming the first place and the values there."""
    if not holds.all():
        place = (~holds).nonzero()[0].tolist()
        at = place[: values.dim() - 1]
        raise IndexBroken(rule=rule, got=f"at {place} there is {values[tuple(at)].tolist()[:16]}")
