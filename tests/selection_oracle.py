"""Plans by the definition, one token at a time, in Python: slow, and written without a look at the ops."""

from __future__ import annotations

import math
from fractions import Fraction

from tamis.counts import CountRule

Row = tuple[list[int], list[int], list[int]]


def match_row(similarity: list[list[float]], valid: list[bool], out: int, rule: CountRule) -> Row:
    """slot, leader and moved of one row; similarity[i][j] of tokens i and j."""
    real = [i for i, is_real in enumerate(valid) if is_real]
    protected, free = real[: rule.prefix], [(rank, i) for rank, i in enumerate(real) if rank >= rule.prefix]
    a, b = ([i for rank, i in free if rank % 2 == parity] for parity in (0, 1))
    partner = {i: max(b, key=lambda j, i=i: (similarity[i][j], -j)) for i in a if b}
    by_score = sorted(partner, key=lambda i: (-similarity[i][partner[i]], i))
    removed = rule.removed(len(real))
    merging, staying = by_score[:removed], by_score[removed:]
    if not b:
        staying = list(a)
    if rule.prefix:
        staying = sorted(staying)
    leader = protected + staying + b
    slot = [-1] * len(valid)
    for place, i in enumerate(leader):
        slot[i] = place
    for i in merging:
        slot[i] = slot[partner[i]]
    return _padded(slot, leader, sorted(merging), out, len(valid) - out)


def energy_row(
    similarity: list[list[float]],
    valid: list[bool],
    out: int,
    rule: CountRule,
    margin: float,
    alpha: float,
    paper: bool,
    halves: bool,
) -> Row:
    """slot, leader and moved of one row."""
    real = [i for i, is_real in enumerate(valid) if is_real]
    protected, free = real[: rule.prefix], real[rule.prefix :]

    def part(s: float) -> float:
        if paper:
            return s if s >= margin else alpha * (math.exp(s - margin) - 1)
        return s - margin if s > margin else alpha * (math.exp(s - margin) - 1)

    energy = {i: math.fsum(part(similarity[i][j] if j != i else 1.0) for j in free) / len(free) for i in free}
    order = sorted(free, key=lambda i: (-energy[i], i))
    removed = rule.removed(len(real))
    pool = order if halves else order[: 2 * removed]
    a, b = pool[0::2], pool[1::2]
    partner = {i: max(b, key=lambda j, i=i: (similarity[i][j], -order.index(j))) for i in a if b}
    merging, staying = a, order[2 * removed :]
    if halves:
        ranked = sorted(a, key=lambda i: (-similarity[i][partner[i]] if b else 0, order.index(i)))
        merging, staying = ranked[:removed], ranked[removed:]
    leader = protected + staying + b
    slot = [-1] * len(valid)
    for place, i in enumerate(leader):
        slot[i] = place
    for i in merging:
        slot[i] = slot[partner[i]]
    return _padded(slot, leader, sorted(merging), out, len(valid) - out)


def select_row(scores: list[float], valid: list[bool], out: int, rule: CountRule, order: str, fuse: bool) -> Row:
    """slot, leader and moved of one row."""
    real = [i for i, is_real in enumerate(valid) if is_real]
    protected, free = real[: rule.prefix], real[rule.prefix :]
    ranked = sorted(free, key=lambda i: (-scores[i], i))
    keep = len(free) - rule.removed(len(real))
    kept, dropped = ranked[:keep], ranked[keep:]
    if order == "original":
        kept = sorted(kept)
    leader = protected + kept
    slot = [-1] * len(valid)
    for place, i in enumerate(leader):
        slot[i] = place
    if not fuse:
        return _padded(slot, leader, [], out, 0)
    for i in dropped:
        slot[i] = len(leader)
    return _padded(slot, leader + dropped[:1], sorted(dropped[1:]), out, len(valid) - out)


def sample_row(weights: list[float], valid: list[bool], out: int, rule: CountRule, points: int) -> list[list]:
    """slot, leader and valid of one row, each point compared with every token (methods card 6.2)."""
    real = [i for i, is_real in enumerate(valid) if is_real]
    protected, free = real[: rule.prefix], real[rule.prefix :]
    room = len(free) - rule.removed(len(real))
    exact = {i: Fraction(weights[i]) if 0 < weights[i] < float("inf") else Fraction(0) for i in free}
    exact = exact if any(exact.values()) else dict.fromkeys(free, Fraction(1))
    order = sorted(free, key=lambda i: (exact[i], i))
    picks = set(_picks([exact[i] for i in order], points or room))
    kept = [i for place, i in enumerate(order) if place in picks]
    leader = protected + kept[max(len(kept) - room, 0) :]
    slot = [leader.index(i) if i in leader else -1 for i in range(len(valid))]
    return [slot, leader + [0] * (out - len(leader)), [j < len(leader) for j in range(out)]]


def _picks(rising: list[Fraction], points: int) -> list[int]:
    """Places that the sample points fall nearest to; weights rise."""
    if len(rising) < 2:
        return list(range(len(rising)))
    running = [sum(rising[: j + 1]) for j in range(len(rising))]
    share = [(c - running[0]) / (running[-1] - running[0]) for c in running]
    first = min(f for f in share if f > 0)
    at = [first + (1 - first) * Fraction(k, points - 1) for k in range(points)] if points > 1 else [Fraction(1)]
    return [min(range(len(share)), key=lambda j, y=y: (abs(y - share[j]), j)) for y in at]


def _padded(slot: list[int], leader: list[int], moved: list[int], out: int, extra: int) -> Row:
    leader = leader + [0] * (out - len(leader))
    return slot, leader, moved + leader[:1] * (extra - len(moved))
