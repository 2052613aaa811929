"""Reduction under causal attention: CLIP's text tower, whose pooled token stands wherever the text ends."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from oracle import Answer, reduced_forward
from rewriting import applied, assert_equal_outputs, real_rows, run
from torch import Tensor, nn
from zoo_text import CLIP_END, CLIP_TEXT

from tamis.capture import capture
from tamis.errors import NothingChanged, TokenAxisUnsupported
from tamis.graph import TokenGraph
from tamis.rewrite import Pipeline, Result

MERGES = ("tome:r=5->1,causal=true", "tome:keep_ratio=0.7,causal=true", "tome:r=3,prop_attn=false,causal=true")
BUDGET = 1e-5  # sizes and scores are float32 whatever the model is


class TokensOnly(nn.Module):
    """A text tower without its pooling, which pruning could not follow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@cache
def captured(masked: bool = True, pooled: bool = True) -> TokenGraph:
    model = CLIP_TEXT.shared(torch.float64)
    _, kwargs = CLIP_TEXT.inputs(2, mask=masked, padding="right" if masked else None)
    return capture(model if pooled else TokensOnly(model).eval(), (), kwargs)


@cache
def rewritten(passes: str, masked: bool = True, pooled: bool = True) -> Result:
    return Pipeline.parse(passes).run(captured(masked, pooled))


def expected(passes: str, inputs: Any) -> Answer:
    answer = reduced_forward(CLIP_TEXT, CLIP_TEXT.shared(torch.float64), inputs, passes)
    assert answer.stream.counts
    return answer


@pytest.mark.parametrize("passes", MERGES)
def test_merging_equals_the_oracle(passes: str) -> None:
    result = rewritten(passes)
    for batch, length, padding in (
        (1, 24, "right"),
        (5, 24, "right"),
        (3, 37, "left"),
        (2, 12, None),
        (3, 13, "right"),
    ):
        inputs = CLIP_TEXT.inputs(batch, length=length, padding=padding, seed=batch)
        assert_equal_outputs(run(result, inputs), expected(passes, inputs).outputs, BUDGET)


def test_without_a_mask_attention_is_only_flagged_causal() -> None:
    graph = captured(masked=False)
    assert all(site.hides_later for site in graph.sites)
    assert not any(site.mask.padded for site in graph.sites)
    for batch, length in ((1, 24), (3, 9)):
        inputs = CLIP_TEXT.inputs(batch, length=length, padding=None, mask=False)
        got = run(rewritten(MERGES[0], masked=False), inputs)
        assert_equal_outputs(got, expected(MERGES[0], inputs).outputs, BUDGET)


@pytest.mark.parametrize("passes", ["random:keep_ratio=0.7,causal=true", "random:r=3,causal=true"])
def test_pruning_equals_the_oracle_where_no_token_is_read_by_position(passes: str) -> None:
    result = rewritten(passes, pooled=False)
    for batch, padding in ((1, None), (3, "right"), (3, "left")):
        inputs = CLIP_TEXT.inputs(batch, padding=padding, seed=batch)
        assert_equal_outputs(run(result, inputs), expected(passes, inputs).outputs[:1], BUDGET)


def test_no_slot_sees_a_later_one() -> None:
    """Every layer after the first reduction has plain causality, and no table of pairs."""
    nodes = [n for n in rewritten(MERGES[0]).graph.graph.nodes if "tamis.attention" in str(n.target)]
    assert len(nodes) == CLIP_TEXT.layers - 1
    assert all(node.args[4] is None and node.args[6] is True for node in nodes)


def test_neighbours_and_more_padding_do_not_change_a_row() -> None:
    result = rewritten(MERGES[1])
    together, alone = run(result, CLIP_TEXT.inputs(3)), run(result, CLIP_TEXT.inputs(1))
    assert_equal_outputs([x[:1] for x in together], alone, 1e-9)
    more = run(result, CLIP_TEXT.inputs(3, extra=6))
    assert_equal_outputs([more[1]], [together[1]], 1e-9)
    for a, b in zip(
        real_rows(CLIP_TEXT, CLIP_TEXT.inputs(3), together[0]),
        real_rows(CLIP_TEXT, CLIP_TEXT.inputs(3, extra=6), more[0]),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


def test_the_end_of_text_is_read_in_the_slot_it_went_to() -> None:
    """Without this the pooled output would silently be another token's: slots are fewer than positions."""
    inputs = CLIP_TEXT.inputs(5)
    tokens, pooled = run(rewritten(MERGES[0]), inputs)
    end = (inputs[1]["input_ids"] == CLIP_END).int().argmax(1)
    assert len(set(end.tolist())) > 1
    assert torch.equal(pooled, tokens[torch.arange(5), end])


def test_an_end_of_text_inside_the_padding_is_not_a_number() -> None:
    """The dense model answers with the state of a token that a reduction takes out."""
    _, kwargs = CLIP_TEXT.inputs(2)
    hidden = kwargs["attention_mask"].clone()
    hidden[1, 18:] = 0  # its text ends at 18
    tokens, pooled = run(rewritten(MERGES[0]), ((), {**kwargs, "attention_mask": hidden}))
    assert pooled[0].isfinite().all()
    assert pooled[1].isnan().all()
    assert tokens.isfinite().all()


def test_pruning_before_a_read_at_a_computed_position_is_refused() -> None:
    with pytest.raises(TokenAxisUnsupported, match=r"modeling_clip\.py.*positions computed from the data"):
        rewritten("random:keep_ratio=0.7,causal=true")


def test_without_the_option_the_reason_names_it() -> None:
    with pytest.raises(NothingChanged, match=r"attention is causal.*causal=true allows it"):
        rewritten("tome:r=3")
    (outcome,) = Pipeline.parse("evit:keep_ratio=0.7,causal=true").run(captured(), allow_noop=True).outcomes
    assert not outcome.applied
    assert "no class token" in outcome.reason


def test_the_option_is_part_of_the_recipe() -> None:
    pipeline = Pipeline.parse("tome:r=3,causal=true")
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert [o.layer for o in applied(rewritten(MERGES[0]))] == list(range(CLIP_TEXT.layers))
