"""CLCA's cache behind reductions: equal to forwards written by hand, and the same in ONNX Runtime and Inductor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family import draw, text_inputs
from rewriting import assert_equal_outputs, captured, run
from test_onnx_zoo import run_file
from torch import Tensor, nn
from zoo import FAMILIES, timm_model
from zoo_text import CLIP_TEXT

import tamis
from tamis.capture import capture
from tamis.errors import BadParameter, NothingChanged
from tamis.lowering.onnx import export_onnx
from tamis.passes import CLCA, EViT, TokenReduction, match_plan
from tamis.rewrite import Pipeline
from tamis.tokens import Plan, Tokens
from tamis.weight_errors import WeightsMismatch

DEPTH = 6
NORM = ("weight", "bias", "running_mean", "running_var")


@cache
def model(dtype: torch.dtype = torch.float64) -> Any:
    options = {"embed_dim": 48, "num_heads": 3, "num_classes": 10, "img_size": 64}
    return draw(timm_model("deit_tiny_distilled_patch16_224", **options)(DEPTH)).to(dtype).eval()


def images(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch)).to(dtype)


@cache
def graph(dtype: torch.dtype = torch.float64) -> Any:
    return capture(model(dtype), (images(2, dtype),))


@torch.no_grad()
def by_hand(
    net: Any,
    x: Tensor,
    keep: float,
    reduce_at: list[int],
    recover_at: list[int],
    parts: dict[str, Tensor] | None = None,
) -> tuple[Tensor, list[int]]:
    """EViT and the cache on a distilled DeiT, trained parts or none: logits and the tokens behind every block."""
    x, kept, counts, classes = net._pos_embed(net.patch_embed(x)), [], [], []
    carriers = (parts or {}).get("carriers", torch.zeros(0, 48)).to(x.dtype)
    x = torch.cat([x, carriers.expand(len(x), -1, -1)], 1)
    for layer, block in enumerate(net.blocks):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        if layer in reduce_at:
            seen = weights[:, :, 0, 2:].mean(1)
            count = -int(-keep * seen.shape[1] // 1)
            order = seen.argsort(dim=1, descending=True, stable=True)
            best, rest = order[:, :count, None].expand(-1, -1, 48), order[:, count:, None].expand(-1, -1, 48)
            fused = (x[:, 2:].gather(1, rest) * seen.gather(1, order[:, count:]).unsqueeze(-1)).sum(1, keepdim=True)
            x = torch.cat([x[:, :2], x[:, 2:].gather(1, best), fused], 1)
        x = x + block.mlp(block.norm2(x))
        if layer in recover_at:
            x, kept = torch.cat([x, *kept], 1), []
        own = x.shape[1] - len(carriers)
        kept += [x[:, 2:own].mean(1, keepdim=True), x[:, own:]]
        counts.append(x.shape[1])
        if (layer in recover_at and layer != DEPTH - 2) or layer == DEPTH - 1:
            classes.append(x[:, 0])
    if parts is not None and "head.conv1.weight" in parts:
        return head(torch.stack(classes, 2), parts), counts
    x = net.norm(x)
    return (net.head(x[:, 0]) + net.head_dist(x[:, 1])) / 2, counts


def head(classes: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Scores from class tokens [B, C, M], by torch's modules."""
    width, reads = classes.shape[1:]
    layers = nn.Sequential(
        nn.BatchNorm1d(width),
        nn.Conv1d(width, 2 * width, reads, groups=width),
        nn.BatchNorm1d(2 * width),
        nn.GELU(),
        nn.Conv1d(2 * width, len(parts["head.conv2.bias"]), 1),
    )
    for name, layer in {"norm1": layers[0], "conv1": layers[1], "norm2": layers[2], "conv2": layers[4]}.items():
        own = {key.rpartition(".")[2]: value for key, value in parts.items() if key.startswith(f"head.{name}.")}
        missing, surplus = layer.load_state_dict(own, strict=False)
        assert (set(missing) - {"num_batches_tracked"}, surplus) == (set(), [])
    return layers.double().eval()(classes).squeeze(2)


