"""Text encoders at lengths and paddings that their example did not have: biases, windows and positions by token."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from family import Family, quietly, text_inputs
from oracle import reduced_forward
from rewriting import assert_equal_outputs, captured, distance, real_rows, rewritten, run
from torch import nn
from zoo import FAMILIES
from zoo_text import hf_text

from tamis.capture import capture
from tamis.errors import PositionRead
from tamis.rewrite import Pipeline

PASSES = ("tome:keep_ratio=0.7", "random:keep_ratio=0.7")
BUDGET = 1e-5  # sizes and scores are float32 whatever the model is
SHAPES = ((1, 41, None), (3, 37, "left"), (3, 29, "right"), (2, 5, None), (1, 1, None))  # batch, length, padding
POSITIONAL = ("t5_encoder", "modernbert", "roberta", "albert")  # relative bias, rotation and window, counted ids, plain


def assert_equals_the_oracle(family: Family, passes: str, shapes=SHAPES) -> None:
    result, model = rewritten(family.name, passes), family.shared(torch.float64)
    for batch, length, padding in shapes:
        inputs = family.inputs(batch, length=length, padding=padding, seed=length)
        answer = reduced_forward(family, model, inputs, passes)
        assert bool(answer.stream.counts) or length < 3
        assert_equal_outputs(run(result, inputs), answer.outputs, BUDGET)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", POSITIONAL)
def test_other_lengths_and_left_padding_equal_the_oracle(name: str, passes: str) -> None:
    assert_equals_the_oracle(FAMILIES[name], passes)


@pytest.mark.full
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if "length" in f.dynamic and n not in POSITIONAL])
def test_all_others_at_other_lengths(name: str, passes: str) -> None:
    left = FAMILIES[name].padded
    assert_equals_the_oracle(FAMILIES[name], passes, SHAPES if left else SHAPES[:1] + SHAPES[3:])


@pytest.mark.parametrize("name", ["t5_encoder", "modernbert"])
def test_an_example_of_one_row_captures_the_same(name: str) -> None:
    inputs = FAMILIES[name].inputs(3)
    assert_equal_outputs(
        run(rewritten(name, PASSES[0], batch=1), inputs), run(rewritten(name, PASSES[0]), inputs), 1e-12
    )


@pytest.mark.parametrize("name", ["t5_encoder", "modernbert"])
@pytest.mark.parametrize("passes", PASSES)
def test_neighbours_and_more_padding_do_not_change_a_row(name: str, passes: str) -> None:
    """T5's padding is hidden by the mask that holds its bias: only by reading it are padding and tokens told apart."""
    family, result = FAMILIES[name], rewritten(name, passes)
    short, long = family.inputs(3), family.inputs(3, extra=9)
    (together,), (more,), (alone,) = run(result, short), run(result, long), run(result, family.inputs(1))
    assert distance(together[:1], alone) <= 1e-9
    for a, b in zip(real_rows(family, short, together), real_rows(family, long, more), strict=True):
        assert distance(a[None], b[None]) <= 1e-9
    assert (more[:, 24:] == 0).all()


@pytest.mark.parametrize("passes", PASSES)
def test_counted_positions_make_the_side_of_padding_irrelevant(passes: str) -> None:
    family, result = FAMILIES["roberta"], rewritten("roberta", passes)
    left, right = family.inputs(3, padding="left"), family.inputs(3, padding="right")
    (left_tokens, left_pooled), (right_tokens, right_pooled) = run(result, left), run(result, right)
    for a, b in zip(real_rows(family, left, left_tokens), real_rows(family, right, right_tokens), strict=True):
        assert distance(a[None], b[None]) <= 1e-9
    assert distance(left_pooled, right_pooled) <= 1e-9


@cache
def far_sighted() -> Family:
    """ModernBERT with a window far longer than the example: at the example's length it hides nothing."""
    local = FAMILIES["modernbert"]
    kinds = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    build = hf_text("ModernBertModel", "ModernBertConfig", local_attention=96, max_position_embeddings=256, **kinds)
    return Family(
        "far_sighted", build, text_inputs, 0, 24, layers=2, dynamic=local.dynamic, padded=True, oracle=local.oracle
    )


@pytest.mark.parametrize("passes", PASSES)
def test_a_window_longer_than_the_example_holds_at_longer_inputs(passes: str) -> None:
    family = far_sighted()
    model, (_, kwargs) = family.shared(torch.float64), family.inputs(2)
    graph = capture(model, (), kwargs)
    assert [(site.mask.kind, site.mask.window) for site in graph.sites] == [("padding", None), ("window", (48, 48))]
    result = Pipeline.parse(passes).run(graph)
    for padding in ("right", "left"):
        inputs = family.inputs(2, length=130, padding=padding)
        assert_equal_outputs(run(result, inputs), reduced_forward(family, model, inputs, passes).outputs, BUDGET)


def test_what_masks_the_zoo_has() -> None:
    kinds = {
        name: {site.mask.kind for site in captured(name).sites} for name in ("t5_encoder", "modernbert", "roberta")
    }
    assert kinds == {"t5_encoder": {"bias"}, "modernbert": {"padding", "window"}, "roberta": {"padding"}}
    assert all(site.mask.padded for name in kinds for site in captured(name).sites)


def test_a_last_token_read_by_its_place_is_refused() -> None:
    """SigLIP's text tower pools there; where rows are padded the last token is none."""
    from transformers import SiglipTextConfig, SiglipTextModel

    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = SiglipTextConfig(**sizes, **ends, vocab_size=60, max_position_embeddings=64, projection_size=48)
    model: nn.Module = quietly(lambda: SiglipTextModel(config)).eval()
    graph = capture(model, (), text_inputs(2)[1])
    with pytest.raises(PositionRead, match=r"modeling_siglip\.py.*reads token -1 by its position"):
        Pipeline.parse("tome:r=2").run(graph)
