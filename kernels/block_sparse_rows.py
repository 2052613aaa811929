"""block_sparse_attention as a CPU runs it: row after row, each over its own keys in cache.

The gathered form (the op's reference) copies every row's keys to memory and pays for what the lists could hold.  Here a
row's keys are copied right before they are used, unused entries cost nothing, and only keys that some query of the row
does not see are masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import capped, grouped_logits, grouped_mix
from .precision import compute_dtype
from .sparse_pairs import MaybeTensor, Pairs, inverse

Spans = tuple[tuple[int, int], ...]

AT_ONCE = 32  # rows whose keys are looked for together: a bitmap of AT_ONCE * N bytes
TOGETHER = 1024  # keys, of rows that have equally many, which one call attends to: they are to stay in cache


@dataclass(frozen=True)
class Rows:
    """R rows of queries one after another and the M keys that at least one query of each reads."""

    first: int  # the first query of the first
    end: int  # one past the last real query of the last
    keys: Tensor  # [R, M] int64, ascending
    places: Tensor  # [R * M] int64: where they lie
    listed: Tensor | None  # [R, M] bool: read by every query that may see it, however far away; None: all are
    doubtful: Spans  # spans of M; keys outside them are read by every query of their row

    @property
    def queries(self) -> int:
        """Queries of each row."""
        return (self.end - self.first) // len(self.keys)

    def by_set(self, x: Tensor, sets: int) -> Tensor:
        """x [H, R * queries, D] of query heads in sets that share their keys, [R, sets, H / sets * queries, D]."""
        return x.reshape(sets, -1, len(self.keys), self.queries, x.shape[-1]).permute(2, 0, 1, 3, 4).flatten(2, 3)

    def read(self, x: Tensor) -> Tensor:
        """The keys that the rows read, of x [Hk, N, D]: [R, Hk, M, D]."""
        return x.index_select(1, self.places).unflatten(1, self.keys.shape).transpose(0, 1)


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, index: Pairs, scale: float, softcap: float | None, *, lse: bool = False
) -> tuple[Tensor, MaybeTensor]:
    """block_sparse_attention of real tensors, but for its `first` and `last` tokens; memory goes with N.

    lse  whether the log-sum-exp of the logits is wanted too, [B, H, N]; logits of a few rows are then held whole
    """
    batch, heads, tokens, _ = q.shape
    out = q.new_empty((batch, tokens, heads, v.shape[-1]))
    sums = q.new_full((batch, heads, tokens), -torch.inf, dtype=compute_dtype(q)) if lse else None
    masks = Masks.of_heads(index, q, k)
    for b, end in enumerate(_ends(index, batch, tokens)):
        out[b, end:] = 0
    for b, ours, theirs, rows in rows_of(index, q, k):
        place = slice(rows.first, rows.end)
        mixed, found = _attend(q[b, ours, place], k[b, theirs], v[b, theirs], rows, masks, scale, softcap, lse)
        # one copy, from [R, H, queries, D] to where they belong
        out[b, place, ours].unflatten(0, (-1, rows.queries)).copy_(mixed.transpose(1, 2))
        if sums is not None and found is not None:
            sums[b, ours, place] = found
    return out.transpose(1, 2), sums


def _ends(index: Pairs, batch: int, tokens: int) -> list[int]:
    return [tokens] * batch if index.lengths is None else index.lengths.tolist()


def rows_of(index: Pairs, q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, slice, Rows]]:
    """All rows with real queries, of which batch row, and which heads of q and of k [B, H, N, D] they are."""
    heads, key_heads = q.shape[1], k.shape[1]
    sets = index.sets(heads, key_heads)
    for b, end in enumerate(_ends(index, q.shape[0], q.shape[2])):
        for s in range(sets):
            ours = slice(s * heads // sets, (s + 1) * heads // sets)
            first = s * key_heads // sets
            theirs = slice(first, max((s + 1) * key_heads // sets, first + 1))
            tiles, columns = (
                None if x is None else x[min(b, len(x) - 1), min(s, x.shape[1] - 1)]
                for x in (index.tiles, index.columns)
            )
            places = None if index.positions is None else inverse(index.positions[b, first].long())
            for rows in _rows_of(tiles, columns, places, index, end):
                yield b, ours, theirs, rows


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, masks: Masks, scale: float, softcap: float | None, lse: bool
) -> tuple[Tensor, MaybeTensor]:
    """[R, H, queries, D] of q [H, R * queries, D] over k and v [Hk, N, D], 0 for who reads no key; and lse [H, .]."""
    (count, many), q = rows.keys.shape, rows.by_set(q, len(k))
    if not many:
        return v.new_zeros((count, q.shape[1] * q.shape[2] // rows.queries, rows.queries, v.shape[-1])), None
    k, v = (rows.read(x) for x in (k, v))
    mask, sums = masks.of(rows), None
    if softcap is None and not lse:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        logits = capped(grouped_logits(q, k, scale), softcap)
        logits = logits if mask is None else logits + mask
        out = grouped_mix(logits.softmax(-1), v, q)
        sums = logits.logsumexp(-1).reshape(count, -1, rows.queries).transpose(0, 1).flatten(1) if lse else None
    if mask is not None and sum(b - a for a, b in rows.doubtful) >= many:
        out = out.masked_fill((mask == float("-inf")).all(-1, keepdim=True), 0.0)
    masks.clear(rows)
    return out.reshape(count, -1, rows.queries, v.shape[-1]), sums


def _rows_of(tiles: MaybeTensor, columns: MaybeTensor, places: MaybeTensor, reach: Pairs, end: int) -> Iterator[Rows]:
    """Rows with real queries.  tiles [R, T], columns [R, C]; places [N] of the keys, None: in order; end: real tokens.

    Keys are named by their positions throughout.
    """
    for start in range(0, end, AT_ONCE * reach.rows):
        first = torch.arange(start, min(start + AT_ONCE * reach.rows, end), reach.rows).unsqueeze(1)
        last = (first + reach.rows).clamp(max=end) - 1
        some = slice(start // reach.rows, start // reach.rows + len(first))
        listed = _listed([None if x is None else x[some].long() for x in (tiles, columns)], places, reach, first, end)
        token = torch.arange(end)
        if reach.causal:
            listed &= token <= last
        read = listed
        if reach.local:
            near = (token > first - reach.local) & (token < (last + 1 if reach.causal else last + reach.local))
            read = listed | near
        if reach.window:
            read = read & (token > first - reach.window) & (token < last + reach.window)
        row, found = (x.contiguous() for x in read.nonzero().unbind(1))
        flags = listed[read] if reach.local else None
        begin, at = start, 0
        sizes = (last - first + 1).flatten().tolist()
        counts = torch.bincount(row, minlength=len(first))
        kinds = zip(counts.tolist(), sizes, _doubtful(row, found, counts, first, last, reach), strict=True)
        for count, many, queries, doubtful in _alike(kinds):
            span, stop = slice(at, at + count * many), begin + count * queries
            own = None if flags is None else flags[span].reshape(count, many)
            keys = found[span]
            where = keys if places is None else places.index_select(0, keys)
            yield Rows(begin, stop, keys.reshape(count, many), where, own, doubtful)
            begin, at = stop, span.stop


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


def _doubtful(row: Tensor, key: Tensor, everything: Tensor, first: Tensor, last: Tensor, reach: Pairs) -> list[Spans]:
    """Of each row, spans [from, to) of its keys that some query may not read: later ones, the edges of the window.

    row, key [M]: the keys of all rows, of which each has `everything`.
    """

    def up_to(edge: Tensor) -> Tensor:
        return torch.bincount(row[key <= edge.flatten()[row]], minlength=len(everything))

    local = reach.local
    spans = [(up_to(first), everything)] if reach.causal else []
    if local:
        spans.append((up_to(first - local), up_to(last - local)))
        if not reach.causal:
            spans.append((up_to(first + local - 1), everything))
    if reach.window:
        spans.append((torch.zeros_like(everything), up_to(last - reach.window)))
        if not reach.causal:
            spans.append((up_to(first + reach.window - 1), everything))
    if not spans:
        return [()] * len(everything)
    table = torch.stack([torch.stack(pair, 1) for pair in spans], 1).tolist()
    return [tuple((a, b) for a, b in row if a < b) for row in table]


def _alike(kinds: Iterable[tuple[int, int, Spans]]) -> Iterator[tuple[int, int, int, Spans]]:
    """Runs of rows alike in keys, queries and doubtful spans, of TOGETHER keys at most, and how many rows each has."""
    for (many, queries, spans), run in groupby(kinds):
        left, most = len(list(run)), max(1, TOGETHER // max(many, 1))
        while left:
            yield min(left, most), many, queries, spans
            left -= min(left, most)


class Masks:
    """What rows do not read, in one buffer that is all zeros between calls."""

    def __init__(self, group: int, reach: Pairs, like: Tensor) -> None:
        self.group, self.reach = group, reach
        self.buffer = like.new_zeros((1, group, reach.rows, 0))

    @staticmethod
    def of_heads(reach: Pairs, q: Tensor, k: Tensor) -> Masks:
        """Those for all rows of an index."""
        heads, key_heads = q.shape[1], k.shape[1]
        return Masks(heads // max(reach.sets(heads, key_heads), key_heads), reach, q)

    def of(self, rows: Rows) -> Tensor | None:
        """[R or 1, 1, G * queries, M]: 0 where a query reads a key, else -inf; None where every query reads all."""
        if not rows.doubtful:
            return None
        hidden = [self._hidden(rows, a, b) for a, b in rows.doubtful]
        count = 1 if all(bool((one == one[:1]).all()) for one in hidden) else len(rows.keys)
        if self.buffer.shape[0] < count or self.buffer.shape[3] < rows.keys.shape[1]:
            shape = (max(count, self.buffer.shape[0]), self.group, self.reach.rows, 2 * rows.keys.shape[1])
            self.buffer = self.buffer.new_zeros(shape)
        mask = self.buffer[:count, :, : rows.queries, : rows.keys.shape[1]]
        for one, (a, b) in zip(hidden, rows.doubtful, strict=True):
            mask[..., a:b].masked_fill_(one[:count].unsqueeze(1), float("-inf"))
        return mask.flatten(1, 2).unsqueeze(1)

    def clear(self, rows: Rows) -> None:
        """Zeros again."""
        for a, b in rows.doubtful:
            self.buffer[..., a:b] = 0

    def _hidden(self, rows: Rows, a: int, b: int) -> Tensor:
        """[R, queries, b - a] bool: which of these keys of its row a query does not read."""
        keys = rows.keys[:, None, a:b]
        queries = torch.arange(rows.first, rows.end).reshape(len(rows.keys), -1, 1)
        hidden = keys > queries if self.reach.causal else torch.zeros(1, 1, 1, dtype=torch.bool)
        if self.reach.local and rows.listed is not None:
            hidden = hidden | (((queries - keys).abs() >= self.reach.local) & ~rows.listed[:, None, a:b])
        if self.reach.window:
            hidden = hidden | ((queries - keys).abs() >= self.reach.window)
        return hidden
