"""Masks are recognised by running the nodes that build them, whatever these nodes are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module
from tamis.capture.sites import find_sites
from tamis.graph import Mask

Build = Callable[..., Tensor]


class Masked(nn.Module):
    """Attention of embedded token ids under the mask that `build` makes of (ids, attention mask)."""

    def __init__(self, build: Build, buffer: Tensor | None = None) -> None:
        super().__init__()
        self.build = build
        self.embedding = nn.Embedding(64, 8)
        if buffer is not None:
            self.register_buffer("table", buffer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids).unsqueeze(1)
        extra = (self.table,) if hasattr(self, "table") else ()
        return scaled_dot_product_attention(x, x, x, attn_mask=self.build(input_ids, attention_mask, *extra))


def read(build: Build, buffer: Tensor | None = None, mask: Tensor | None = None, length: int = 5) -> Mask:
    """What capture finds of the mask, at dynamic batch and length."""
    ids = torch.ones(2, length, dtype=torch.int64)
    mask = torch.ones_like(ids) if mask is None else mask
    program = export_module(Masked(build, buffer).eval(), (ids, mask))
    (site,) = find_sites(canonicalise(program))
    return site.mask


def facts(mask: Mask) -> tuple[Any, ...]:
    return mask.kind, mask.additive, mask.padded, mask.causal, mask.window


def distances(ids: Tensor) -> Tensor:
    """[N, N] query position - key position."""
    places = torch.arange(ids.shape[1])
    return places.unsqueeze(1) - places


def keys(mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None, :]


def added(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def within(before: int | None, after: int | None) -> Build:
    """Seen: keys at most `before` back and `after` ahead, and no padding."""

    def build(ids: Tensor, mask: Tensor) -> Tensor:
        away = distances(ids)
        seen = keys(mask).expand(-1, 1, ids.shape[1], -1)
        seen = seen if before is None else seen & (away <= before)
        return seen if after is None else seen & (away >= -after)

    return build


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "kind", "causal"),
    [
        (None, None, "padding", False),
        (None, 0, "causal", True),
        (3, 3, "window", False),
        (64, 64, "window", False),  # longer than any of the short trials
        (2, 0, "window", True),
        (1023, 0, "window", True),
        (None, 2, "window", False),
    ],
    ids=str,
)
def test_kinds_with_padding(before: int | None, after: int | None, kind: str, causal: bool, additive: bool) -> None:
    plain = within(before, after)
    found = read((lambda ids, mask: added(plain(ids, mask))) if additive else plain)
    assert facts(found) == (kind, additive, True, causal, (before, after) if kind == "window" else None)
    assert found.node


def test_kinds_without_padding() -> None:
    causal = read(lambda ids, mask: distances(ids) >= 0)
    assert facts(causal) == ("causal", False, False, True, None)
    local = read(lambda ids, mask: distances(ids).abs() <= 40)
    assert facts(local) == ("window", False, False, False, (40, 40))
    full = read(lambda ids, mask: distances(ids).abs() >= 0)
    assert facts(full) == ("full", False, False, False, None)
    assert full.node is None


def test_a_window_longer_than_can_be_tried_is_kept_as_it_stands() -> None:
    """At the lengths that are tried it looks causal; calling it so would drop the window of longer sequences."""
    found = read(lambda ids, mask: (distances(ids) >= 0) & (distances(ids) < 100_000))
    assert facts(found) == ("bias", False, False, True, None)


def test_a_window_no_sequence_can_reach_is_none() -> None:
    table = torch.zeros(32, 1)

    def build(ids: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        torch._check(ids.shape[1] <= 32)
        return (distances(ids) >= 0) & (distances(ids) < 100_000)

    assert read(build, table).kind == "causal"


def test_a_window_inside_a_table_that_was_built_beforehand() -> None:
    places = torch.arange(48)
    away = places.unsqueeze(1) - places
    table = (away >= 0) & (away < 20)
    found = read(lambda ids, mask, table: table[: ids.shape[1], : ids.shape[1]], table)
    assert facts(found) == ("window", False, False, True, (19, 0))


def test_a_window_given_as_a_tensor() -> None:
    found = read(lambda ids, mask, limit: distances(ids).abs() <= limit, torch.tensor(30))
    assert facts(found) == ("window", False, False, False, (30, 30))


def test_padding_read_from_the_token_ids() -> None:
    """Made-up ids of 0 and 1 would never be the padding id."""
    found = read(lambda ids, mask: keys(ids != 50))
    assert facts(found) == ("padding", False, True, False, None)


def test_padding_given_as_floats() -> None:
    mask = torch.ones(2, 5)
    found = read(lambda ids, mask: (1.0 - mask)[:, None, None, :] * torch.finfo(torch.float32).min, mask=mask)
    assert facts(found) == ("padding", True, True, False, None)


def test_lengths_as_an_input() -> None:
    lengths = torch.tensor([5, 4])
    found = read(lambda ids, mask: (torch.arange(ids.shape[1]) < mask.unsqueeze(1))[:, None, None], mask=lengths)
    assert facts(found) == ("padding", False, True, False, None)


def test_a_table_from_the_user_is_kept_as_it_stands() -> None:
    """Nothing can be known of it beforehand, least of all that it hides nothing."""
    found = read(lambda ids, mask: mask, mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))
    assert (found.kind, found.padded) == ("bias", False)
    assert found.node


def test_a_graded_bias_tells_padding_and_causality() -> None:
    def slopes(ids: Tensor, mask: Tensor) -> Tensor:
        return distances(ids).abs() * -0.25 + added(keys(mask))

    def later_hidden(ids: Tensor, mask: Tensor) -> Tensor:
        return slopes(ids, mask) + added(distances(ids) >= 0)

    assert facts(read(slopes)) == ("bias", True, True, False, None)
    assert facts(read(later_hidden)) == ("bias", True, True, True, None)


def test_the_node_that_says_which_tokens_are_real_is_found() -> None:
    """Whether it is given or made: the last one, nearest to the mask."""
    causal = read(lambda ids, mask: (distances(ids) >= 0) & keys(mask))
    assert causal.real is not None
    assert causal.real.startswith("to")
    by_id = read(lambda ids, mask: (distances(ids) >= 0) & (ids != 0)[:, None, None, :])
    assert by_id.real == "ne"
    assert read(lambda ids, mask: distances(ids) >= 0).real is None