def trained(carriers: int, reads: int = 3, classes: int = 10) -> dict[str, Tensor]:
    """Random parts for C = 48; without carriers or class tokens to read that part is left out."""
    shapes: dict[str, tuple[int, ...]] = {"carriers": (carriers, 48)} if carriers else {}
    if reads:
        shapes |= {f"head.norm1.{one}": (48,) for one in NORM} | {f"head.norm2.{one}": (96,) for one in NORM}
        shapes |= {"head.conv1.weight": (96, 1, reads), "head.conv1.bias": (96,)}
        shapes |= {"head.conv2.weight": (classes, 96, 1), "head.conv2.bias": (classes,)}
    generator = torch.Generator().manual_seed(carriers)
    return {
        name: torch.rand(shape, generator=generator) + (0.5 if name.endswith("var") else -0.5)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("carriers", "reads"), [(2, 3), (1, 0), (0, 3)])
def test_trained_parts_behind_evit_equal_the_forward_by_hand(carriers: int, reads: int) -> None:
    parts = trained(carriers, reads)
    result = Pipeline((EViT(keep_ratio=0.5), CLCA(weights=parts))).run(graph())
    for batch in (1, 3):
        expected, counts = by_hand(model(), images(batch), 0.5, [1, 3, 4], [1, 3, 4], parts)
        assert_equal_outputs(run(result, ((images(batch),), {})), [expected], 1e-5)
    after = [one.after for one in result.outcomes if one.applied and one.pass_name.startswith("clca")]
    assert after == [18 + carriers] * (carriers > 0) + [counts[layer] for layer in (1, 3, 4)]


def test_trained_parts_in_onnx_runtime(tmp_path: Path) -> None:
    parts, x = trained(2), images(4)
    result = Pipeline((EViT(keep_ratio=0.5), CLCA(weights=parts))).run(graph(torch.float32))
    export_onnx(result.graph.program, tmp_path / "model.onnx")
    got = run_file(tmp_path / "model.onnx", {"x": x.float().numpy()})
    assert_equal_outputs([torch.from_numpy(got[0])], [by_hand(model(), x, 0.5, [1, 3, 4], [1, 3, 4], parts)[0]], 1e-4)


def test_trained_parts_that_do_not_fit() -> None:
    with pytest.raises(BadParameter, match="below 5 with trained parts"):
        CLCA(weights=trained(1), layers=[5]).recoveries(6)
    for parts, reason in ((trained(1, reads=2), "reads 2 class tokens"), (trained(1, classes=7), "gives 7 scores")):
        assert reason in CLCA(weights=parts).why_not(graph())
    with pytest.raises(WeightsMismatch, match=r"norm1\.running_var missing"):
        Pipeline((CLCA(weights={k: v for k, v in trained(1).items() if k != "head.norm1.running_var"}),)).run(graph())
    with pytest.raises(NothingChanged, match="may be padding"):
        Pipeline((CLCA(weights={"carriers": torch.zeros(1, 48)}, layers=[0]),)).run(captured("bert"))


@pytest.mark.parametrize("recover_at", [None, [0, 2, 5]])
def test_behind_evit_it_equals_the_forward_by_hand(recover_at: list[int] | None) -> None:
    passes = "evit:keep_ratio=0.5 + clca" + (f":layers={recover_at}" if recover_at else "")
    result = Pipeline.parse(passes).run(graph())
    for batch in (1, 3):
        expected, counts = by_hand(model(), images(batch), 0.5, [1, 3, 4], recover_at or [1, 3, 4])
        assert_equal_outputs(run(result, ((images(batch),), {})), [expected], 1e-6)
    after = [outcome.after for outcome in result.outcomes if outcome.applied and outcome.pass_name.startswith("clca")]
    assert after == [counts[layer] for layer in (recover_at or [1, 3, 4]) if layer]


