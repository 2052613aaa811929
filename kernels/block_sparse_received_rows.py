"""block_sparse_received as a CPU runs it: row after row, each over its own keys in cache.

The gathered form (the op's reference) holds the logits of all rows at once, which are gigabytes where a window has
thousands of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import capped, grouped_logits
from .block_sparse_rows import Masks, Rows, rows_of
from .sparse_pairs import Pairs


def received_rows(
    q: Tensor, k: Tensor, lse: Tensor, shares: Tensor, index: Pairs, scale: float, softcap: float | None
) -> Tensor:
    """What keys get [B, H, N] from rows of real tensors, by the keys' places; memory goes with N.

    lse, shares  [B, H, N]  in compute precision: of each query, inf where it reads nothing; its weight
    """
    sums, masks = torch.zeros_like(shares), Masks.of_heads(index, q, k)
    for b, ours, theirs, rows in rows_of(index, q, k):
        place = slice(rows.first, rows.end)
        of_queries = q[b, ours, place], lse[b, ours, place], shares[b, ours, place]
        sums[b, ours].index_add_(1, rows.places, _received(*of_queries, k[b, theirs], rows, masks, scale, softcap))
    return sums


def _received(
    q: Tensor,
    lse: Tensor,
    shares: Tensor,
    k: Tensor,
    rows: Rows,
    masks: Masks,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """[H, R * M]: q [H, R * queries, D], lse and shares [H, R * queries], k [Hk, N, D]."""
    (count, many), heads, sets = rows.keys.shape, len(q), len(k)
    q, lse, shares = (rows.by_set(x, sets) for x in (q, lse.unsqueeze(-1), shares.unsqueeze(-1)))
    logits = capped(grouped_logits(q, rows.read(k), scale), softcap)
    mask = masks.of(rows)
    logits = logits if mask is None else logits + mask
    part = shares * (logits - lse).exp()  # [R, Hk, G * queries, M]
    masks.clear(rows)
    part = part.reshape(count, heads, rows.queries, many).sum(2)
    return part.transpose(0, 1).reshape(heads, -1)
