"""Zero-TPrune: the card's example stage by stage, and whole models against the stages written out in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from by_hand import plan_by_hand, real_tokens, tokens_by_hand
from oracle import check_plan, reduced_forward
from rewriting import applied, assert_equal_outputs, captured, rewritten, run
from torch import Tensor
from zoo import FAMILIES

import tamis
from tamis.errors import BadParameter, NothingChanged
from tamis.kernels.hash_scores import hash_scores
from tamis.kernels.page_rank import reference as page_rank
from tamis.passes import ZeroTPrune
from tamis.rewrite import Pipeline
from tamis.tokens import Plan, Tokens

ROWS = [
    (0.2, 0.4, 0.1, 0.1, 0.1, 0.1),
    (0.1, 0.5, 0.3, 0.05, 0.03, 0.02),
    (0.1, 0.45, 0.35, 0.05, 0.03, 0.02),
    (0.1, 0.2, 0.1, 0.4, 0.1, 0.1),
    (0.05, 0.05, 0.05, 0.05, 0.4, 0.4),
    (0.05, 0.05, 0.05, 0.05, 0.4, 0.4),
]
ONE = torch.tensor(ROWS, dtype=torch.float64)[None, None]
TWO = torch.cat([ONE, torch.full_like(ONE, 1 / 6)], 1)
UNIFORM = torch.full((1, 6), 1 / 6, dtype=torch.float64)


def close(got: Tensor, expected: list[float], places: int = 5) -> None:
    torch.testing.assert_close(
        got.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.6 * 10**-places
    )


def test_the_cards_page_ranks():
    close(page_rank(ONE, UNIFORM, None, 1)[0, 0], [0.1, 0.275, 0.15833, 0.11667, 0.17667, 0.17333])
    close(page_rank(ONE, UNIFORM, None, 30)[0, 0], [0.09406, 0.31735, 0.1975, 0.08416, 0.15604, 0.1509])
    boosted = UNIFORM.clone()
    boosted[0, 0] *= 6**0.5
    ratio = page_rank(ONE, boosted, None, 30) / page_rank(ONE, UNIFORM, None, 30)
    close(ratio[0, 0], [1.24158] * 6, 4)  # a scale, which ranks nothing; the second eigenvalue's part is .737^30


def joined(matrix: Tensor, steps: int, **options: float) -> Tensor:
    method = ZeroTPrune(r=1, similar=0, **options)
    tokens = tokens_by_hand(method, torch.zeros(1, 6, 2), attention=matrix)
    return method._importance(tokens, matrix, None, steps)


def test_the_cards_heads():
    """Scaled to mean 1, so six times the card's; its variances are .21658 and 0."""
    both = torch.tensor([0.13532, 0.25346, 0.18273, 0.13202, 0.16144, 0.15898]) * 6
    first = torch.tensor([0.09406, 0.31735, 0.1975, 0.08416, 0.15604, 0.1509]) * 6
    close(joined(TWO, 30, vmin=0.0)[0], both.tolist(), 4)
    for kept_first in ({}, {"vmin": 0.2165, "vmax": 0.2166}):
        close(joined(TWO, 30, **kept_first)[0], first.tolist(), 4)
    close(joined(TWO, 30, vmin=0.3)[0], both.tolist(), 4)  # no head counts, so all do
    close(joined(TWO, 30, vmin=0.0, vmax=0.2)[0], [1.0] * 6, 4)
    assert torch.equal(joined(torch.cat([ONE, ONE], 1), 5), joined(ONE, 5))


def test_the_cards_s_stage():
    """Order 1, 4, 5, 2, 3; tokens 5, 2 and 3 may leave, and 2 is most like one of 1 and 4."""
    keys = torch.tensor([(1.0, 0), (1, 0), (1, 0.1), (0, 1), (-1, 0.1), (-1, 0)])[None, None]
    method = ZeroTPrune(r=2, similar=1)
    tokens = tokens_by_hand(method, torch.zeros(1, 6, 2), attention=ONE.float(), keys=keys)
    importance = method._importance(tokens, None, None, 1)
    assert importance[0, 1:].argsort(descending=True).add(1).tolist() == [1, 4, 5, 2, 3]
    assert method._alike(tokens, importance)[0].nonzero().flatten().tolist() == [2]


