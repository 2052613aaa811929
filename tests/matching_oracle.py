"""Methods that match tokens, by their cards, one token at a time: their plans use no op and no helper of ours.

`Slow*` stand in for the methods in hand-written forwards (`oracle.reduced_forward`), so that a whole rewritten model is
compared with the card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from by_hand import Rows, plan_by_hand, real_tokens
from torch import Tensor

from tamis.kernels.hash_scores import hash_scores
from tamis.passes.methods.diffrate import DiffRate
from tamis.passes.methods.mctf import MCTF
from tamis.passes.methods.tofu import ToFu
from tamis.passes.methods.tome import ToMe
from tamis.tokens import Plan, Tokens

Groups = list[list[int]]
Alike = Callable[[int, int], float]


def cosines(vectors: Tensor) -> list[list[float]]:
    """[N, D] -> N x N; a vector of length zero is like nothing."""
    wide = vectors.double()
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (unit @ unit.T).tolist()


def alike_keys(tokens: Tokens, b: int) -> list[list[float]]:
    """Cosines of the mean of the heads' keys."""
    return cosines(tokens.keys_before_rope[b].double().mean(0))


def best_pairs(a: list[int], b: list[int], alike: Alike, count: int) -> tuple[dict[int, int], list[int]]:
    """The partner in b of each of the `count` of a that merge, and the others of a, by falling likeness."""
    partner = {i: max(b, key=lambda j, i=i: (alike(i, j), -j)) for i in a if b}
    ranked = sorted(a, key=lambda i: (-alike(i, partner[i]) if b else 0, i))
    return {i: partner[i] for i in sorted(ranked[:count])}, ranked[count:]


def halves(tokens: Tokens, real: list[int]) -> Groups:
    """Unprotected tokens of even rank, and of odd."""
    free = [(rank, i) for rank, i in enumerate(real) if rank >= tokens.prefix]
    return [[i for rank, i in free if rank % 2 == parity] for parity in (0, 1)]


def joined(leaders: list[int], goal: dict[int, int]) -> Groups:
    """Each leader with those that merge into it."""
    return [[j, *(i for i in goal if goal[i] == j)] for j in leaders]


def merged_by_size(tokens: Tokens, rows: Rows) -> Plan:
    """The plan of these groups, as a mean by size."""
    return plan_by_hand(tokens, rows, tokens.sizes)


def parity_rows(tokens: Tokens) -> Rows:
    """Groups of ToMe's matching (card 1.2)."""
    rows = []
    for b, real in enumerate(real_tokens(tokens)):
        similarity = alike_keys(tokens, b)
        even, odd = halves(tokens, real)
        goal, stay = best_pairs(even, odd, lambda i, j, s=similarity: s[i][j], tokens.rule.removed(len(real)))
        stay = sorted(stay) if tokens.prefix else stay
        rows.append(joined(real[: tokens.prefix] + stay + odd, goal))
    return rows


@dataclass(frozen=True)
class SlowToFu(ToFu):
    """Card 4."""

    def plan(self, tokens: Tokens) -> Plan:
        rows = parity_rows(tokens)
        if tokens.layer < (tokens.layers // 2 if self.switch is None else self.switch):
            alone = [[group[:1] for group in groups] for groups in rows]
            return plan_by_hand(tokens, alone, counts_sizes=False, drops=True)
        return plan_by_hand(tokens, rows, tokens.sizes, max_norm=True)


@dataclass(frozen=True)
class SlowMatching(ToMe):
    """Card 1.10, with the prefix protected and a last group of fewer than k."""

    def plan(self, tokens: Tokens) -> Plan:
        rows = []
        for b, real in enumerate(real_tokens(tokens)):
            similarity, free = alike_keys(tokens, b), real[tokens.prefix :]
            if self.k is not None:
                groups = [free[i : i + self.k] for i in range(0, len(free), self.k)]
                sources, takers = [i for group in groups for i in group[:-1]], [group[-1] for group in groups]
            else:
                drawn = hash_scores(tokens.positions[b], self.seed, tokens.layer).tolist()
                sources = sorted(free, key=lambda i, d=drawn: d[i])[: tokens.rule.removed(len(real))]
                takers = [i for i in free if i not in sources]
            goal, _ = best_pairs(sources, takers, lambda i, j, s=similarity: s[i][j], len(sources))
            rows.append(joined([i for i in real if i not in goal], goal))
        return merged_by_size(tokens, rows)


@dataclass(frozen=True)
class SlowDiffRate(DiffRate):
    """Card 10.4; `dropped` and `gone` are how many tokens are dropped, and leave, of n at a layer."""

    dropped: Callable[[int, int], int] = lambda n, layer: 0
    gone: Callable[[int, int], int] = lambda n, layer: 0

    def plan(self, tokens: Tokens) -> Plan:
        rows, sizes = [], torch.zeros(tokens.hidden.shape[0], int(tokens.out))
        before = torch.ones(tokens.hidden.shape[:2]) if tokens.sizes is None else tokens.sizes
        scores = tokens.attention.cls_row().mean(1)
        for b, real in enumerate(real_tokens(tokens)):
            similarity, row = cosines(tokens.hidden[b]), scores[b].tolist()
            free = sorted(real[tokens.prefix :], key=lambda i, row=row: (-row[i], i))
            last = len(free) - self.dropped(len(real), tokens.layer)
            first = len(free) - self.gone(len(real), tokens.layer)
            kept = free[:first]
            goal = {i: max(kept, key=lambda j, i=i, s=similarity: s[i][j]) for i in sorted(free[first:last])}
            rows.append(joined(real[: tokens.prefix] + kept, goal))
            for j, group in enumerate(rows[-1]):
                sizes[b, j] = before[b, group[0]]
                sizes[b, j] += sum(before[b, i] * max(similarity[i][group[0]], 0) for i in group[1:])
        return plan_by_hand(tokens, rows, torch.ones_like(before), sizes=sizes, drops=True)


@dataclass(frozen=True)
class SlowMCTF(MCTF):
    """Card 10.4."""

    def plan(self, tokens: Tokens) -> Plan:
        rows, received = [], tokens.attention.received().double().mean(1)
        sizes = torch.ones_like(received) if tokens.sizes is None else tokens.sizes.double()
        for b, real in enumerate(real_tokens(tokens)):
            similarity = cosines(tokens.hidden[b])
            info = (1 / received[b]) / (1 / received[b, real]).max()
            size = (1 / sizes[b]) / (1 / sizes[b, real]).max()

            def worth(i, j, similarity=similarity, info=info, size=size):
                value = ((similarity[i][j] + 1) / 2) ** (1 / self.t_sim) if self.t_sim else 1.0
                value *= float(info[i] * info[j]) ** (1 / self.t_info) if self.t_info else 1.0
                return value * (float(size[i] * size[j]) ** (1 / self.t_size) if self.t_size else 1.0)

            even, odd = halves(tokens, real)
            removed = tokens.rule.removed(len(real))
            first = removed // 2 if self.bidirectional else removed
            goal, stay = best_pairs(even, odd, worth, first)
            stay = sorted(stay) if tokens.prefix else stay
            back: dict[int, int] = {}
            if self.bidirectional:
                back, odd = best_pairs(odd, stay, worth, removed - first)
            goal = back | {i: back.get(j, j) for i, j in goal.items()}
            rows.append(joined(real[: tokens.prefix] + stay + odd, goal))
        return plan_by_hand(tokens, rows, (received * sizes).float())
