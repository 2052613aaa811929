"""Token-Shuffle on image encoders: against forwards in which windows are joined and parted one token at a time."""

from __future__ import annotations

from functools import cache

import onnx
import pytest
import torch
from rewriting import applied, assert_equal_outputs, captured, run
from safetensors.torch import save_file
from test_onnx_zoo import assert_equal, run_file
from torch.nn.functional import gelu, linear
from zoo import FAMILIES

from tamis.capture import capture
from tamis.errors import BadParameter, NothingChanged
from tamis.lowering.onnx import export_onnx
from tamis.passes import TokenShuffle
from tamis.passes.windows import joined_windows, parted_windows
from tamis.rewrite import Pipeline
from tamis.weight_errors import WeightsMismatch

WIDTH, WINDOW, MLPS, INNER = 96, 2, 2, 40


@cache
def weights():
    part = WIDTH // WINDOW**2
    shapes = {"shuffle.linear": (part, WIDTH), "unshuffle.linear": (WIDTH, part)}
    for name in (f"{side}.mlps.{i}" for side in ("shuffle", "unshuffle") for i in range(MLPS)):
        shapes |= {f"{name}.fc1": (INNER, WIDTH), f"{name}.fc2": (WIDTH, INNER)}
    generator, found = torch.Generator().manual_seed(7), {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        found[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return found


def method(**parameters):
    return TokenShuffle(weights=weights(), **parameters)


def layer(x, name):
    return linear(x, weights()[f"{name}.weight"].to(x.dtype), weights()[f"{name}.bias"].to(x.dtype))


def mixed(x, side):
    for i in range(MLPS):
        x = x + layer(gelu(layer(x, f"{side}.mlps.{i}.fc1")), f"{side}.mlps.{i}.fc2")
    return x


def by_hand(model, images, prefix, side, first, last):
    """A timm ViT whose blocks first to last see one token for each window of a side x side grid."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    windows = [(r, c) for r in range(0, side, WINDOW) for c in range(0, side, WINDOW)]
    cells = [(i, j) for i in range(WINDOW) for j in range(WINDOW)]
    for index, block in enumerate(model.blocks):
        if index == first:
            joined = [
                torch.cat([layer(x[:, prefix + (r + i) * side + c + j], "shuffle.linear") for i, j in cells], dim=-1)
                for r, c in windows
            ]
            x = torch.cat([x[:, :prefix], mixed(torch.stack(joined, dim=1), "shuffle")], dim=1)
        x = block(x)
        if index == last:
            joined = mixed(x[:, prefix:], "unshuffle").chunk(len(windows), dim=1)
            parted = {}
            for (r, c), token in zip(windows, joined, strict=True):
                for (i, j), part in zip(cells, token.chunk(WINDOW**2, dim=-1), strict=True):
                    parted[(r + i) * side + c + j] = layer(part, "unshuffle.linear")
            x = torch.cat([x[:, :prefix], *(parted[place] for place in range(side**2))], dim=1)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize(
    ("name", "side", "layers"), [("vit_small", 14, None), ("deit_distilled", 6, None), ("deit_distilled", 6, [1, 2])]
)
def test_a_rewritten_encoder_equals_the_one_written_out(name, side, layers):
    family = FAMILIES[name]
    model, result = family.shared(torch.float64), Pipeline.parse(method(layers=layers)).run(captured(name))
    chosen = layers or list(range(len(model.blocks)))
    for batch in (1, 3):
        inputs = family.inputs(batch, seed=batch, dtype=torch.float64)
        with torch.no_grad():
            expected = by_hand(model, inputs[0][0], family.prefix, side, chosen[0], chosen[-1])
        assert_equal_outputs(run(result, inputs), [expected], 1e-10)
    few = family.prefix + side**2 // 4
    assert [(one.layer, one.before, one.after) for one in applied(result)] == [(i, family.tokens, few) for i in chosen]


def test_joining_and_parting_by_hand():
    """A grid of 2 x 4 tokens of one channel each."""
    x = torch.arange(8.0).reshape(1, 8, 1)
    joined = joined_windows(x, (2, 4), 2)
    assert joined.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    assert torch.equal(parted_windows(joined, (2, 4), 2), x)


def test_onnx_runtime_equals_torch(tmp_path):
    program = Pipeline.parse(method()).run(captured("deit_distilled", torch.float32)).graph.program
    export_onnx(program, tmp_path / "model.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    for batch in (1, 5):
        (images,), _ = FAMILIES["deit_distilled"].inputs(batch, seed=batch)
        with torch.no_grad():
            assert_equal(run_file(tmp_path / "model.onnx", {"x": images.numpy()}), [program.module()(images)])


def test_from_a_file(tmp_path):
    save_file(weights(), tmp_path / "shuffle.safetensors")
    result = Pipeline.parse(f"token-shuffle:weights={tmp_path / 'shuffle.safetensors'}").run(captured("deit_distilled"))
    inputs = FAMILIES["deit_distilled"].inputs(1, dtype=torch.float64)
    assert_equal_outputs(run(result, inputs), run(Pipeline.parse(method()).run(captured("deit_distilled")), inputs), 0)


@pytest.mark.parametrize(
    ("name", "layers", "reason"),
    [
        ("dinov2_reg4", None, "do not divide its grid of 7 x 7"),
        ("deit_distilled", [0, 2], "do not follow each other"),
        ("bert", None, "with the tokens of an image"),
    ],
)
def test_reasons_why_not(name, layers, reason):
    width = captured(name).node(captured(name).layers[0].before_attention).meta["val"].shape[-1]
    one = method(layers=layers) if width == WIDTH else TokenShuffle(weights=resized(width), layers=layers)
    with pytest.raises(NothingChanged, match=reason):
        Pipeline.parse(one).run(captured(name))


def resized(width):
    """Zeros for another number of channels."""
    shapes = TokenShuffle(weights={}).expected([0], width)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_causal_attention_is_refused():
    class Causal(torch.nn.Module):
        """One causal layer over the patches of an image."""

        def __init__(self):
            super().__init__()
            self.patches, self.qkv = torch.nn.Conv2d(3, 16, 4, 4), torch.nn.Linear(16, 48)
            self.mlp = torch.nn.Linear(16, 16)

        def forward(self, images):
            x = self.patches(images).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + seen.transpose(1, 2).flatten(2)
            return x + self.mlp(x)

    graph = capture(Causal().eval(), (torch.randn(2, 3, 16, 16),))
    with pytest.raises(NothingChanged, match="see ahead"):
        Pipeline.parse(TokenShuffle(weights=resized(16))).run(graph)


def test_wrong_parameters_and_weights():
    for wrong in ({"window": 0}, {"mlps": -1}, {"window": 1.5}):
        with pytest.raises(BadParameter):
            method(**wrong)
    with pytest.raises(BadParameter, match="weights"):
        TokenShuffle()
    with pytest.raises(BadParameter, match="divides the 96 channels"):
        Pipeline.parse(method(window=3)).run(captured("deit_distilled"))
    for wrong in ({"mlps": 1}, {"window": 4}):
        with pytest.raises(WeightsMismatch):
            Pipeline.parse(method(**wrong)).run(captured("deit_distilled"))
