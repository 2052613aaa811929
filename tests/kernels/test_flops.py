"""FLOP formulas against counts by hand."""

from __future__ import annotations

import pytest

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.op import OPS

RULE = [0, 0, 13, 1, 1, 0, 2]
BY_HAND = [
    # 197 tokens, one protected: 98 even ranks from 2 to 196, 98 odd ones from 1 to 195
    ("bipartite_match", ((8, 197, 64), None, 184, 1, RULE), 2 * 8 * 98 * 98 * 64),
    # 6 tokens, none protected: 3 and 3
    ("bipartite_match", ((1, 6, 2), None, 5, 0, RULE), 2 * 3 * 3 * 2),
    # 7 tokens, five protected: rank 6, and rank 5
    ("bipartite_match", ((1, 7, 10), (1, 7), 6, 5, RULE), 2 * 10),
    ("bipartite_match", ((1, 1, 10), None, 1, 1, RULE), 0),
    ("select_tokens", ((8, 197), None, 139, 1, RULE, "score", False), 0),
    # 13 tokens of 384 numbers in each of 8 rows, each multiplied and added
    ("reduce_tokens", ((8, 197, 384), (8, 197), (8, 184), (8, 13), (8, 197), True), 2 * 8 * 13 * 384),
    ("reduce_tokens", ((8, 197, 384), (8, 197), (8, 184), None, None, True), 0),
    ("restore_tokens", ((8, 184, 384), (8, 197)), 0),
    ("token_count", ((8, 197, 384), 1, 1, RULE), 0),
    # q k^T and A v: 6 heads of 64
    ("attention", (*[(8, 6, 197, 64)] * 3, (8, 197), None, 0.125, False), 2 * 2 * 8 * 6 * 197 * 197 * 64),
    ("attention", ((1, 4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 6), None, None, 0.125, False), 2 * 4 * 3 * 5 * (8 + 6)),
    # q k^T, and its exponentials added up over queries
    (
        "attention_received",
        (*[(8, 6, 197, 64)] * 2, (8, 6, 197), None, None, None, 0.1, False),
        2 * 48 * 197 * 197 * 65,
    ),
    ("attention_with_lse", (*[(8, 6, 197, 64)] * 3, None, None, 0.125, False), 2 * 2 * 8 * 6 * 197 * 197 * 64),
    # the class token's row only
    ("attention_rows", ((8, 6, 1, 64), (8, 6, 197, 64), (8, 197), None, 0.125), 2 * 8 * 6 * 197 * 64),
]


@pytest.mark.parametrize(("name", "shapes", "expected"), BY_HAND)
def test_by_hand(name, shapes, expected):
    assert OPS[name].flops(*shapes) == expected
