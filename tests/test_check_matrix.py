"""The check matrix over every registered token reduction: a new method is tested by existing.

Declared cells (`passes/properties.py`) are shown where a method names them and refuted where it does not.  The other
rows hold for all.  Methods decide on plain tensors here; `test_check_matrix_models.py` runs them in a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from check_streams import Made, groups, made, reductions, renamed
from oracle import apply_plan, check_plan, one_hot
from torch import Tensor

from tamis.passes.properties import (
    CONSERVES_MASS,
    EXACT_COUNT,
    KEEPS_SURVIVORS,
    MERGES_DUPLICATES,
    ORDER_FREE,
    PROPERTIES,
    SCALE_FREE,
    SET_FREE,
)
from tamis.passes.reduction import TokenReduction, most_removable
from tamis.registry import origin_of, registered_passes

METHODS = reductions()
BY_AMOUNT = [name for name, cls in METHODS.items() if not cls.own_count]  # on any number of tokens
SEEDS = range(4)
AMOUNT = {"keep_ratio": 0.7}
Holds = Callable[[type[TokenReduction], int], bool]


def shuffled(seed: int, one: Made) -> Tensor:
    """An order of the tokens that leaves the protected ones in front."""
    order = torch.randperm(one.x.shape[1] - one.prefix, generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.arange(one.prefix), one.prefix + order])


def permuted_groups(cls: type[TokenReduction], seed: int) -> Iterator[tuple[list, list]]:
    """For each row its groups, and those of the same tokens in another order."""
    one, method = Made.random(seed), made(cls, **AMOUNT)
    index = shuffled(seed, one)
    for mine, theirs in zip(groups(one.plan(method)), groups(one.taken(index).plan(method)), strict=True):
        yield mine, renamed(theirs, index)


def is_order_free(cls: type[TokenReduction], seed: int) -> bool:
    return all(mine == theirs for mine, theirs in permuted_groups(cls, seed))


def is_set_free(cls: type[TokenReduction], seed: int) -> bool:
    return all(set(mine) == set(theirs) for mine, theirs in permuted_groups(cls, seed))


def has_exact_count(cls: type[TokenReduction], seed: int) -> bool:
    one, method = Made.random(seed), made(cls, **AMOUNT)
    tokens = one.tokens(method)
    counts = one_hot(method.plan(tokens)).any(-1).sum(1)
    return counts.tolist() == [tokens.rule.out(one.x.shape[1])] * len(counts)


def keeps_survivors(cls: type[TokenReduction], seed: int) -> bool:
    one = Made.random(seed)
    state, after = one.reduced(made(cls, **AMOUNT))
    plan = state.plans[0]
    places = [
        (b, s, min(group)) for b, row in enumerate(groups(plan)) for s, group in enumerate(row) if len(group) == 1
    ]
    return all(torch.equal(after[b, s], one.x[b, i]) for b, s, i in places)


def conserves_mass(cls: type[TokenReduction], seed: int) -> bool:
    one = Made.random(seed)
    before = torch.randint(1, 5, one.x.shape[:2], generator=torch.Generator().manual_seed(seed)).float()
    state, after = replace(one, sizes=before).reduced(made(cls, **AMOUNT))
    if not torch.equal(state.sizes.sum(1), before.sum(1)):
        return False
    mass, expected = ((sizes[..., None] * x).sum(1) for sizes, x in ((state.sizes, after), (before, one.x)))
    return torch.allclose(mass, expected, rtol=1e-5, atol=1e-4)


def merges_duplicates(cls: type[TokenReduction], seed: int) -> bool:
    """Attention over the merged tokens, with the log of their sizes, is attention over all, to rounding."""
    one = Made.random(seed)
    places = torch.arange(one.x.shape[1])
    one = one.taken(places - (places - one.prefix).clamp(min=0) % 2)
    state, _ = one.reduced(made(cls, keep_ratio=0.5))
    if not state.size_bias:
        return False
    plan = state.plans[0]
    merged = [apply_plan(plan, x.double().transpose(1, 2).flatten(2)) for x in (one.q, one.k, one.v)]
    heads = [x.unflatten(2, (-1, one.q.shape[3])).transpose(1, 2) for x in merged]
    got, dense = attended(*heads, state.sizes), attended(one.q, one.k, one.v, torch.ones(one.x.shape[:2]))
    return all(
        torch.allclose(got[b, :, s], dense[b, :, i], rtol=1e-9, atol=1e-9)
        for b, row in enumerate(groups(plan))
        for s, group in enumerate(row)
        for i in group
    )


def attended(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> Tensor:
    """Attention in float64 with the log of sizes [B, N] as bias."""
    logits = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5 + sizes.double().log()[:, None, None]
    return logits.softmax(-1) @ v.double()


def is_scale_free(cls: type[TokenReduction], seed: int) -> bool:
    one, method = Made.random(seed), made(cls, **AMOUNT)
    factor = torch.rand(one.x.shape[:2], generator=torch.Generator().manual_seed(seed)) * 3 + 0.3
    return torch.equal(one.plan(method).slot, replace(one, k=one.k * factor[:, None, :, None]).plan(method).slot)


CELLS: dict[str, Holds] = {
    EXACT_COUNT: has_exact_count,
    KEEPS_SURVIVORS: keeps_survivors,
    CONSERVES_MASS: conserves_mass,
    MERGES_DUPLICATES: merges_duplicates,
    ORDER_FREE: is_order_free,
    SET_FREE: is_set_free,
    SCALE_FREE: is_scale_free,
}


def test_every_registered_method_has_its_cells() -> None:
    assert set(CELLS) == PROPERTIES
    assert METHODS.keys() >= {"tome", "evit", "random"}
    for name, cls in METHODS.items():
        assert cls.properties <= PROPERTIES, f"{name} names cells that nothing tests"
        assert ORDER_FREE not in cls.properties or SET_FREE in cls.properties, f"{name}: one implies the other"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", METHODS)
def test_a_cell_holds_or_fails_as_the_method_says(name: str, cell: str) -> None:
    cls = METHODS[name]
    held = [CELLS[cell](cls, seed) for seed in SEEDS]
    if cell in cls.properties:
        assert all(held), f"{name} says {cell}, and it does not hold at seeds {[s for s in SEEDS if not held[s]]}"
    else:
        assert not all(held), f"{cell} holds of {name}, which does not say so"


@pytest.mark.parametrize("name", BY_AMOUNT)
@pytest.mark.parametrize("amount", [{"r": 1}, {"r": 3}, {"r": 50}, {"keep_ratio": 0.5}, {"keep_ratio": 0.95}])
def test_counts_of_rows_of_every_length(name: str, amount: dict) -> None:
    """One, two and more free tokens, odd and even, with and without padding; r beyond what can leave is clamped."""
    method = made(METHODS[name], **amount)
    for prefix, count in itertools.product((1, 2, 5), (1, 2, 3, 8, 9)):
        one = Made.random(count, prefix=prefix, count=prefix + count, batch=4)
        for case in (one, padded(one, left=False), padded(one, left=True)):
            tokens = case.tokens(method)
            check_plan(method.plan(tokens), tokens)  # counts, the prefix in front, each token in one slot or dropped
            if "r" in amount:
                leaves = min(amount["r"], most_removable(tokens.rule, prefix + count))
                assert tokens.rule.out(prefix + count) == prefix + count - leaves + tokens.rule.added * min(leaves, 1)


def padded(one: Made, left: bool) -> Made:
    """Row b has up to b padding tokens, numbers that would decide everything if they were read, and a free one left."""
    batch, count = one.x.shape[:2]
    missing = torch.arange(batch).clamp(max=count - one.prefix - 1)[:, None]
    place = torch.arange(count).expand(batch, -1)
    valid = place >= missing if left else place < count - missing

    def filled(value: Tensor) -> Tensor:
        hidden = ~valid if value.dim() == 3 else ~valid[:, None].expand(-1, value.shape[1], -1)
        return value.masked_fill(hidden[..., None], 1e4)

    return replace(one.on(filled), valid=valid)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_protected_tokens_are_bitwise_unchanged_and_in_front(name: str, prefix: int) -> None:
    one = Made.random(prefix, prefix=prefix)
    _, after = one.reduced(made(METHODS[name], **AMOUNT))
    assert after.shape[1] < one.x.shape[1]
    assert torch.equal(after[:, :prefix], one.x[:, :prefix])


@pytest.mark.parametrize("name", METHODS)
def test_equal_tokens_are_treated_alike_in_every_row_and_run(name: str) -> None:
    """No NaN, and ties go by index alone: whatever the value is, and whoever the neighbours are."""
    method = made(METHODS[name], **AMOUNT)
    one = Made.random(0).on(lambda value: value[..., :1, :].expand_as(value).contiguous())
    plan = one.plan(method)
    check_plan(plan, one.tokens(method))
    assert (plan.slot == plan.slot[:1]).all()
    assert torch.equal(plan.slot, one.plan(method).slot)
    assert one.reduced(method)[1].isfinite().all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_token_without_direction_spoils_neither_the_plan_nor_other_rows(name: str, value: float) -> None:
    """One key and hidden state of zeros, of infinity or of NaN."""
    method, one = made(METHODS[name], **AMOUNT), Made.random(1)
    k, x = one.k.clone(), one.x.clone()
    k[1, :, 5], x[1, 5] = value, value
    odd = replace(one, k=k, x=x)
    plan = odd.plan(method)
    check_plan(plan, odd.tokens(method))
    assert torch.equal(plan.slot[::2], one.plan(method).slot[::2])
    if value == 0:
        assert odd.reduced(method)[1].isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    method, one = made(METHODS[name], **AMOUNT), Made.random(2)
    together, valid = one.plan(method), replace(one, valid=torch.ones(one.x.shape[:2], dtype=torch.bool))
    for b in range(3):
        alone = one.rows(slice(b, b + 1)).plan(method)
        assert torch.equal(alone.slot[0], together.slot[b])
    assert torch.equal(valid.plan(method).slot, together.slot)


@pytest.mark.parametrize("name", METHODS)
def test_where_tokens_went_and_back(name: str) -> None:
    """Two reductions: each original token is in one slot or none, and restored values are constant on groups."""
    method, one = made(METHODS[name], **AMOUNT), Made.random(3)
    state, after = one.reduced(method)
    source, drops = state.source(), state.plans[0].drops
    assert source.shape == one.x.shape[:2]
    assert int(source.max()) < after.shape[1]
    assert ((source >= 0).all(1) | drops).all()
    back = state.restore(after, 1, 0, 0)
    for b, row in enumerate(source.tolist()):
        for i, slot in enumerate(row):
            assert torch.equal(back[b, i], after[b, slot] if slot >= 0 else torch.zeros_like(after[b, 0]))


@pytest.mark.parametrize("name", BY_AMOUNT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_decide_as_float32_where_the_margin_is_wide(name: str, dtype: torch.dtype) -> None:
    """A margin is wide where noise of 1% changes nothing; half types round by less.  Equal numbers decide equally."""
    method, wide = made(METHODS[name], **AMOUNT), 0
    for seed in range(12):
        one = Made.random(seed, side=3, batch=1)
        generator = torch.Generator().manual_seed(seed)

        def noisy(value: Tensor, generator: torch.Generator = generator) -> Tensor:
            return value + 0.01 * torch.randn(value.shape, generator=generator)

        half = one.on(lambda value: value.to(dtype))
        chosen = half.plan(method).slot
        assert torch.equal(chosen, half.on(lambda value: value.float()).plan(method).slot)
        plain = one.plan(method).slot
        if all(torch.equal(one.on(noisy).plan(method).slot, plain) for _ in range(4)):
            wide += 1
            assert torch.equal(chosen, plain)
    assert wide >= 2


def test_passes_outside_of_the_matrix_are_tested_by_name_elsewhere() -> None:
    """Those that only let tokens in or hold inside a sub-layer; sparse ones are tested as a family of their own."""
    folder = Path(__file__).parent / "passes"
    outside = [cls for name, cls in registered_passes().items() if name not in METHODS and origin_of(cls) == "tamis"]
    for cls in (one for one in outside if one.family != "sparse"):
        assert not issubclass(cls, TokenReduction) or cls.grows, f"{cls.name} has no cells"
        file = folder / f"test_{cls.__module__.rpartition('.')[2]}.py"
        assert cls.__name__ in file.read_text(), f"{file.name} says nothing of {cls.__name__}"
