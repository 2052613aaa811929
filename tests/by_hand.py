"""Tokens and plans written by hand, for methods' worked examples and for oracles that decide one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tamis.passes.reduction import TokenReduction
from tamis.tokens import Attention, Plan, Tokens

Rows = list[list[list[int]]]  # per row of the batch its slots in order, each the tokens in it, its leader first


def tokens_by_hand(
    method: TokenReduction,
    hidden: Tensor,
    *,
    prefix: int = 1,
    attention: Tensor | None = None,
    keys: Tensor | None = None,
    layer: int = 0,
    layers: int = 1,
    **state: Any,
) -> Tokens:
    """What `method` sees of hidden [B, N, C] without padding; attention [B, H, N, N], keys [B, H, N, D]."""
    batch, count = hidden.shape[:2]
    rule, order = method.rule(layer, layers, prefix), torch.arange(count).expand(batch, count)

    def received(weight: Tensor | None, among: Tensor | None) -> Tensor:
        assert attention is not None
        rows = attention if among is None else attention * among[:, None, None]
        rows = rows / rows.sum(-1, keepdim=True)
        asking = torch.ones(batch, count) if weight is None else weight
        asking = asking if among is None else asking * among
        return torch.einsum("bhij,bi->bhj", rows, asking) / asking.sum(1)[:, None, None]

    def matrix() -> Tensor:
        assert attention is not None
        return attention

    statistics = Attention(lambda: matrix()[:, :, 0], received, lambda index: matrix()[:, :, index[0]], matrix)
    return Tokens(
        hidden=hidden,
        rule=rule,
        out=rule.out(count),
        prefix=prefix,
        layer=layer,
        layers=layers,
        _tensors={"keys": lambda: keys, "positions": lambda: order, "places": lambda: order - prefix},
        _attention=lambda: statistics,
        **state,
    )


def plan_by_hand(tokens: Tokens, rows: Rows, weight: Tensor | None = None, **fields: Any) -> Plan:
    """The plan whose slots hold these tokens; what is in no slot is dropped."""
    batch, count = tokens.hidden.shape[:2]
    slot = torch.full((batch, count), -1)
    leader, joined = torch.zeros(batch, tokens.out, dtype=torch.int64), []
    for b, slots in enumerate(rows):
        for number, members in enumerate(slots):
            slot[b, members] = number
            leader[b, number] = members[0]
        joined.append(sorted(i for members in slots for i in members[1:]))
    spare = count - tokens.out
    moved = torch.tensor([[*row, *[int(leader[b, 0])] * (spare - len(row))] for b, row in enumerate(joined)])
    valid = None
    if tokens.valid is not None:
        valid = torch.arange(tokens.out) < torch.tensor([[len(slots)] for slots in rows])
    merges = any(joined)
    return Plan(
        slot, leader, tokens.out, moved.reshape(batch, spare) if merges else None, weight, valid=valid, **fields
    )


def real_tokens(tokens: Tokens) -> Sequence[list[int]]:
    """For every row its real tokens, in order."""
    if tokens.valid is None:
        return [list(range(tokens.hidden.shape[1])) for _ in range(tokens.hidden.shape[0])]
    return [row.nonzero().flatten().tolist() for row in tokens.valid]


def reduced(plan: Plan, x: Tensor) -> Tensor:
    """The plan applied by the op that rewritten graphs call."""
    return torch.ops.tamis.reduce_tokens(x, plan.slot, plan.leader, plan.moved, plan.weight, plan.normalize)
