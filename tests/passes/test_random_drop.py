"""Random controls: which tokens a draw keeps, how often, and what they count for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from by_hand import plan_by_hand, real_tokens, tokens_by_hand
from oracle import check_plan, reduced_forward
from rewriting import applied, assert_equal_outputs, captured, rewritten, run
from zoo import FAMILIES

from tamis.errors import BadParameter, NothingChanged
from tamis.kernels.hash_scores import hash_scores
from tamis.passes import RandomDrop
from tamis.rewrite import Pipeline
from tamis.tokens import Plan, Tokens


@dataclass(frozen=True)
class ByHand(RandomDrop):
    """Cells emptied round by round, distances measured token by token."""

    def plan(self, tokens: Tokens) -> Plan:
        rows, sizes = [], torch.zeros(tokens.hidden.shape[0], tokens.out)
        for b, real in enumerate(real_tokens(tokens)):
            free = real[tokens.prefix :]
            keep = len(free) - tokens.rule.removed(len(real))
            kept = sorted(self.wanted(tokens, b, free)[:keep])
            rows.append([[i] for i in real[: tokens.prefix] + kept])
            before = torch.ones(tokens.hidden.shape[1]) if tokens.sizes is None else tokens.sizes[b]
            for slot, (i,) in enumerate(rows[-1]):
                sizes[b, slot] = before[i] * (len(free) / keep if slot >= tokens.prefix else 1)
        fields = {"sizes": sizes} if self.prop_attn else {}
        return plan_by_hand(tokens, rows, counts_sizes=False, drops=True, **fields)

    def wanted(self, tokens: Tokens, b: int, free: list[int]) -> list[int]:
        """Unprotected tokens, the one to keep first in front."""
        row = None if self.batch_shared else torch.tensor(b)
        drawn = hash_scores(tokens.positions[b], self.seed, tokens.layer, row).tolist()
        if self.draw == "token":
            return sorted(free, key=lambda i: -drawn[i])
        place = {i: divmod(int(tokens.places[b, i]), tokens.lattice[1]) for i in free}
        if self.draw == "radial":
            middle = [(side - 1) / 2 for side in tokens.lattice]
            return sorted(free, key=lambda i: ((place[i][0] - middle[0]) ** 2 + (place[i][1] - middle[1]) ** 2, i))
        cells: dict[tuple[int, int], list[int]] = {}
        for i in sorted(free, key=lambda i: -drawn[i]):
            cells.setdefault((place[i][0] // self.sy, place[i][1] // self.sx), []).append(i)
        rounds = range(max(map(len, cells.values())))
        return [
            i
            for turn in rounds
            for i in sorted((c[turn] for c in cells.values() if turn < len(c)), key=lambda i: -drawn[i])
        ]


def kept(method: RandomDrop, grid: tuple[int, int], batch: int = 1) -> list[list[int]]:
    """Places in the grid that stay of a whole one behind a class token."""
    x = torch.zeros(batch, 1 + grid[0] * grid[1], 2)
    tokens = tokens_by_hand(method, x, grid=grid, lattice=grid)
    plan = method.plan(tokens)
    check_plan(plan, tokens)
    return [[i - 1 for i in row[1:]] for row in plan.leader.tolist()]


def test_a_quarter_of_a_stratified_draw_is_one_of_every_cell():
    for seed in range(5):
        (places,) = kept(RandomDrop(keep_ratio=0.25, draw="stratified", seed=seed), (6, 8))
        cells = [(place // 8 // 2, place % 8 // 2) for place in places]
        assert sorted(cells) == [(y, x) for y in range(3) for x in range(4)]


def test_cells_of_other_shapes_and_what_is_left_at_the_edges():
    (places,) = kept(RandomDrop(r=35 - 6, draw="stratified", sx=3, sy=4), (5, 7))
    assert sorted((place // 7 // 4, place % 7 // 3) for place in places) == [(y, x) for y in range(2) for x in range(3)]
    (more,) = kept(RandomDrop(r=35 - 10, draw="stratified", sx=3, sy=4), (5, 7))
    assert set(places) < set(more)
    counts = {cell: 0 for cell in [(y, x) for y in range(2) for x in range(3)]}
    for place in more:
        counts[place // 7 // 4, place % 7 // 3] += 1
    assert sorted(counts.values()) == [1, 1, 2, 2, 2, 2]  # one cell has a single token, another has none to spare


def test_every_place_of_a_cell_is_drawn_equally_often():
    times = torch.zeros(16)
    for seed in range(800):
        times[kept(RandomDrop(keep_ratio=0.25, draw="stratified", seed=seed), (4, 4))[0]] += 1
    assert ((times / 800 - 0.25).abs() < 0.07).all()


def test_the_radial_pattern_keeps_the_middle():
    assert kept(RandomDrop(r=12, draw="radial"), (4, 4), batch=2) == [[5, 6, 9, 10]] * 2
    assert kept(RandomDrop(r=14, draw="radial"), (3, 5)) == [[7]]
    assert kept(RandomDrop(r=13, draw="radial"), (3, 5)) == [[2, 7]]  # 2, 6, 8 and 12 are as near: the first


def test_rows_share_a_draw_unless_told_otherwise():
    method = RandomDrop(keep_ratio=0.5)
    assert len({tuple(row) for row in kept(method, (4, 4), batch=6)}) == 1
    apart = RandomDrop(keep_ratio=0.5, batch_shared=False)
    assert len({tuple(row) for row in kept(apart, (4, 4), batch=6)}) > 4
    times = torch.zeros(16)
    for row in kept(apart, (4, 4), batch=2000):
        times[row] += 1
    assert ((times / 2000 - 0.5).abs() < 0.06).all()


def test_kept_tokens_count_for_the_dropped():
    method = RandomDrop(keep_ratio=0.25, prop_attn=True)
    plan = method.plan(tokens_by_hand(method, torch.zeros(2, 18, 3), prefix=2))
    assert plan.sizes.tolist() == [[1, 1, 4, 4, 4, 4]] * 2
    before = torch.arange(1.0, 19).expand(2, 18)
    plan = method.plan(tokens_by_hand(method, torch.zeros(2, 18, 3), prefix=2, sizes=before))
    assert torch.equal(plan.sizes[:, 2:], 4 * before.gather(1, plan.leader[:, 2:]))


MODELS = [
    ("deit_distilled", {"draw": "stratified"}),
    ("deit_distilled", {"draw": "stratified", "sx": 3, "sy": 1, "batch_shared": False, "prop_attn": True}),
    ("dinov2_reg4", {"draw": "radial", "prop_attn": True}),
    ("vit_mean", {"draw": "stratified", "prop_attn": True}),
    ("bert", {"prop_attn": True, "batch_shared": False}),
]


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_a_rewritten_model_equals_the_draw_by_hand(name, options):
    family, parameters = FAMILIES[name], {"keep_ratio": 0.6, "layers": [0, 1], **options}
    result = Pipeline((RandomDrop(**parameters),)).run(captured(name))
    inputs = family.inputs(3, dtype=torch.float64, seed=4)
    answer = reduced_forward(family, family.shared(torch.float64), inputs, [ByHand(**parameters)])
    assert len(answer.stream.counts) == len(applied(result)) == 2
    assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)


def test_a_draw_goes_by_the_grid_that_a_pool_left():
    family, inputs = FAMILIES["vit_mean"], FAMILIES["vit_mean"].inputs(3, dtype=torch.float64)
    pool, passes = "pool:window=3,layers=[0]", "pool:window=3,layers=[0] + random:r=2,layers=[1],draw=radial"
    by_hand = [*Pipeline.parse(pool).passes, ByHand(r=2, layers=[1], draw="radial")]
    answer = reduced_forward(family, family.shared(torch.float64), inputs, by_hand)
    assert answer.stream.counts == [(0, 37, 5), (1, 5, 3)]
    assert_equal_outputs(run(rewritten("vit_mean", passes), inputs), answer.outputs, 1e-5)


@pytest.mark.parametrize("draw", ["stratified", "radial"])
def test_without_a_grid_only_single_tokens_are_drawn(draw):
    with pytest.raises(NothingChanged, match=f"its {draw} draw goes by the grid of patch tokens"):
        rewritten("bert", f"random:r=1,draw={draw}")


def test_parameters():
    with pytest.raises(BadParameter, match="draw must be one of token, stratified, radial, got patch"):
        RandomDrop(r=1, draw="patch")
    with pytest.raises(BadParameter, match="sx must be 1 or more, got 0"):
        RandomDrop(r=1, sx=0)
