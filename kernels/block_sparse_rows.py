"""block_sparse_attention as a CPU runs it: row after row, each over its own keys in cache.

The gathered form (the op's reference) copies every row's keys to memory and pays for what the lists could hold.  Here a
row's keys are copied right before they are used, unused entries cost nothing, and only keys that some query of the row
does not see are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .sparse_pairs import MaybeTensor, Pairs, inverse

AT_ONCE = 32  # rows whose keys are looked for together: a bitmap of AT_ONCE * N bytes


@dataclass(frozen=True)
class Row:
    """One row of queries and the keys that at least one of its queries reads."""

    first: int  # its first query
    end: int  # one past its last real query
    keys: Tensor  # [M] int64, ascending
    listed: Tensor  # [M] bool: read by every query that may see it, however far away
    doubtful: list[tuple[int, int]]  # spans of keys; a key outside them is read by every query


def attend_rows(q: Tensor, k: Tensor, v: Tensor, index: Pairs, scale: float, softcap: float | None) -> Tensor:
    """block_sparse_attention of real tensors, but for its `first` and `last` tokens; memory goes with N."""
    batch, heads, tokens, size = q.shape
    key_heads = k.shape[1]
    sets = index.sets(heads, key_heads)
    out = q.new_empty((batch, tokens, heads, v.shape[-1]))
    ends = [tokens] * batch if index.lengths is None else index.lengths.tolist()
    hidden = Hidden(heads // max(sets, key_heads), index, q)
    for b, end in enumerate(ends):
        out[b, end:] = 0
        for s in range(sets):
            ours = slice(s * heads // sets, (s + 1) * heads // sets)
            first = s * key_heads // sets
            keys, values = (x[b, first : max((s + 1) * key_heads // sets, first + 1)] for x in (k, v))
            lists = [None if x is None else x[min(b, len(x) - 1), min(s, x.shape[1] - 1)] for x in index.lists]
            places = None if index.positions is None else inverse(index.positions[b, first].long())
            for row in _rows_of(*lists, places, index, end):
                queries = q[b, ours, row.first : row.end].reshape(1, len(keys), -1, size)
                at = row.keys if places is None else places.index_select(0, row.keys)
                near, far = (x.index_select(1, at).unsqueeze(0) for x in (keys, values))
                mixed = hidden.attend(queries, near, far, row, scale, softcap)
                out[b, row.first : row.end, ours] = (
                    mixed.unflatten(2, (-1, row.end - row.first)).flatten(0, 2).transpose(0, 1)
                )
    return out.transpose(1, 2)


def _rows_of(tiles: MaybeTensor, columns: MaybeTensor, places: MaybeTensor, reach: Pairs, end: int) -> Iterator[Row]:
    """Rows with real queries.  tiles [R, T], columns [R, C]; places [N] of the keys, None: in order; end: real tokens.

    Keys are named by their positions throughout.
    """
    for start in range(0, end, AT_ONCE * reach.rows):
        first = torch.arange(start, min(start + AT_ONCE * reach.rows, end), reach.rows).unsqueeze(1)
        last = (first + reach.rows).clamp(max=end) - 1
        some = slice(start // reach.rows, start // reach.rows + len(first))
        listed = _listed([None if x is None else x[some].long() for x in (tiles, columns)], places, reach, first, end)
        place = torch.arange(end)
        if reach.causal:
            listed &= place <= last
        read = listed
        if reach.local:
            near = (place > first - reach.local) & (place < (last + 1 if reach.causal else last + reach.local))
            read = listed | near
        doubtful = _doubtful(read, place, first, last, reach)
        counts = read.sum(1).tolist()
        found = read.nonzero(as_tuple=True)[1].split(counts)
        for i, keys in enumerate(found):
            some_listed = listed[i].index_select(0, keys) if reach.local else keys
            spans = [(a, b) for a, b in doubtful[i] if a < b]
            at = start + i * reach.rows
            yield Row(at, min(at + reach.rows, end), keys, some_listed, spans)


def _listed(lists: list[MaybeTensor], places: MaybeTensor, reach: Pairs, first: Tensor, end: int) -> Tensor:
    """[rows, end] bool: the keys that tiles [rows, T] and columns [rows, C] name, and the sink."""
    tiles, columns = lists
    real, end = end, end if places is None else len(places)
    listed = torch.zeros(len(first), end + 1, dtype=torch.bool)  # column `end` takes what is none
    if tiles is not None:
        spans = tiles.unsqueeze(-1)
        spans = torch.where(spans < 0, end, spans + torch.arange(reach.width)).clamp(max=end)
        listed.scatter_(1, spans.flatten(1), True)
    if columns is not None:
        listed.scatter_(1, torch.where(columns < 0, end, columns).clamp(max=end), True)
    listed = listed[:, :real] if places is None else listed.index_select(1, places[:real])
    listed[:, : reach.sink] = True
    return listed


def _doubtful(read: Tensor, place: Tensor, first: Tensor, last: Tensor, reach: Pairs) -> list[list[list[int]]]:
    """Of each row, spans [from, to) of its keys that some query may not read: later ones, the edges of the window."""

    def up_to(edge: Tensor) -> Tensor:
        return (read & (place <= edge)).sum(1)

    local, everything = reach.local, read.sum(1)
    spans = [(up_to(first), everything)] if reach.causal else []
    if local:
        spans.append((up_to(first - local), up_to(last - local)))
        if not reach.causal:
            spans.append((up_to(first + local - 1), everything))
    return torch.stack([torch.stack(pair, 1) for pair in spans], 1).tolist() if spans else [[]] * len(read)


class Hidden:
    """The mask of one row at a time, in one buffer that is all zeros between rows."""

    def __init__(self, group: int, reach: Pairs, like: Tensor) -> None:
        self.group, self.reach = group, reach
        self.buffer = like.new_zeros((group, reach.rows, 0))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float, softcap: float | None) -> Tensor:
        """Attention of a row, q [1, Hk, G * queries, D], to its keys, k and v [1, Hk, M, D]; 0 for who reads none."""
        if not len(row.keys):
            return q.new_zeros((*q.shape[:3], v.shape[-1]))
        if not row.doubtful:
            return _attend(q, k, v, None, scale, softcap)
        mask = self._fill(row)
        out = _attend(q, k, v, mask, scale, softcap)
        if sum(b - a for a, b in row.doubtful) >= len(row.keys):
            out = out.masked_fill((mask == float("-inf")).all(-1, keepdim=True), 0.0)
        for a, b in row.doubtful:
            self.buffer[:, :, a:b] = 0
        return out

    def _fill(self, row: Row) -> Tensor:
        """[G * queries, M]: 0 where a query reads a key, else -inf."""
        count, reach = row.end - row.first, self.reach
        if self.buffer.shape[2] < len(row.keys):
            self.buffer = self.buffer.new_zeros((self.group, reach.rows, 2 * len(row.keys)))
        queries = torch.arange(row.first, row.end).unsqueeze(1)
        for a, b in row.doubtful:
            keys = row.keys[a:b]
            if reach.causal:
                self.buffer[:, :count, a:b].masked_fill_(keys > queries, float("-inf"))
            if reach.local:
                far = ((queries - keys).abs() >= reach.local) & ~row.listed[a:b]
                self.buffer[:, :count, a:b].masked_fill_(far, float("-inf"))
        return self.buffer[:, :count, : len(row.keys)].flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[None, None], scale=scale)
    logits = torch.tanh((q @ k.mT).float() * (scale / softcap)) * softcap
    return (logits if mask is None else logits + mask).softmax(-1).to(v.dtype) @ v
