"""ATS against a forward that takes one image at a time and really removes its tokens; and the mask it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from by_hand import tokens_by_hand
from oracle import reduced_forward
from rewriting import applied, assert_equal_outputs, captured, rewritten, run
from selection_oracle import sample_row
from test_onnx_zoo import run_file
from test_restored_heads import captured as captured_with_head
from torch import Tensor
from zoo import FAMILIES

import tamis
from tamis.counts import CountRule
from tamis.errors import BadParameter, TokenAxisUnsupported
from tamis.lowering.onnx import export_onnx
from tamis.passes import ATS, TokenReduction
from tamis.passes.cuts import MOST
from tamis.passes.plans import sample_plan
from tamis.rewrite import Pipeline
from tamis.tokens import Plan, Tokens

RECIPES = [
    "ats:keep_ratio=0.8,layers=[0,1,2]",
    "ats:keep_ratio=0.7,per_head=true",
    "ats:r=4,points=60,layers=[0,2]",  # more points than places: the heaviest stay
]
SMALL = ["vit_mean", "deit_distilled", "dinov2_reg4"]


def one_image(model, image: Tensor, method: ATS, prefix: int) -> tuple[Tensor, list[int]]:
    """The output for image [1, 3, H, W] and the original tokens that are left, by rising significance."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    left = list(range(x.shape[1]))
    for layer, block in enumerate(model.blocks):
        attn, count = block.attn, x.shape[1]
        q, k, v = attn.qkv(block.norm1(x)).reshape(count, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
        a = (attn.q_norm(q) @ attn.k_norm(k).transpose(1, 2) * attn.head_dim**-0.5).softmax(-1)
        x = x + block.ls1(attn.proj((a @ v).transpose(0, 1).reshape(1, count, -1)))
        if layer in method.selected(len(model.blocks)):
            whole = a[:, 0].sum(0) * v.transpose(0, 1).reshape(count, -1).norm(dim=1)
            score = (a[:, 0] * v.norm(dim=2)).sum(0) if method.per_head else whole
            rule: CountRule = method.rule(layer, len(model.blocks), prefix)
            row = sample_row(score.float().tolist(), [True] * count, rule.out(count), rule, method.points)
            kept = [i for i, held in zip(row[1], row[2], strict=True) if held]
            x, left = x[:, kept], [left[i] for i in kept]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x)), left


SOME = list(zip(SMALL, RECIPES, strict=True))
MODELS = [
    pytest.param(name, passes, marks=[] if (name, passes) in SOME else [pytest.mark.full])
    for name in SMALL
    for passes in RECIPES
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "passes"), MODELS)
def test_a_batch_under_a_mask_is_its_images_one_by_one_without(name, passes):
    family, (method,) = FAMILIES[name], Pipeline.parse(passes).passes
    result, images = rewritten(name, passes, token_map=True), family.inputs(5, dtype=torch.float64, seed=3)[0][0]
    got, source = result.graph.program.module()(images)
    alone = [one_image(family.shared(torch.float64), image[None], method, family.prefix) for image in images]
    assert_equal_outputs([got], [torch.cat([output for output, _ in alone])], 1e-6)
    for slots, (_, left) in zip(source, alone, strict=True):
        assert [int(slots[i]) for i in left] == list(range(len(left)))
        assert int((slots >= 0).sum()) == len(left)
    most = applied(result)[-1].after
    if method.points == 0:
        assert min(len(left) for _, left in alone) < most, "no points fall together, and nothing needs a mask"


@torch.no_grad()
def test_the_published_shape_of_the_model():
    """197 tokens, 196 points at every layer."""
    family, passes = FAMILIES["vit_small"], "ats:r=1,points=196"
    images = family.inputs(2, dtype=torch.float64)[0][0]
    (method,) = Pipeline.parse(passes).passes
    alone = [one_image(family.shared(torch.float64), image[None], method, 1) for image in images]
    assert max(len(left) for _, left in alone) < 160, "so many points, and yet many tokens are never picked"
    assert_equal_outputs(run(rewritten("vit_small", passes), ((images,), {})), [torch.cat([y for y, _ in alone])], 1e-6)


def test_the_cards_example():
    """Attention 1/2 and 1/3 of the significance over two heads, values of norm 1, 2 and 3."""
    expected = torch.tensor([0.0, 0.05, 0.30, 0.10, 0.25, 0.02, 0.28])
    norms = torch.tensor([1.0, 2, 3, 1, 2, 3, 1])
    values = (torch.eye(7) * norms[:, None])[None, None].expand(1, 2, 7, 7) * 0.5**0.5
    row = torch.stack([expected / norms / 3, expected / norms * 2 / 3])
    for per_head in (False, True):
        method = ATS(r=1, points=6, per_head=per_head)
        tokens = tokens_by_hand(method, torch.zeros(1, 7, 2), attention=row[None, :, None].expand(1, 2, 7, 7))
        tokens._tensors["values"] = lambda: values
        plan = method.plan(tokens)
        assert plan.leader.tolist() == [[0, 1, 3, 4, 6, 2]]
        assert plan.valid.all()


