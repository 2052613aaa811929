"""What sparse attention refuses, by class and text."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from decoders import DECODERS, captured, prompt
from torch import nn
from zoo import quietly

import tamis
from tamis.call_errors import PositionsExceeded
from tamis.capture import capture
from tamis.errors import BadParameter, NothingChanged
from tamis.graph import TokenGraph
from tamis.passes import BlockSparse
from tamis.rewrite import Pipeline
from tamis.target_errors import KernelRefuses


def made(name: str, config: str, **options: Any) -> nn.Module:
    """A random model of transformers without a cache."""
    import transformers

    options = {"vocab_size": 60, "d_model": 32, "use_cache": False, **options}
    return quietly(lambda: getattr(transformers, name)(getattr(transformers, config)(**options))).eval()


HALVES = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
BART = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in HALVES.items()}


@cache
def bart() -> TokenGraph:
    model = made("BartModel", "BartConfig", max_position_embeddings=64, **BART)
    inputs = prompt(2, 12, "right")
    return capture(model, kwargs={**inputs, "decoder_input_ids": inputs["input_ids"][:, :10]})


def test_cross_attention_is_named_where_nothing_can_be_done() -> None:
    with pytest.raises(NothingChanged) as caught:
        Pipeline.parse("a-shape").run(bart())
    assert str(caught.value) == (
        "a-shape: asked for, but nothing in the model changed.\n"
        "  attention sees later tokens too, and the method is made for causal attention; beside it is attention of "
        "another stream and cross-attention (decoder.layers.0.self_attn, decoder.layers.0.encoder_attn), which no pass "
        "takes\n"
        "  hint: allow_noop=True (--allow-noop) accepts a result equal to the original."
    )


def test_cross_attention_is_left_alone_where_the_rest_can_be_sparse() -> None:
    result = Pipeline.parse("block-sparse:block=4").run(bart())
    assert [outcome.site for outcome in result.outcomes if outcome.applied] == ["scaled_dot_product_attention"]
    left = [n for n in result.graph.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    assert len(left) == 2


def test_a_mask_that_cannot_be_explained() -> None:
    """T5's relative positions are a bias that no index can say."""
    model = made("T5EncoderModel", "T5Config", d_kv=16, num_layers=1, num_heads=2, d_ff=32)
    graph = capture(model, kwargs=prompt(2, 12, "right"))
    reason = "attention adds a mask or bias that is neither causal nor padding, which an index cannot say"
    with pytest.raises(NothingChanged, match=reason):
        Pipeline.parse("block-sparse").run(graph)


def test_a_density_of_nothing() -> None:
    with pytest.raises(BadParameter) as caught:
        BlockSparse(density=0)
    assert str(caught.value).startswith("block-sparse: density must be in (0, 1], got 0.\n  hint: ")


def half_llama() -> nn.Module:
    return DECODERS["llama"].model(layers=1).half()


@pytest.mark.parametrize(
    ("block", "half", "said"),
    [
        (128, False, "rows of up to 64 queries of torch.float32, not 128"),
        pytest.param(256, True, "rows of up to 128 queries of torch.float16, not 256", marks=pytest.mark.full),
    ],
)
def test_a_block_that_the_kernel_does_not_have(block: int, half: bool, said: str) -> None:
    program = capture(half_llama(), kwargs=prompt(2, 12, None)).program if half else captured("llama")[1].program
    options: dict[str, Any] = {"kwargs": prompt(2, 12, None), "passes": f"block-sparse:block={block}", "verify": False}
    with pytest.raises(KernelRefuses) as caught:
        tamis.compile(program, target="cuda:sm_90", **options)
    assert str(caught.value) == (
        "node block_sparse_attention (block_sparse_attention) cannot run on a GPU as a kernel: the kernel takes "
        f"{said}.\n  hint: choose what the kernel has (the pass's block, the model's type), or another target."
    )


@pytest.mark.parametrize(("name", "beyond"), [("gpt2", 0), pytest.param("opt", 2, marks=pytest.mark.full)])
def test_a_sequence_longer_than_the_models_positions(name: str, beyond: int) -> None:
    program = captured(name)[1].program
    fast = tamis.compile(program, kwargs=prompt(2, 12, "left"), passes="a-shape:sink=2,local=4", verify=False)
    with torch.no_grad():
        assert fast(**prompt(1, 128, None)).logits.shape[1] == 128
        with pytest.raises(PositionsExceeded) as caught:
            fast(**prompt(1, 129 + beyond, None))
    assert f"{129 + beyond} tokens ask for row {128 + 2 * beyond} of the table " in str(caught.value)
    assert f", which has rows 0 to {127 + beyond}.\n  hint: shorten the input" in str(caught.value)


def test_padding_asks_for_no_position() -> None:
    """Five tokens more than positions, of which six are padding."""
    model, graph = captured("gpt2")
    fast = tamis.compile(graph.program, kwargs=prompt(2, 12, "left"), passes="a-shape:sink=0,local=200", verify=False)
    inputs = prompt(1, 133, None)
    inputs["attention_mask"][:, :6] = 0
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions).logits
        torch.testing.assert_close(fast(**inputs).logits[:, 6:], expected[:, 6:], rtol=1e-4, atol=1e-4)
