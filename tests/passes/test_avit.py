"""A-ViT against its released form, which masks, and against one image at a time whose tokens really leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import tokens_by_hand
from oracle import reduced_forward
from rewriting import applied, assert_equal_outputs, captured, run
from test_onnx_zoo import run_file
from torch import Tensor
from zoo import FAMILIES

from tamis.errors import NothingChanged
from tamis.lowering.onnx import export_onnx
from tamis.passes import AViT
from tamis.passes.methods.avit import channel_gate
from tamis.rewrite import Pipeline, Result

CLASS_TOKEN = ["deit3_small", "deit_distilled", "dinov2_reg4"]


def gates(name: str, seed: int = 0, bias: float = 0.0) -> dict[str, Tensor]:
    """Random gates under which some tokens stop after every block."""
    layers, width = len(captured(name).layers) - 1, FAMILIES[name].shared().num_features
    weight = torch.randn(layers, width, generator=torch.Generator().manual_seed(seed)) / 8
    return {"gate.weight": weight, "gate.bias": torch.full((layers,), bias)}


def attended(attn: Any, x: Tensor, hidden: Tensor) -> Tensor:
    """Attention over x [1, N, C] of which the tokens `hidden` [N] are not seen."""
    count = x.shape[1]
    q, k, v = attn.qkv(x).reshape(count, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
    logits = attn.q_norm(q) @ attn.k_norm(k).transpose(1, 2) * attn.head_dim**-0.5 - 1000.0 * hidden
    return attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(1, count, -1))


def block_of(block: Any, x: Tensor, hidden: Tensor) -> Tensor:
    x = x + block.ls1(attended(block.attn, block.norm1(x), hidden))
    return x + block.ls2(block.mlp(block.norm2(x)))


def released(model: Any, image: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The code's forward: every token stays, stopped ones are zeroed and hidden, the class token among them."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    done, left, running = torch.zeros(x.shape[1]), torch.ones(x.shape[1]), torch.ones(x.shape[1])
    output = torch.zeros_like(x)
    for layer, block in enumerate(model.blocks):
        x = block_of(block, x * running[:, None].to(x.dtype), 1 - running.to(x.dtype))
        halting = torch.ones_like(done)
        if layer < len(model.blocks) - 1:
            halting = (x[0].float() @ weights["gate.weight"][layer] + weights["gate.bias"][layer]).sigmoid()
        done = done + halting
        stops, goes_on = (done > 0.99) * running, (done < 0.99).float()
        output = output + x * (left * stops + halting * goes_on)[:, None]
        left, running = left - goes_on * halting, goes_on
    return model.forward_head(model.norm(output))


def one_image(model: Any, image: Tensor, method: AViT, prefix: int) -> tuple[Tensor, list[int]]:
    """The output for image [1, 3, H, W] and the original tokens that are left, one after the other."""
    weights, layers = method.weights.tensors, len(model.blocks)
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    states = {i: [] for i in range(x.shape[1])}  # of every token, (weight, state) after each block
    done, left = dict.fromkeys(states, 0.0), list(states)
    for layer, block in enumerate(model.blocks):
        x = block_of(block, x, torch.zeros(x.shape[1], dtype=x.dtype))
        halting = [1.0] * len(left)
        if layer < layers - 1:
            halting = (x[0].float() @ weights["gate.weight"][layer] + weights["gate.bias"][layer]).sigmoid().tolist()
        for place, i in enumerate(left):
            if done[i] <= 0.99:
                stops = done[i] + halting[place] > 0.99
                states[i].append((1 - done[i] if stops else halting[place], x[0, place]))
            done[i] += halting[place]
        room = prefix + len(left) - prefix - method.rule(layer, layers, prefix).removed(len(left))
        running = [i for i in left[prefix:] if layer == layers - 1 or done[i] <= 0.99]
        kept = left[:prefix] + sorted(sorted(running, key=lambda i: done[i])[: room - prefix])
        x, left = x[:, [left.index(i) for i in kept]], kept
    output = torch.stack([sum(share * state for share, state in states[i]) for i in left])
    return model.forward_head(model.norm(output[None])), left


def rewritten(name: str, weights: dict[str, Tensor], dtype: torch.dtype = torch.float64, **amount: Any) -> Result:
    return Pipeline.parse([AViT(weights=weights, **amount)]).run(captured(name, dtype), token_map=True)


SOME = [("deit3_small", {}), ("deit_distilled", {"keep_ratio": 0.8}), ("dinov2_reg4", {"r": 2})]
ALL = [(name, amount) for name in CLASS_TOKEN for amount in ({}, {"keep_ratio": 0.8}, {"r": 2})]
CASES = [pytest.param(*case, marks=[] if case in SOME else [pytest.mark.full]) for case in ALL]


@torch.no_grad()
@pytest.mark.parametrize(("name", "amount"), CASES)
def test_a_batch_is_its_images_one_by_one(name, amount):
    family, weights = FAMILIES[name], gates(name)
    images = family.inputs(4, dtype=torch.float64, seed=5)[0][0]
    result = rewritten(name, weights, **amount)
    got, source = result.graph.program.module()(images)
    method = AViT(weights=weights, **amount)
    alone = [one_image(family.shared(torch.float64), image[None], method, family.prefix) for image in images]
    assert [(slots >= 0).nonzero().flatten().tolist() for slots in source] == [left for _, left in alone]
    assert min(len(left) for _, left in alone) < applied(result)[-1].after, "no token stopped"
    assert_equal_outputs([got], [torch.cat([output for output, _ in alone])], 1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("name", "bias"), [("deit3_small", 0.0), ("vit_small", 2.5)])
def test_tokens_that_leave_are_tokens_that_the_released_code_hides(name, bias):
    family, weights = FAMILIES[name], gates(name, 1, bias)
    images = family.inputs(2, dtype=torch.float64)[0][0]
    expected = [released(family.shared(torch.float64), image[None], weights) for image in images]
    got, source = rewritten(name, weights).graph.program.module()(images)
    assert (source < 0).any()
    assert_equal_outputs([got], [torch.cat(expected)], 1e-6)


def test_the_output_is_the_mean_over_depth_with_the_remainder_at_the_stop():
    """Halting .3, .5, .4: the third state gets the .2 that are left, and what comes after counts nothing."""
    method = AViT(weights={"gate.weight": torch.eye(2)[:1].expand(4, 2), "gate.bias": torch.zeros(4)})
    carried, left = {}, []
    for layer, halting in enumerate([0.3, 0.5, 0.4, 0.9, 0.9]):
        hidden = torch.zeros(1, 3, 2)
        hidden[0, 0, 0], hidden[0, :, 1] = torch.tensor(halting).logit(), 10.0**layer
        hidden[0, 1:, 0] = torch.tensor([-30.0, 30.0])  # one goes on to the end, one stops at once
        tokens = tokens_by_hand(method, hidden, layer=layer, layers=5, weights=method.weights.tensors, carried=carried)
        plan = method.plan(tokens)
        carried = plan.carry
        left.append(plan.slot[0].tolist())
    torch.testing.assert_close(plan.features[0, :, 1], torch.tensor([0.3 + 5 + 20, 10.0**4, 1.0]))
    assert left == [[0, 1, -1]] * 4 + [[0, 1, 2]]


def test_where_too_many_run_the_most_nearly_done_leave():
    method = AViT(r=2, weights={"gate.weight": torch.eye(2)[:1], "gate.bias": torch.zeros(1)})
    hidden = torch.zeros(1, 6, 2)
    hidden[0, :, 0] = torch.tensor([9.0, -1, 2, -3, 1, 9])
    plan = method.plan(tokens_by_hand(method, hidden, layer=0, layers=2, weights=method.weights.tensors))
    assert plan.slot.tolist() == [[0, 1, -1, 2, 3, -1]]
    assert plan.valid.tolist() == [[True, True, True, True]]


def test_the_published_gate_reads_channel_0():
    weights = channel_gate(3, 4, scale=10, centre=30)
    assert all(value.dtype == torch.float32 for value in weights.values())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        gate = x @ weights["gate.weight"][layer] + weights["gate.bias"][layer]
        torch.testing.assert_close(gate.sigmoid(), (10 * x[:, 0] - 30).sigmoid())


@pytest.mark.parametrize("name", ["bert", "beit"])
def test_padding_and_positions(name):
    """With the oracle's plans, which are the method's own: what the rewriter does around them."""
    family = FAMILIES[name]
    width = captured(name).node(captured(name).layers[0].after_block).meta["val"].shape[-1]
    method = AViT(keep_ratio=0.8, weights={"gate.weight": torch.ones(2, width) / 8, "gate.bias": torch.zeros(2)})
    inputs = family.inputs(3, dtype=torch.float64)
    answer = reduced_forward(family, family.shared(torch.float64), inputs, [method])
    assert len(answer.stream.counts) == 3
    assert_equal_outputs(run(Pipeline.parse([method]).run(captured(name)), inputs), answer.outputs, 1e-5)


def test_onnx_runtime_stops_the_same_tokens(tmp_path: Path):
    program = rewritten("deit_distilled", gates("deit_distilled"), torch.float32, keep_ratio=0.9).graph.program
    export_onnx(program, tmp_path / "model.onnx")
    images = FAMILIES["deit_distilled"].inputs(5, seed=1)[0][0]
    with torch.no_grad():
        expected, source = program.module()(images)
    logits, got = run_file(tmp_path / "model.onnx", {program.graph_signature.user_inputs[0]: images.numpy()})
    assert got.tolist() == source.tolist()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_class_token_is_refused():
    weights = {"gate.weight": torch.zeros(2, 96), "gate.bias": torch.zeros(2)}
    with pytest.raises(NothingChanged, match="this model has no class token"):
        Pipeline.parse([AViT(weights=weights)]).run(captured("siglip"))


def test_after_the_last_layer_all_stop_whatever_was_chosen():
    method = AViT(weights={}, layers=[1])
    assert method.selected(4) == [1, 3]
    assert method.expected([1, 3], 8) == {"gate.weight": (1, 8), "gate.bias": (1,)}