def test_counts_of_the_card() -> None:
    """At 448 pixels, with a carrier token from the start on, so that two are kept per block."""
    evit, clca, n, seen = EViT(keep_ratio=0.1), CLCA(), 786, []
    assert clca.recoveries(12) == [3, 6, 9, 10]
    assert clca.selected(12) == list(range(11))
    for layer in range(12):
        if layer in evit.selected(12):
            n = evit.rule(layer, 12, 1).out(n)
        if layer in clca.recoveries(12):
            n += 2 * clca.rule(layer, 12, 1).appended
            seen.append(n)
    assert seen == [87, 17, 10, 12]
    assert [clca.rule(layer, 12, 1).out(50) for layer in (2, 3, 6, 9, 10)] == [50, 53, 53, 53, 51]


def test_appended_tokens_are_of_no_original_token_and_sizes_go_on() -> None:
    """Behind ToMe with sizes: every original token is still in one slot, none of them an appended one."""
    result = Pipeline.parse("tome:r=2 + clca").run(graph(), token_map=True)
    _, where = run(result, ((images(3),), {}))
    last = [one.after for one in result.outcomes if one.applied][-1]
    assert where.shape == (3, 18)
    assert 0 <= where.min() <= where.max() < last
    result = Pipeline.parse("clca").run(graph(), token_map=True)
    _, where = run(result, ((images(2),), {}))
    assert where.tolist() == [list(range(18))] * 2


def test_padded_rows_do_not_depend_on_their_batch() -> None:
    family = FAMILIES["bert"]
    result = Pipeline.parse("tome:r=2 + clca:layers=[1]").run(captured("bert"))
    inputs = family.inputs(3, dtype=torch.float64)
    tokens, pooled = run(result, inputs)
    for row, real in enumerate((24, 19, 14)):
        alone = {key: value[row : row + 1, :real] for key, value in inputs[1].items()}
        expected = run(result, ((), alone))
        assert_equal_outputs([tokens[row : row + 1, :real], pooled[row : row + 1]], expected, 1e-9)


@dataclass(frozen=True)
class SeenByTheFirst(TokenReduction):
    """Merge tokens that the class token sees alike."""

    def plan(self, tokens: Tokens) -> Plan:
        return match_plan(tokens, tokens.attention.cls_row().transpose(1, 2))


def test_the_class_token_is_found_behind_left_padding_and_in_front_of_appended_tokens() -> None:
    passes = Pipeline((CLCA(layers=[1]), SeenByTheFirst(r=2, layers=[2])))
    ids, mask = text_inputs(3, padding="left")[1].values()
    result = passes.run(captured("bert"))
    outputs = run(result, ((), {"input_ids": ids, "attention_mask": mask}))
    other = run(result, ((), {"input_ids": torch.where(mask > 0, ids, ids + 1), "attention_mask": mask}))
    assert_equal_outputs([outputs[0] * mask[..., None]], [other[0] * mask[..., None]], 1e-9)


def test_onnx_runtime_agrees_with_torch(tmp_path: Path) -> None:
    result, x = Pipeline.parse("evit:keep_ratio=0.5 + clca:layers=[1,4]").run(graph(torch.float32)), images(5)
    export_onnx(result.graph.program, tmp_path / "model.onnx")
    got = run_file(tmp_path / "model.onnx", {"x": x.float().numpy()})
    expected, _ = by_hand(model(), x, 0.5, [1, 3, 4], [1, 4])
    assert_equal_outputs([torch.from_numpy(got[0])], [expected], 1e-4)


@pytest.mark.full
def test_inductor_agrees_with_torch() -> None:
    fast = tamis.compile(
        model(torch.float32), (images(2).float(),), passes="evit:keep_ratio=0.5 + clca", mode="default", verify=False
    )
    expected, counts = by_hand(model(), images(5), 0.5, [1, 3, 4], [1, 3, 4])
    assert [row.tokens_out for row in fast.report.layers] == counts
    assert_equal_outputs([fast(images(5).float())], [expected], 1e-4)


def test_models_without_a_place_for_more_tokens_are_refused() -> None:
    assert "attention is causal" in CLCA(causal=True).why_not(capture(CLIP_TEXT.shared(), (), CLIP_TEXT.inputs(2)[1]))
    assert "attention is windowed" in CLCA().why_not(captured("modernbert"))
