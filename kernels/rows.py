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
    offset = torch.arange(batch, device=x.device).unsqueeze(1) * tokens
    rows = embedding(index + offset, x.reshape(batch * tokens, prod(x.shape[2:])))
    return rows if x.dim() == 3 else rows.reshape(batch, index.shape[1], *x.shape[2:])


def first_columns(index: Tensor, count: int) -> Tensor:
    """index[:, :count] where there are at least that many: a gather, which unlike a slice compares no symbols."""
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