def test_rows_of_the_subgraph_add_up_to_1_again():
    """Without token 2 the card ranks 1, 4, 5, 3; left as they are, rows would rank 4, 5, 1, 3."""
    kept = torch.tensor([[True, True, False, True, True, True]])
    scores = page_rank(ONE, UNIFORM, kept, 30)[0, 0]
    assert scores[2] == 0
    assert scores[1:].argsort(descending=True).add(1)[:4].tolist() == [1, 4, 5, 3]
    torch.testing.assert_close(scores.sum(), torch.tensor(5 / 6, dtype=torch.float64))
    raw, matrix = kept.double() / 5, ONE[0, 0] * kept * kept.T
    for _ in range(30):
        raw = raw @ matrix
    assert raw[0, 1:].argsort(descending=True).add(1)[:4].tolist() == [4, 5, 1, 3]
    close(raw.sum(), 0.0235, 4)


def test_one_step_is_the_attention_received():
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(2, 3, 9, 9, generator=generator).softmax(-1)
    for options in ({"init": "uniform"}, {"init": "cls"}):
        method = ZeroTPrune(r=3, similar=2, iterations=1, **options)
        keys = torch.randn(2, 3, 9, 4, generator=generator)
        tokens = tokens_by_hand(method, torch.zeros(2, 9, 4), attention=attention, keys=keys)
        for kept in (None, torch.rand(2, 9, generator=generator) < 0.8):
            by_rows = method._importance(tokens, attention, kept, 1)
            torch.testing.assert_close(method._importance(tokens, None, kept, 1), by_rows, rtol=1e-5, atol=1e-6)


def test_equal_attention_keeps_the_first():
    method = ZeroTPrune(r=3, similar=0, iterations=7)
    tokens = tokens_by_hand(method, torch.zeros(2, 9, 4), attention=torch.full((2, 2, 9, 9), 1 / 9))
    plan = method.plan(tokens)
    check_plan(plan, tokens)
    assert plan.leader.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@dataclass(frozen=True)
class ByHand(ZeroTPrune):
    """The card's stages for one row at a time, over its real tokens alone."""

    def plan(self, tokens: Tokens) -> Plan:
        matrix, keys, rows = tokens.attention.matrix(), tokens.keys_before_rope.float().mean(1), []
        for b, real in enumerate(real_tokens(tokens)):
            steps = self.steps(tokens.layer, tokens.layers)
            free, removed = list(range(tokens.prefix, len(real))), tokens.rule.removed(len(real))
            graph, kept = matrix[b][:, real][:, :, real], list(range(len(real)))
            if self.similar:
                first = self.rank(graph, kept, 1)
                order = sorted(free, key=lambda i, first=first: (-first[i], i))
                drawn = hash_scores(tokens.positions[b, real], self.seed, tokens.layer).tolist()
                leaving = removed * 4 // 10 if self.similar == 0.4 else min(self.similar, removed)
                gone = self.alike(order, keys[b, real], drawn)[:leaving]
                kept = [i for i in kept if i not in gone]
            last = self.rank(graph, kept, steps)
            stay = sorted((i for i in kept if i in free), key=lambda i, last=last: (-last[i], i))[: len(free) - removed]
            rows.append([[real[i]] for i in [*range(tokens.prefix), *sorted(stay)]])
        return plan_by_hand(tokens, rows, counts_sizes=False, drops=True)

    def rank(self, graph: Tensor, kept: list[int], steps: int) -> dict[int, float]:
        heads = []
        for head in graph:
            part = head[kept][:, kept].double()
            part = part / part.sum(1, keepdim=True)
            s = torch.full((len(kept),), 1 / len(kept), dtype=torch.float64)
            if self.init == "cls":
                s[0] = len(kept) ** -0.5
            for _ in range(steps):
                s = part.T @ s
            heads.append(s / s.mean())
        inside = [s for s in heads if self.vmin <= float(s.var(correction=0)) <= self.vmax] or heads
        squares = torch.stack(inside).square().mean(0)
        return dict(zip(kept, squares.sqrt().tolist(), strict=True))

    def alike(self, order: list[int], keys: Tensor, drawn: list[int]) -> list[int]:
        """Candidates for leaving, the most alike first."""
        half, unit = len(order) // 2, keys / keys.norm(dim=1, keepdim=True)
        at_random = sorted(order, key=lambda i: -drawn[i])
        offers, takes = {
            "sequential_u": (order[half:], order[:half]),
            "sequential_i": (order[: len(order) - half], order[len(order) - half :]),
            "alternate": (order[::-1][::2], order[::-1][1::2]),
            "random": (at_random[half:], at_random[:half]),
            "none": (order[1:], order),
        }[self.grouping]
        best = {}
        for i in offers:
            others = order[: order.index(i)] if self.grouping == "none" else takes
            best[i] = max((float(unit[i] @ unit[j]) for j in others), default=-2.0)
        return sorted(offers, key=lambda i: (-best[i], i))


