"""Hash scores: a permutation, spread evenly, different for every seed and layer."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tamis.kernels.hash_scores import PRIME, hash_scores


def ranks(count: int) -> torch.Tensor:
    return torch.arange(count)


def test_scores_are_a_fixed_function_of_rank_seed_and_layer():
    assert hash_scores(ranks(4), 0, 0).tolist() == hash_scores(ranks(9), 0, 0)[:4].tolist()
    assert torch.equal(hash_scores(ranks(4).expand(3, 4), 5, 2)[1], hash_scores(ranks(4), 5, 2))


def test_no_two_tokens_tie():
    scores = hash_scores(ranks(200_000), 3, 1)
    assert scores.unique().numel() == 200_000
    assert scores.min() >= 0
    assert scores.max() < PRIME


def test_products_stay_in_int64():
    """The same in Python's unbounded integers."""

    def exact(x: int, seed: int, layer: int) -> int:
        return int(hash_scores(torch.tensor([x], dtype=torch.int64), seed, layer))

    def slow(x, key):
        for constant in (0, 1134348657, 745910581):
            x = pow(x + key + constant, 5, PRIME)
        return x

    for x, seed, layer in [(0, 0, 0), (PRIME - 1, PRIME - 1, 11), (PRIME - 1, -7, 3), (12345, 2**40, 5)]:
        assert exact(x, seed, layer) == slow(x, slow(slow(seed % PRIME, 1) + layer, 2))


@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
def test_scores_are_uniform(seed):
    scores = hash_scores(ranks(20_000), seed, 0).double() / PRIME
    counts = torch.histc(scores, 50, 0, 1)
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert 20 < chi_square < 95  # 49 degrees of freedom: beyond 1e-4 on either side
    neighbours = torch.corrcoef(torch.stack([scores[:-1], scores[1:]]))[0, 1]
    assert neighbours.abs() < 0.03


def test_seeds_and_layers_are_independent():
    keys = [(seed, layer) for seed in range(6) for layer in range(6)]
    scores = torch.stack([hash_scores(ranks(4096), *key).double() for key in keys])
    correlation = torch.corrcoef(scores) - torch.eye(len(keys), dtype=torch.float64)
    assert correlation.abs().max() < 0.08  # five standard deviations of 1 / sqrt(4096)


def test_each_token_is_kept_equally_often():
    kept = torch.zeros(16)
    for seed in range(2000):
        kept[hash_scores(ranks(16), seed, 4).argsort(descending=True)[:4]] += 1
    assert ((kept / 2000 - 0.25).abs() < 0.05).all()


def test_inductor_takes_them_for_numbers_and_not_for_one_formula():
    """Followed from an arange on, their formula is a line of 23,000 characters that takes a minute to simplify."""
    scores, code = run_and_get_code(torch.compile(lambda: hash_scores(ranks(4), 0, 3), fullgraph=True))
    assert torch.equal(scores, hash_scores(ranks(4), 0, 3))
    assert max(map(len, "".join(code).splitlines())) < 1000
