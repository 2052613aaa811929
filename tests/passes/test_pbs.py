"""PBS-Attn: the order of keys, and which tiles of it are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_oracle import drawn, expanded, fixture

from tamis.errors import BadParameter
from tamis.passes.methods.pbs import PBS


def test_pbs_example() -> None:
    """The card's order is that of query head 0; that of both query heads lies over the mean of their weights."""
    heads = fixture()
    method = PBS(block=4, segment=8)
    order = method.order(replace(heads, queries=heads.queries[:, :1]))
    assert order[0, 0].tolist() == [7, 3, 4, 6, 5, 0, 1, 2, 15, 11, 13, 12, 14, 8, 9, 10]
    keys = heads.keys[0, 0]
    logits = torch.stack([0.5 * heads.queries[0, h, -4:] @ keys.T for h in range(2)])
    mean = logits.softmax(-1).mean((0, 1))
    expected = [8 * s + i for s in range(2) for i in sorted(range(8), key=lambda i, s=s: -mean[8 * s + i])]
    assert method.order(heads)[0, 0].tolist() == expected


def test_pbs_orders_keys_within_whole_segments_only() -> None:
    heads = drawn(13, 101, lengths=[101, 60])
    order = PBS(block=8, segment=16).order(heads).long()
    assert torch.equal(order.sort(-1).values, torch.arange(101).expand(order.shape))
    assert torch.equal(order // 16, (torch.arange(101) // 16).expand(order.shape)), "no key leaves its segment"
    for b, end in enumerate((96, 48)):
        assert torch.equal(order[b, :, end:], torch.arange(end, 101).expand(2, -1)), "a broken segment stays"
        assert not torch.equal(order[b, :, :end], torch.arange(end).expand(2, -1))


def test_pbs_reads_its_segment_and_the_first_token_whatever_the_threshold() -> None:
    heads = drawn(14, 101)
    mask = expanded(PBS(block=8, segment=16, threshold=0.0).index(heads), heads)
    query, key = torch.arange(101).unsqueeze(1), torch.arange(101)
    own = (query // 16 == key // 16) & (key <= query)
    assert mask[..., own].all()
    assert mask[..., 0].all()
    assert (mask.sum(-1) <= own.sum(-1) + 8).all(), "and no more than the tile of the first token"


def test_without_an_order_pbs_is_the_pooled_map() -> None:
    """Queries whose attention to the keys is even leave every key where it is."""
    heads = drawn(15, 96)
    queries = heads.queries.clone()
    queries[:, :, -8:] = 0
    even = replace(heads, queries=queries)
    method = PBS(block=8, segment=8, threshold=0.5)
    assert torch.equal(method.order(even).long(), torch.arange(96).expand(2, 2, -1))
    means = [x.float().unflatten(2, (12, 8)).mean(3) for x in (queries, heads.keys.repeat_interleave(2, 1))]
    logits = means[0] @ means[1].mT * heads.scale
    tiles = method.index(even).tiles
    assert tiles is not None
    for h in range(4):
        for row in range(12):
            line = logits[0, h, row, :row].softmax(-1).tolist()
            found, held = {0, row}, 0.0
            for c in sorted(range(row), key=lambda c: -line[c]):
                if held < 0.5:
                    found.add(c)
                held += line[c]
            assert [t // 8 for t in tiles[0, h, row].tolist() if t >= 0] == sorted(found)


def test_segments_are_whole_tiles() -> None:
    with pytest.raises(BadParameter, match="segment must be a multiple of the block, 128"):
        PBS(segment=200)
