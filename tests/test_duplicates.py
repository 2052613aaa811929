"""The exact-duplicates oracle: merging equal tokens with the log-size bias is the dense model, to rounding.

Attention counts every key by its exponential, so n equal keys weigh as one key of logit + log n.  Groups of two, three
and four equal tokens make the sizes differ, so that a bias that is off by a constant would show.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from oracle import reduced_forward
from rewriting import applied, distance, run
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import FAMILIES, Family, text_inputs

from tamis.capture import capture
from tamis.graph import TokenGraph
from tamis.rewrite import Pipeline

MERGES = 1 + 2 + 3
RECIPE = f"tome:r={MERGES},layers=[0]"
PATCHES = {"vit_mean": 16, "deit_distilled": 16, "deit3_small": 16, "dinov2_reg4": 14, "hf_vit": 16, "clip_vision": 16}
NAMES = [*PATCHES, "bert"]


def groups(prefix: int) -> dict[int, list[int]]:
    """Token -> tokens equal to it: ToMe compares even tokens with odd ones, so each group has one odd token."""
    odd = prefix + 1 - prefix % 2
    even = prefix + prefix % 2
    return {odd: [even], odd + 2: [even + 2, even + 4], odd + 4: [even + 6, even + 8, even + 10]}


def copied(values: Tensor, prefix: int, dim: int) -> Tensor:
    """The same values with each group's members made equal; `dim` runs over the tokens after the prefix."""
    index = torch.arange(values.shape[dim])
    for leader, members in groups(prefix).items():
        index[[m - prefix for m in members]] = leader - prefix
    return values.index_select(dim, index)


def without_positions(family: Family) -> nn.Module:
    """The model in float64 with all position embeddings zero, so that equal patches are equal tokens."""
    model = family.model(torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" in name or "position" in name:
                parameter.zero_()
    return model


def duplicated_inputs(family: Family, batch: int) -> Any:
    """Inputs in which exactly MERGES tokens equal another one."""
    if family.oracle == "bert":
        args, kwargs = text_inputs(batch, padding=None)
        ids = torch.stack(
            [torch.randperm(50, generator=torch.Generator().manual_seed(i))[:24] + 5 for i in range(batch)]
        )
        ids[:, 1:] = copied(ids[:, 1:], 1, 1)
        return args, {**kwargs, "input_ids": ids}
    args, kwargs = family.inputs(batch, dtype=torch.float64)
    images = args[0] if args else kwargs["pixel_values"]
    size = PATCHES[family.name]
    patches = nn.functional.unfold(images, size, stride=size)  # [B, 3 * size^2, patches]
    images = nn.functional.fold(copied(patches, family.prefix, 2), images.shape[-2:], size, stride=size)
    return ((images,), {}) if args else ((), {"pixel_values": images})


def dense(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(model(*inputs[0], **inputs[1]))


@cache
def model_and_graph(name: str) -> tuple[nn.Module, TokenGraph]:
    model, example = without_positions(FAMILIES[name]), duplicated_inputs(FAMILIES[name], 2)
    return model, capture(model, example[0], kwargs=example[1])


def gaps(name: str, passes: str) -> tuple[list[float], list[float]]:
    """Distance to the dense model of the rewritten graph and of the oracle, output by output."""
    model, graph = model_and_graph(name)
    inputs = duplicated_inputs(FAMILIES[name], 3)
    result = Pipeline.parse(passes).run(graph)
    assert len(applied(result)) == 1
    expected = dense(model, inputs)
    by_hand = reduced_forward(FAMILIES[name], model, inputs, passes).outputs

    def measured(outputs: list[Tensor]) -> list[float]:
        return [distance(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True)]

    return measured(run(result, inputs)), measured(by_hand)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_duplicates_merge(name):
    family = FAMILIES[name]
    answer = reduced_forward(family, without_positions(family), duplicated_inputs(family, 3), RECIPE)
    slots = answer.stream.plans[0].slot
    for leader, members in groups(family.prefix).items():
        assert (slots[:, members] == slots[:, leader : leader + 1]).all()
    assert answer.stream.sizes.sort(descending=True).values[:, :4].tolist() == [[4, 3, 2, 1]] * 3


@pytest.mark.parametrize("name", NAMES)
def test_merging_duplicates_with_the_size_bias_is_the_dense_model(name):
    rewritten, by_hand = gaps(name, RECIPE)
    assert max(by_hand) <= 1e-5
    assert max(rewritten) <= 1e-5


@pytest.mark.parametrize("name", ["vit_mean", "bert"])
@pytest.mark.parametrize("method", ["tofu:switch=0,", "mctf:bidirectional=false,t_info=0,"])
def test_other_methods_that_merge_duplicates_are_the_dense_model(name, method):
    rewritten, by_hand = gaps(name, f"{method}r={MERGES},layers=[0]")
    assert max(*rewritten, *by_hand) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_without_the_size_bias_it_is_not(name):
    rewritten, by_hand = gaps(name, f"{RECIPE},prop_attn=false")
    assert min(by_hand) > 1e-2
    assert min(rewritten) > 1e-2
