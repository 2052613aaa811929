"""Rows of [B, N, C] picked by [B, K] indices: the one access pattern of all token ops."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import embedding


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """out[b, k] = x[b, index[b, k]].  x [B, N, ...], index [B, K] int64 in [0, N) -> [B, K, ...].

    One embedding lookup over the flattened batch copies whole rows; torch.gather would look up every element (12 times
    slower at 197 x 384 on a CPU).  An index_select needs reshapes, at which Inductor fails for symbolic K = 0.
    """
    batch, tokens = x.shape[:2]
    rows = embedding(_flat_index(index, tokens), x.reshape(batch * tokens, prod(x.shape[2:])))
    return rows if x.dim() == 3 else rows.reshape(batch, index.shape[1], *x.shape[2:])


def add_rows(x: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """x[b, index[b, k]] += part[b, k], in order of k.  x [B, N, C] contiguous and the caller's own: it is changed.

    index_add over the flattened batch adds whole rows; scatter_add adds every element by an index of its own (7 times
    slower at 13 x 384 on a CPU).
    """
    batch, tokens, width = x.shape
    flat = x.reshape(batch * tokens, width)
    added = flat.index_add_(0, _flat_index(index, tokens).reshape(-1), part.reshape(-1, width))
    return added.reshape(x.shape)


def _flat_index(index: Tensor, tokens: int) -> Tensor:
    """index [B, K] into the rows of [B, tokens], as one into the rows of [B * tokens]."""
    batch = index.shape[0]
    if isinstance(batch, int) and batch == 1:
        return index
    return index + torch.arange(batch, device=index.device).unsqueeze(1) * tokens


def first_columns(index: Tensor, count: int) -> Tensor:
    """index[:, :count] where there are at least that many: a gather, which unlike a slice compares no symbols."""
    if isinstance(index.shape[1], int) and isinstance(count, int):
        return index if index.shape[1] == count else index[:, :count].contiguous()
    column = torch.arange(count, device=index.device)
    return index.gather(1, column.expand(index.shape[0], count))


def slot_leaders(slot: Tensor, leads: Tensor, out: int) -> Tensor:
    """[B, out] int64: the token that leads each slot, 0 where none does.  slot [B, N] int64, leads [B, N] bool."""
    # column `out` takes what does not lead, and is cut off again
    table = slot.new_zeros((slot.shape[0], out + 1))
    place = torch.where(leads, slot, out)
    return table.scatter(1, place, _positions(slot))[:, :out].contiguous()


def ascending(chosen: Tensor, length: int, spare: Tensor) -> Tensor:
    """[B, length] int64: indices of the chosen tokens in ascending order, then `spare` [B, 1] in unused entries."""
    table = spare.expand(spare.shape[0], length + 1)
    place = torch.where(chosen, chosen.cumsum(1) - 1, length)
    return table.scatter(1, place, _positions(place))[:, :length].contiguous()


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand(like.shape)