def test_scores_of_heads_apart_rank_otherwise():
    """The token with large values in the head that does not look at it counts in the code's form alone."""
    row = torch.tensor([[0.1, 0.5, 0.4], [0.1, 0.1, 0.8]])
    values = torch.tensor([[[1.0], [9], [1]], [[1.0], [1], [4]]])
    kept = []
    for per_head in (False, True):
        method = ATS(r=1, points=1, per_head=per_head)
        tokens = tokens_by_hand(method, torch.zeros(1, 3, 2), attention=row[None, :, None].expand(1, 2, 3, 3))
        tokens._tensors["values"] = lambda: values[None]
        kept.append(method.plan(tokens).leader.tolist())
    whole = (row.sum(0) * values.pow(2).sum((0, 2)).sqrt())[1:]
    apart = (row * values.norm(dim=2)).sum(0)[1:]
    assert kept == [[[0, 1 + int(whole.argmax())]], [[0, 1 + int(apart.argmax())]]]


def test_onnx_runtime_picks_the_same_tokens(tmp_path: Path):
    family = FAMILIES["dinov2_reg4"]
    program = rewritten("dinov2_reg4", RECIPES[0], torch.float32, token_map=True).graph.program
    export_onnx(program, tmp_path / "model.onnx")
    images = family.inputs(5, seed=1)[0][0]
    with torch.no_grad():
        _, expected = program.module()(images)
    _, got = run_file(tmp_path / "model.onnx", {program.graph_signature.user_inputs[0]: images.numpy()})
    assert got.tolist() == expected.tolist()


def test_the_report_says_that_counts_are_the_most():
    family = FAMILIES["vit_mean"]
    passes = "ats:keep_ratio=0.7,layers=[1] + random:r=2,layers=[2]"
    fast = tamis.compile(family.shared(), family.inputs(2)[0], passes=passes)
    assert [row.tokens_out for row in fast.report.layers] == [37, 27, 25]
    remarks = fast.report.remarks()
    assert f"note: ats:keep_ratio=0.7,layers=[1] at layer 1: {MOST}" in remarks
    assert f"note: random:r=2,layers=[2] at layer 2: {MOST}" in remarks


def test_points_below_zero_are_refused():
    with pytest.raises(BadParameter, match="points must be 0 or more"):
        ATS(r=1, points=-1)


def test_a_head_that_needs_every_token_refuses_it():
    with pytest.raises(TokenAxisUnsupported, match="dropped some for good"):
        Pipeline.parse("ats:keep_ratio=0.8").run(captured_with_head("dpt"))


# --- a mask that appears inside the model, whatever its attention and its head are ----------------------------------


@dataclass(frozen=True)
class Norms(TokenReduction):
    """Sample by the norm of hidden states, which every model has."""

    name: ClassVar[str] = "norms"

    def plan(self, tokens: Tokens) -> Plan:
        """Weights are steep, so that many points fall together."""
        return sample_plan(tokens, tokens.hidden.float().norm(dim=-1) ** 6)


HEADS = ["vit_mean", "siglip", "eva02", "beit", "bert"]
MORE = ["siglip_gap", "hf_siglip", "modernbert", "hf_beit", "hf_dinov3", "hf_vit", "t5_encoder", "clip_vision"]
AFTER = ["tome:r=2,layers=[1,2]", "pitome:r=2,margin=0.5,layers=[1]", "random:keep_ratio=0.7,layers=[1,2]"]
CASES = [(name, "") for name in HEADS] + [("vit_mean", after) for after in AFTER]
CASES += [pytest.param(name, "", marks=pytest.mark.full) for name in MORE]
CASES += [pytest.param(name, after, marks=pytest.mark.full) for name in ("siglip", "beit") for after in AFTER]


@pytest.mark.parametrize(("name", "after"), CASES)
def test_what_follows_honours_a_mask_that_appears_inside(name, after):
    family, passes = FAMILIES[name], [Norms(keep_ratio=0.8, layers=[0]), *Pipeline.parse(after or []).passes]
    result = Pipeline.parse(passes).run(captured(name))
    inputs = family.inputs(4, dtype=torch.float64, seed=2)
    answer = reduced_forward(family, family.shared(torch.float64), inputs, passes)
    held = answer.stream.plans[0].valid.sum(1)
    assert (held < answer.stream.plans[0].out).any(), "every slot holds a token, so that no mask is needed"
    assert_equal_outputs(run(result, inputs), answer.outputs, 1e-5)
    alone = run(result, family.inputs(1, dtype=torch.float64, seed=2))
    assert_equal_outputs([x[:1] for x in run(result, inputs)], alone, 1e-9)
    assert [o.reason for o in applied(result)] == [MOST] * len(applied(result))
