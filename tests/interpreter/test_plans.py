"""The kernels that make plans: against the slow definition, in several launches, and with a GPU's block sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from selection_oracle import energy_row, match_row, select_row

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.counts import ALL, HALF, CountRule, at_most, keep_at_least
from tamis.kernels.triton import selection, twin_of
from tamis.kernels.triton.architecture import Architecture, Config
from tamis.kernels.triton.launch import run
from tamis.op import OPS

MAKERS = ["bipartite_match", "match_keys", "select_tokens"]
UNIT = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [2, 0, 0, 0], [0, 0, 4, 0]])  # exact in any order of summation


def call(name: str, *args: Any) -> Any:
    twin = twin_of(OPS[name])
    assert twin is not None
    assert not twin.why_not(*args)
    return run(twin, *args)


def padding(tokens: int, generator: torch.Generator) -> torch.Tensor | None:
    """Rows without a real token, with all of them, and with some anywhere; or no padding at all."""
    valid = torch.rand(3, tokens, generator=generator) < torch.tensor([[0.0], [1.0], [0.6]])
    return valid if torch.rand((), generator=generator) < 0.7 else None


def assert_rows(got: tuple[torch.Tensor, ...], rows: list[Any]) -> None:
    for mine, theirs in zip(got, zip(*rows, strict=True), strict=True):
        assert torch.equal(mine, torch.tensor(theirs, dtype=torch.int64).reshape(len(theirs), -1))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_match_equals_the_definition(prefix):
    generator = torch.Generator().manual_seed(prefix)
    for case in range(10):
        tokens = int(torch.randint(max(prefix, 1), 48, (1,), generator=generator))
        rule = CountRule(prefix, ((at_most(case), keep_at_least(0.7))[case % 2], HALF))
        metric = torch.randn(3, tokens, 8, generator=generator)
        if case % 3 == 0:  # ties
            metric = UNIT[torch.randint(0, 4, (3, tokens), generator=generator)]
        valid = padding(tokens, generator)
        real = torch.ones(3, tokens, dtype=torch.bool) if valid is None else valid
        unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
        similarity = (unit @ unit.transpose(1, 2)).tolist()
        rows = [match_row(similarity[i], real[i].tolist(), rule.out(tokens), rule) for i in range(3)]
        assert_rows(call("bipartite_match", metric, valid, rule.out(tokens), prefix, rule.flat()), rows)


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_energy_equals_the_definition(paper, halves):
    generator = torch.Generator().manual_seed(5)
    for case in range(8):
        prefix = case % 4
        tokens = int(torch.randint(max(prefix, 1), 48, (1,), generator=generator))
        rule = CountRule(prefix, ((at_most(case), keep_at_least(0.7))[case % 2], HALF))
        metric = torch.randn(3, tokens, 8, generator=generator)
        valid = padding(tokens, generator)
        real = torch.ones(3, tokens, dtype=torch.bool) if valid is None else valid
        unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
        similarity = (unit @ unit.transpose(1, 2)).tolist()
        out, rest = rule.out(tokens), (0.2, 0.8, paper, halves)
        rows = [energy_row(similarity[i], real[i].tolist(), out, rule, *rest) for i in range(3)]
        assert_rows(call("energy_match", metric, valid, out, prefix, rule.flat(), *rest), rows)


@pytest.mark.parametrize("order", ["original", "score"])
@pytest.mark.parametrize("fuse", [False, True])
def test_select_equals_the_definition(order, fuse):
    generator = torch.Generator().manual_seed(7)
    for case in range(10):
        prefix = case % 4
        tokens = int(torch.randint(max(prefix, 1), 48, (1,), generator=generator))
        rule = CountRule(prefix, ((at_most(case), keep_at_least(0.7))[case % 2], ALL), added=int(fuse))
        scores = torch.randint(-3, (4, 2**62)[case % 2], (3, tokens), generator=generator)
        scores = scores.double() if case % 4 < 2 else scores
        valid = padding(tokens, generator)
        real = torch.ones(3, tokens, dtype=torch.bool) if valid is None else valid
        out = rule.out(tokens)
        rows = [select_row(scores[i].tolist(), real[i].tolist(), out, rule, order, fuse) for i in range(3)]
        assert_rows(call("select_tokens", scores, valid, out, prefix, rule.flat(), order, fuse), rows)


@pytest.mark.parametrize("order", ["original", "score"])
@pytest.mark.parametrize("fuse", [False, True])
def test_select_removes_no_more_than_a_row_has_and_writes_nowhere_else(order, fuse, monkeypatch):
    """By a rule without a term that says so: rows of fewer unprotected tokens than it removes lose all of them."""
    guarded, twin = [], twin_of(OPS["select_tokens"])

    def within(self: torch.Tensor, size: tuple[int, ...], **options: Any) -> torch.Tensor:
        """Between 16 entries of 77 on either side."""
        count = math.prod(size)
        guarded.append(torch.full((count + 32,), 77, dtype=options["dtype"]))
        return guarded[-1][16 : 16 + count].view(size)

    def work(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", within)
            return twin.work(*args)

    real = torch.tensor([[False] * 5, [True] + [False] * 4, [False, True, True, False, False], [True] * 5])
    scores = torch.tensor([3.0, 1, 4, 1, 5]).expand(4, 5)
    rule = CountRule(1, (at_most(2),), added=int(fuse))
    got = run(dataclasses.replace(twin, work=work), scores, real, rule.out(5), 1, rule.flat(), order, fuse)
    bounded = CountRule(1, (at_most(2), ALL), added=int(fuse))
    rows = [select_row(scores[i].tolist(), real[i].tolist(), rule.out(5), bounded, order, fuse) for i in range(4)]
    assert_rows(got, rows)
    assert len(guarded) >= 3
    for one in guarded:
        assert (one[:16] == 77).all()
        assert (one[-16:] == 77).all()


@pytest.mark.parametrize("name", MAKERS)
def test_several_launches_give_the_same_plan(name, monkeypatch):
    op, twin = OPS[name], twin_of(OPS[name])
    cases = [args for args in op.samples() if args[1] is None and args[0].numel() and args[0].shape[-1] > 2]
    assert len(cases) > 2
    for args in cases:
        monkeypatch.setattr(selection, "SPLIT_ABOVE", 2)
        split = args[0].shape[-2 if name != "select_tokens" else -1] > 2
        assert (len(twin.work(Architecture("interpreter"), *args)[0]) > 1) == split
        got = run(twin, *args)
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(got, op.reference(*args), strict=True))


@pytest.mark.parametrize("table", ["default", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies bfloat16 as its bits
def test_the_block_sizes_of_a_gpu(table, dtype, monkeypatch):
    """A ViT's keys, of which the tokens of a few objects are nearly alike."""
    monkeypatch.setattr(Architecture, "of", lambda device: Architecture.named(table))
    generator = torch.Generator().manual_seed(3)
    objects = torch.randn(9, 3, 64, generator=generator)[torch.randint(0, 9, (2, 197), generator=generator)]
    keys = (objects + 0.3 * torch.randn(objects.shape, generator=generator)).to(dtype).transpose(1, 2)
    rule = CountRule(1, (at_most(40), HALF))
    for valid in (None, torch.rand(2, 197, generator=generator) < 0.9):
        args = valid, rule.out(197), 1, rule.flat()
        exact = OPS["match_keys"].reference(keys.double(), *args)
        assert all(torch.equal(a, b) for a, b in zip(call("match_keys", keys, *args), exact, strict=True))
        metric = keys.mean(1)
        exact = OPS["bipartite_match"].reference(metric.double(), *args)
        assert all(torch.equal(a, b) for a, b in zip(call("bipartite_match", metric, *args), exact, strict=True))
        args = *args, 0.5, 1.0, False, False
        exact = OPS["energy_match"].reference(metric.double(), *args)
        assert all(torch.equal(a, b) for a, b in zip(call("energy_match", metric, *args), exact, strict=True))


