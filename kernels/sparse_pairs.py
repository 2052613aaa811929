"""Who reads whom under an index of `block_sparse_attention`: the one place that says it for what is not a kernel.

`gathered` answers for all rows of queries at once, by the places of the keys that a row needs; `dense_rows` for the
tokens that read everything.  Definition: block_sparse_attention's docstring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MaybeTensor = Tensor | None


@dataclass(frozen=True)
class Pairs:
    """The arguments of block_sparse_attention that say who reads whom, under their names there."""

    tiles: MaybeTensor
    columns: MaybeTensor
    positions: MaybeTensor
    lengths: MaybeTensor
    share: str
    rows: int
    width: int
    sink: int
    local: int
    first: int
    last: int
    causal: bool
    window: int = 0
    aligned: bool = False

    @staticmethod
    def of(*arguments: Any) -> tuple[Pairs, float, float | None]:
        """Of block_sparse_attention's arguments behind q, k and v; with the scale and the soft cap."""
        rest: tuple[Any, ...] = (None, 0, False)  # softcap, window, aligned
        scale, causal, softcap, window, aligned = (*arguments[11:], *rest[len(arguments) - 13 :])
        tiles, columns, positions, lengths, share, rows, width, sink, local, first, last = arguments[:11]
        lists = (tiles, columns, positions, lengths, share, rows, width)
        return Pairs(*lists, sink, local, first, last, causal, window, aligned), scale, softcap

    def sets(self, heads: int, key_heads: int) -> int:
        """How many heads have keys of their own: 1 where all share a list and the order of keys in memory."""
        least = 1 if self.positions is None else key_heads
        return {"layer": least, "kv": key_heads, "query": heads}[self.share]