MODELS = [
    ("vit_mean", {"keep_ratio": 0.6}),
    ("vit_mean", {"r": 9, "grouping": "none", "similar": 5, "iterations": 3, "vmin": 0.2, "vmax": 0.5}),
    ("deit_distilled", {"keep_ratio": 0.6, "init": "cls", "iterations": 2}),
    ("deit_distilled", {"keep_ratio": 0.7, "grouping": "sequential_i", "similar": 100}),
    ("deit_distilled", {"r": 6, "similar": 0, "iterations": {0: 4}}),
    ("dinov2_reg4", {"keep_ratio": 0.6, "grouping": "alternate", "vmax": 2.0}),
    ("beit", {"keep_ratio": 0.6, "iterations": [4, 1]}),
    ("bert", {"keep_ratio": 0.6, "init": "cls", "iterations": 1}),
    ("bert", {"r": 4, "grouping": "random", "seed": 3, "similar": 2, "iterations": 6}),
]


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_a_rewritten_model_equals_the_stages_by_hand(name, options):
    family, parameters = FAMILIES[name], {"layers": [0, 1], **options}
    result = Pipeline((ZeroTPrune(**parameters),)).run(captured(name))
    inputs = family.inputs(3, dtype=torch.float64, seed=3)
    answer = reduced_forward(family, family.shared(torch.float64), inputs, [ByHand(**parameters)])
    assert len(answer.stream.counts) == len(applied(result)) == 2
    assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)


def test_published_layers_and_steps():
    method = ZeroTPrune(keep_ratio=0.8)
    assert method.default_layers(12) == [0, 2, 5, 8, 10]
    assert [method.steps(layer, 12) for layer in method.default_layers(12)] == [30, 5, 5, 1, 1]
    assert method.default_layers(1) == [0]
    assert [ZeroTPrune(r=1, iterations=[9, 4]).steps(layer, 12) for layer in (0, 2, 5)] == [9, 4, 1]
    assert ZeroTPrune(r=1, iterations={5: 8}).steps(5, 12) == 8


def test_the_report_says_what_was_chosen():
    inputs = FAMILIES["vit_mean"].inputs(2)[0]
    fast = tamis.compile(FAMILIES["vit_mean"].shared(), inputs, passes="zero-tprune:keep_ratio=0.7")
    assert (
        "note: zero-tprune:keep_ratio=0.7 at layer 1: S-stage (sequential_u) 0.4 of those that leave, I-stage 5 steps"
        " of page rank by A^T from a uniform start, rows adding up to 1; heads whose variance at mean 1 is 0.01 to 0.7"
        " count, all of them where none is"
    ) in str(fast.report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "mean"}, "init must be one of uniform, cls, got mean"),
        ({"grouping": "halves"}, "grouping must be one of sequential_u, sequential_i, alternate, random, none"),
        ({"similar": -1}, "similar must be a whole number >= 0 or a fraction with a decimal point, got -1"),
        ({"similar": 1.5}, "similar must be a whole number >= 0 or a fraction with a decimal point, got 1.5"),
        ({"iterations": 0}, "iterations must be whole numbers >= 1, got 0"),
        ({"vmin": 0.9}, "vmin must be at least 0 and at most vmax, got 0.9"),
    ],
)
def test_parameters(options, message):
    with pytest.raises(BadParameter, match=message):
        ZeroTPrune(r=1, **options)


def test_a_start_from_the_class_token_asks_for_one():
    with pytest.raises(NothingChanged, match="init=cls starts from the class token, and this model has none"):
        rewritten("siglip", "zero-tprune:r=1,init=cls")
