"""Methods that match tokens, by their cards, one token at a time: subclasses whose plans use no op and no helper of ours.

`Slow*` stand in for the methods in hand-written forwards (`oracle.reduced_forward`), so that a whole rewritten model is
compared with the card.  A row's answer is a list of groups in the order of their slots, each led by its first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamis.passes.methods.tofu import ToFu
from tamis.tokens import Plan, Tokens

Groups = list[list[int]]


def cosines(vectors: Tensor) -> list[list[float]]:
    """[N, D] -> N x N; a vector of length zero is like nothing."""
    wide = vectors.double()
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (unit @ unit.T).tolist()


def real_of(tokens: Tokens, b: int) -> list[int]:
    """The real tokens of a row, in order."""
    count = tokens.hidden.shape[1]
    return [i for i in range(count) if tokens.valid is None or bool(tokens.valid[b, i])]


def plan_of(tokens: Tokens, rows: list[Groups], **fields: Any) -> Plan:
    """Groups of every row as a Plan; merging by size unless `fields` say otherwise."""
    batch, count, out = len(rows), tokens.hidden.shape[1], int(tokens.out)
    slot = torch.full((batch, count), -1, dtype=torch.int64)
    leader = torch.zeros(batch, out, dtype=torch.int64)
    moved = torch.zeros(batch, count - out, dtype=torch.int64)
    for b, groups in enumerate(rows):
        for j, group in enumerate(groups):
            slot[b, group] = j
            leader[b, j] = group[0]
        joined = sorted(i for group in groups for i in group[1:])
        moved[b] = torch.tensor(joined + [groups[0][0]] * (count - out - len(joined)))
    valid = None
    if tokens.valid is not None:
        valid = torch.arange(out) < torch.tensor([[len(groups)] for groups in rows])
    merging: dict[str, Any] = {"moved": moved, "weight": tokens.sizes}
    return Plan(slot, leader, tokens.out, valid=valid, **(merging | fields))


def best_pairs(tokens: Tokens, b: int, alike: Callable[[int, int], float]) -> tuple[list[int], list[int], dict]:
    """ToMe's matching: even ranks a that stay, odd ranks b, and partner[i] in b of each of a that merges."""
    real = real_of(tokens, b)
    free = [(rank, i) for rank, i in enumerate(real) if rank >= tokens.prefix]
    even, odd = ([i for rank, i in free if rank % 2 == parity] for parity in (0, 1))
    best = {i: max(odd, key=lambda j, i=i: (alike(i, j), -j)) for i in even if odd}
    ranked = sorted(best, key=lambda i: (-alike(i, best[i]), i))[: tokens.rule.removed(len(real))]
    stay = [i for i in even if i not in ranked]
    if not tokens.prefix:
        stay = sorted(stay, key=lambda i: (-alike(i, best[i]) if i in best else 0, i))
    return real[: tokens.prefix] + stay, odd, {i: best[i] for i in sorted(ranked)}


def parity_groups(tokens: Tokens, b: int) -> Groups:
    """Groups of ToMe's matching on the mean of the heads' keys."""
    alike = cosines(tokens.keys_before_rope[b].double().mean(0))
    stay, odd, partner = best_pairs(tokens, b, lambda i, j: alike[i][j])
    return [[i] for i in stay] + [[j, *(i for i in partner if partner[i] == j)] for j in odd]


@dataclass(frozen=True)
class SlowToFu(ToFu):
    """Card 4."""

    def plan(self, tokens: Tokens) -> Plan:
        rows = [parity_groups(tokens, b) for b in range(tokens.hidden.shape[0])]
        if tokens.layer < (tokens.layers // 2 if self.switch is None else self.switch):
            alone = [[group[:1] for group in groups] for groups in rows]
            return plan_of(tokens, alone, moved=None, weight=None, counts_sizes=False, drops=True)
        return plan_of(tokens, rows, max_norm=True)
