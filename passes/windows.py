"""Windows of window x window tokens on a grid: which slot each token goes to, by its place alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import Plan, Tokens


def window_plan(tokens: Tokens, window: int) -> Plan:
    """One slot for every window of the grid, in raster order, behind the prefix; the first token of a window leads it.

    Windows must divide both sides of the grid.
    """
    assert tokens.grid is not None
    rows, columns = (side // window for side in tokens.grid)
    batch, count = tokens.hidden.shape[:2]
    slot, leader = _slots(tokens, window, count, columns), _leaders(tokens, window, columns)
    return Plan(
        slot.expand(batch, -1).contiguous(),
        leader.expand(batch, -1).contiguous(),
        tokens.out,
        (tokens.prefix + _moved(tokens, window, count, columns)).expand(batch, -1).contiguous(),
        weight=tokens.sizes,
        spare=False,
        grid=(rows, columns),
    )


def _slots(tokens: Tokens, window: int, count: int, columns: int) -> Tensor:
    """[1, N] int64."""
    every = torch.arange(count, device=tokens.hidden.device).unsqueeze(0)
    place, wide = (every - tokens.prefix).clamp(min=0), columns * window
    cell = place // wide // window * columns + place % wide // window
    return torch.where(every < tokens.prefix, every, tokens.prefix + cell)


def _leaders(tokens: Tokens, window: int, columns: int) -> Tensor:
    """[1, N'] int64."""
    every = torch.arange(tokens.out, device=tokens.hidden.device).unsqueeze(0)
    cell, wide = (every - tokens.prefix).clamp(min=0), columns * window
    first = cell // columns * window * wide + cell % columns * window
    return torch.where(every < tokens.prefix, every, tokens.prefix + first)


def _moved(tokens: Tokens, window: int, count: int, columns: int) -> Tensor:
    """[1, N - N'] int64 places of the patches that lead no window, ascending.

    A band of windows has window - 1 of them in each window of its first row, and all of its other rows.
    """
    wide = columns * window
    among_leaders = columns * (window - 1)
    band = among_leaders + (window - 1) * wide
    number = torch.arange(count - tokens.out, device=tokens.hidden.device).unsqueeze(0)
    within = number % band
    first_row = within // (window - 1) * window + within % (window - 1) + 1
    others = within - among_leaders + wide
    return number // band * window * wide + torch.where(within < among_leaders, first_row, others)


def joined_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """[B, H*W, C] -> [B, H*W / w^2, w^2 * C]: the tokens of a w x w window, row by row, side by side in channels."""
    rows, columns = (side // window for side in grid)
    cells = x.unflatten(1, (rows, window, columns, window)).transpose(2, 3)
    return cells.flatten(3).flatten(1, 2)


def parted_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `joined_windows`."""
    rows, columns = (side // window for side in grid)
    cells = x.unflatten(2, (window, window, -1)).unflatten(1, (rows, columns))
    return cells.transpose(2, 3).flatten(1, 4)
