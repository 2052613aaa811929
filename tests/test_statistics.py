"""What methods learn of an attention, `received()` and `rows()`, against the matrix of hand-written forwards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import onnxruntime
import pytest
import torch
from oracle import reduced_forward
from rewriting import assert_equal_outputs, captured, run
from zoo import FAMILIES
from zoo_text import CLIP_TEXT

from tamis.capture import capture
from tamis.capture.program import copied, rebuild
from tamis.errors import MethodFailed
from tamis.graph import TokenGraph
from tamis.lowering.fusion import fuse
from tamis.lowering.onnx import export_onnx
from tamis.lowering.splice import op_of
from tamis.passes import TokenReduction, ToMe, keep_plan, match_plan
from tamis.rewrite import Pipeline, Result
from tamis.tokens import Plan, Tokens

BUDGET = 1e-5  # statistics are float32 whatever the model is


@dataclass(frozen=True)
class MostReceived(TokenReduction):
    """Keep the tokens that receive most attention."""

    def plan(self, tokens: Tokens) -> Plan:
        return keep_plan(tokens, tokens.attention.received().mean(1))


@dataclass(frozen=True)
class SeenByTwo(TokenReduction):
    """Keep the tokens that the last token attends to, and half as much the one before it."""

    def plan(self, tokens: Tokens) -> Plan:
        return keep_plan(tokens, seen_by_two(tokens).mean(1))


@dataclass(frozen=True)
class Alike(TokenReduction):
    """Merge tokens that receive alike over the heads, by sum and by sum of squares, and that two tokens see alike."""

    causal: bool = True

    def plan(self, tokens: Tokens) -> Plan:
        received = tokens.attention.received() + 0.3 * tokens.attention.matrix().square().sum(2)
        return match_plan(tokens, (received + seen_by_two(tokens)).transpose(1, 2))


def seen_by_two(tokens: Tokens) -> torch.Tensor:
    """[B, H, N], of the last two real tokens of rows without left padding."""
    back = torch.arange(1, 3, device=tokens.hidden.device)
    if tokens.valid is None:
        index = (tokens.hidden.shape[1] - back).expand(tokens.hidden.shape[0], 2)
    else:
        index = tokens.valid.sum(1, keepdim=True) - back
    rows = tokens.attention.rows(index)
    return rows[:, :, 0] + 0.5 * rows[:, :, 1]


RECEIVED, SEEN = MostReceived(keep_ratio=0.7), SeenByTwo(keep_ratio=0.6)
BOTH = (ToMe(r=2, layers=[0]), MostReceived(keep_ratio=0.7, layers=[1]))
CASES = [
    ("vit_small", (RECEIVED,)),
    ("vit_small", (SEEN,)),
    ("vit_small", BOTH),
    ("beit", (RECEIVED,)),  # a bias for pairs of tokens
    ("beit", (SEEN,)),
    ("bert", (RECEIVED,)),  # padding
    ("bert", BOTH),
]


@cache
def rewritten(name: str, passes: tuple[Any, ...], dtype: torch.dtype = torch.float64) -> Result:
    return Pipeline(passes).run(captured(name, dtype))


@pytest.mark.parametrize(("name", "passes"), CASES)
def test_methods_that_ask_equal_the_oracle(name, passes):
    family = FAMILIES[name]
    for batch in (1, 3):
        inputs = family.inputs(batch, dtype=torch.float64, seed=batch)
        answer = reduced_forward(family, family.shared(torch.float64), inputs, passes)
        assert answer.stream.counts
        assert_equal_outputs(run(rewritten(name, passes), inputs), answer.outputs, BUDGET)


@pytest.mark.parametrize("masked", [False, True])  # a flag of the attention, or a table for pairs of tokens
def test_under_a_causal_mask_statistics_equal_the_oracle(masked):
    def inputs(batch: int, length: int) -> Any:
        return CLIP_TEXT.inputs(batch, length=length, padding="right" if masked else None, mask=masked, seed=batch)

    model, passes = CLIP_TEXT.shared(torch.float64), (Alike(r=3),)
    result = Pipeline(passes).run(capture(model, *inputs(2, 24)))
    for batch, length in ((1, 24), (3, 37)):
        given = inputs(batch, length)
        assert_equal_outputs(run(result, given), reduced_forward(CLIP_TEXT, model, given, passes).outputs, BUDGET)


def test_onnx_runtime_equals_torch(tmp_path):
    result = rewritten("vit_small", (RECEIVED,), torch.float32)
    path = export_onnx(result.graph.program, tmp_path / "received.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        args, kwargs = FAMILIES["vit_small"].inputs(batch, dtype=torch.float32)
        expected = run(result, (args, kwargs))
        got = session.run(None, {session.get_inputs()[0].name: args[0].numpy()})
        assert_equal_outputs([torch.from_numpy(x) for x in got], expected, 1e-4)


def test_on_a_gpu_attention_gives_its_log_sum_exp():
    """A statistic fuses with the attention it is of, whether sizes bias that yet or not."""
    cases = [
        ("vit_small", (RECEIVED,), [True, True]),
        ("vit_small", BOTH, [True]),
        ("beit", (RECEIVED,), [True, False, False]),  # once reduced, attention gathers a table of its own
    ]
    for name, passes, expected in cases:
        program = rewritten(name, passes, torch.float32).graph.program
        module = copied(program)
        fired = fuse(module.graph, ("fusion_attention",))
        assert [one.fired for one in fired] == expected, [str(one) for one in fired]
        module.recompile()
        ops = [op.name for node in module.graph.nodes if (op := op_of(node))]
        assert ops.count("attention_with_lse") == sum(expected)
        assert ops.count("attention_lse") == len(expected) - sum(expected)
        inputs = FAMILIES[name].inputs(3, dtype=torch.float32)
        fused = run(TokenGraph(rebuild(program, module)), inputs)
        assert_equal_outputs(fused, run(TokenGraph(program), inputs), 1e-6)


def test_attention_under_a_soft_cap_says_that_it_has_no_statistics():
    class Capped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                h = self.norm(x).reshape(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
                logits = torch.tanh(h @ h.transpose(2, 3) / 8**0.5 / 5) * 5
                x = x + self.out((logits.softmax(-1) @ h).transpose(1, 2).flatten(2))
                x = x + self.out(self.norm(x))
            return x

    graph = capture(Capped().eval(), (torch.randn(2, 12, 16),))
    with pytest.raises(MethodFailed, match="statistics of attention under a soft cap"):
        Pipeline((MostReceived(keep_ratio=0.5),)).run(graph, restore=False)