def test_equal_tokens_all_choose_the_first_of_b():
    metric = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).expand(2, 50, 64)
    slot, leader, moved = call("bipartite_match", metric, None, 47, 1, CountRule(1, (at_most(3), HALF)).flat())
    assert moved.tolist() == [[2, 4, 6]] * 2
    assert slot.gather(1, moved).tolist() == [slot[0, 1:2].tolist() * 3] * 2
    assert leader.gather(1, slot[:, 1:2]).tolist() == [[1], [1]]


def test_a_rule_that_kernels_cannot_say_is_refused_with_the_reason():
    terms = (keep_at_least(0.5), keep_at_least(0.6), HALF)
    metric, rule = torch.zeros(1, 8, 4), CountRule(1, terms).flat()
    twin = twin_of(OPS["bipartite_match"])
    assert twin.why_not(metric, None, 5, 1, rule) == "a count rule with 3 terms that grow with the tokens"
    assert twin.why_not(metric.double(), None, 5, 1, rule[:4]) == "a metric in torch.float64"


@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_tiles_are_picked_across_the_pieces_of_a_row(mass, monkeypatch):
    """Equal scores on both sides of a piece's border, fewer and more than are read."""
    small = Architecture.named("interpreter").having("pick_tiles_kernel", "*", Config({"TILE": 4}, 4, 1))
    monkeypatch.setattr(Architecture, "of", lambda device: small)
    scores = torch.randint(0, 4, (1, 1, 6, 11), generator=torch.Generator().manual_seed(2)).float() / 4
    args = scores, torch.tensor([42]), 4, False, True, True, [1, 2, 3], mass
    assert torch.equal(call("pick_tiles", *args), OPS["pick_tiles"].reference(*args))