def gathered(index: Pairs, tokens: Any, heads: int, key_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the keys that each row of queries needs [b, s, R, K], 0 for none, and who sees them [b, s, R, rows, K].

    Axes b and s are 1 where nothing differs along them.  R = ceil(tokens / rows).
    """
    sets = index.sets(heads, key_heads)
    order = None if index.positions is None else of_heads(index.positions.to(torch.int64), sets, key_heads)
    count = (tokens + index.rows - 1) // index.rows
    first = torch.arange(count, device=device).unsqueeze(1) * index.rows
    queries = (first + torch.arange(index.rows, device=device)).unsqueeze(-1)  # [R, rows, 1]
    parts = [
        *(_by_position(order, part, tokens) for part in _implicit(index, first)),
        *(_by_place(order, part, tokens) for part in _listed(index, sets, count, device)),
    ]
    if not parts:
        none = (first * 0 - 1)[None, None]
        parts = [(none, none, "listed")]
    batch = max_of([x.shape[0] for place, position, _ in parts for x in (place, position)])
    places, positions = (
        torch.cat([x.expand(batch, sets, count, -1) for x in some], -1)
        for some in ([part[0] for part in parts], [part[1] for part in parts])
    )
    seen = torch.cat([_read(index, queries, part).expand(batch, sets, count, -1, -1) for part in parts], -1)
    end = tokens if index.lengths is None else index.lengths.reshape(-1, 1, 1, 1)
    there = (positions >= 0) & (positions < end)
    seen = seen & there.unsqueeze(-2)
    if index.causal:
        seen = seen & (positions.unsqueeze(-2) <= queries)
    if index.window:
        seen = seen & ((positions.unsqueeze(-2) - queries).abs() < index.window)
    if index.lengths is not None:
        seen = seen & (queries < end.unsqueeze(-1))
    return torch.where(there, places, 0), seen


Part = tuple[Tensor, Tensor, str]  # places in memory and positions [b, s, R, n], -1 for none; "sink", "local", "listed"


def _implicit(index: Pairs, first: Tensor) -> list[tuple[Tensor, str]]:
    """Positions [1, 1, R, n] of the sinks and of the nearest keys."""
    parts, device = [], first.device
    if index.sink:
        parts.append((torch.arange(index.sink, device=device).expand(1, 1, first.shape[0], index.sink), "sink"))
    if index.local:
        after = index.rows if index.causal else index.rows + index.local - 1
        parts.append(((first + torch.arange(1 - index.local, after, device=device))[None, None], "local"))
    return parts


def _listed(index: Pairs, sets: int, count: Any, device: torch.device) -> list[Tensor]:
    """Places [B, s, R, n] of the keys of tiles, and of columns; -1 for none."""
    parts = []
    if index.tiles is not None:
        start = _lists(index.tiles, sets, count).unsqueeze(-1)
        parts.append(torch.where(start < 0, -1, start + torch.arange(index.width, device=device)).flatten(-2))
    if index.columns is not None:
        parts.append(_lists(index.columns, sets, count))
    return parts


def _lists(lists: Tensor, sets: int, count: Any) -> Tensor:
    """Lists [B, S, R, T] as int64 [B, S, count, T], or [B, sets, count, T] where they are many: sizes as symbols."""
    lists = lists.index_select(2, torch.arange(count, device=lists.device)).to(torch.int64)
    alone = isinstance(lists.shape[1], int) and lists.shape[1] == 1
    return lists if alone else lists.index_select(1, torch.arange(sets, device=lists.device))


def _by_position(order: MaybeTensor, part: tuple[Tensor, str], tokens: Any) -> Part:
    position, kind = part
    return position if order is None else _looked_up(inverse(order), position, tokens), position, kind


def _by_place(order: MaybeTensor, place: Tensor, tokens: Any) -> Part:
    return place, place if order is None else _looked_up(order, place, tokens), "listed"


def of_heads(x: Tensor, heads: int, key_heads: int) -> Tensor:
    """x [B, Hk, ...] of key heads for `heads` heads, each that of its key head: [B, heads, ...], sizes as symbols."""
    return x.index_select(1, torch.arange(heads, device=x.device) // (heads // key_heads))


def inverse(order: Tensor) -> Tensor:
    """Where in memory the key of each position lies: of [..., N] permutations, int64, each its inverse."""
    place = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter(-1, order, place.expand(order.shape))


def _looked_up(table: Tensor, at: Tensor, tokens: Any) -> Tensor:
    """table[b, s, at[b, s, ...]] of [B, S, N]; -1 where `at` is none of 0 .. N - 1."""
    batch, sets = table.shape[:2]
    inside = (at >= 0) & (at < tokens)
    wanted = torch.where(inside, at, 0).expand(batch, sets, -1, -1)
    found = table.gather(2, wanted.flatten(2)).reshape(wanted.shape)
    return torch.where(inside, found, -1)


def _read(index: Pairs, queries: Tensor, part: Part) -> Tensor:
    """[b, s, R, rows, n]: whether a query reads a key as this part; one that several name is read as the first."""
    position = part[1].unsqueeze(-2)
    if part[2] == "sink":
        return (position >= 0).expand(*position.shape[:-2], queries.shape[1], -1)
    fresh = position >= index.sink
    if not index.local:
        return fresh.expand(*position.shape[:-2], queries.shape[1], -1)
    near = (queries - position).abs() < index.local
    return fresh & near if part[2] == "local" else fresh & ~near


def max_of(sizes: list[Any]) -> Any:
    """The size that parts with 1 along an axis are expanded to."""
    return next((size for size in sizes if not (isinstance(size, int) and size == 1)), 1)


def dense_rows(index: Pairs, batch: Any, tokens: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that read every key: their places [B, F], whether it is named the first time, and what they see.

    F = first + last; a batch row that has fewer tokens names one again, and one without any token 0.  What they see:
    [B, 1 or Hk, F, N] over the places of keys.
    """
    lengths = index.lengths
    if lengths is None:
        lengths = torch.full((batch,), tokens, dtype=torch.int64, device=device)
    ends = lengths.unsqueeze(1)
    opening = torch.arange(index.first, device=device).expand(batch, -1)
    named = torch.cat([opening, ends - index.last + torch.arange(index.last, device=device)], 1)
    place = torch.minimum(named.clamp(min=0), (ends - 1).clamp(min=0))
    closing = torch.arange(index.first + index.last, device=device) >= index.first
    once = (place == named) & (named < ends) & ~(closing & (named < index.first))
    position = torch.arange(tokens, device=device)[None, None] if index.positions is None else index.positions
    position = position.unsqueeze(2)
    seen = (position < lengths.reshape(-1, 1, 1, 1)).expand(-1, -1, place.shape[1], -1)
    if index.window:
        seen = seen & ((position - place[:, None, :, None]).abs() < index.window)
    return place, once, seen & (position <= place[:, None, :, None]) if index.causal else seen
