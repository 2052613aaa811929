"""Rows of two folded axes read by one number are read by a place on each axis, where that is sure to be the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module

CHANNELS = 4


class Reads(nn.Module):
    """What `read` makes of rows [B * N, 4], the states [B, N, 4] and token ids [B, N]."""

    def __init__(self, read: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.table = nn.Embedding(90, CHANNELS)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.read(x.reshape(-1, CHANNELS), x, ids)


def first(rows: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return rows[torch.arange(x.shape[0]) * x.shape[1] + (ids == ids.amax()).to(torch.int32).argmax(-1)]


def turned(rows: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return rows[ids.argmin(1) + x.shape[1] * torch.arange(x.shape[0])]


def places(rows: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return rows[torch.arange(x.shape[0])[:, None] * x.shape[1] + torch.arange(x.shape[1])]


def last(rows: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """The place is a count, which may be a row's length."""
    return rows[torch.arange(x.shape[0]) * x.shape[1] + (ids > 40).sum(1) - 1]


def elsewhere(rows: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """The place is one on another axis."""
    return rows[torch.arange(x.shape[0]) * x.shape[1] + x.argmax(-1)[:, 0]]


def shifted(rows: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """The range does not begin at 0."""
    return rows[torch.arange(x.shape[0])[:, None] * x.shape[1] + torch.arange(-1, x.shape[1] - 1)]


def indices(read: Callable[..., Tensor]) -> list[int]:
    """By how many tensors the canonical graph reads, checked at other sizes."""
    model = Reads(read)
    generator = torch.Generator().manual_seed(1)
    program = canonicalise(export_module(model, (torch.randint(90, (2, 7), generator=generator),)))
    for batch, length in ((1, 5), (3, 9)):
        ids = torch.randint(90, (batch, length), generator=generator)
        with torch.no_grad():
            assert torch.equal(program.module()(ids), model(ids))
    return [len(node.args[1]) for node in program.graph.nodes if node.target is torch.ops.aten.index.Tensor]


@pytest.mark.parametrize("read", [first, turned, places])
def test_rows_are_read_where_they_stood(read: Callable[..., Tensor]) -> None:
    assert indices(read) == [2]


@pytest.mark.parametrize("read", [last, elsewhere, shifted])
def test_a_number_that_may_leave_its_row_is_left(read: Callable[..., Tensor]) -> None:
    assert indices(read) == [1]
