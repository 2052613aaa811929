"""Merging inside diffusion models: a U-Net and two transformers, small and with random weights."""

from __future__ import annotations

from contextlib import ExitStack
from fractions import Fraction
from functools import cache

import pytest
import torch
from around_oracle import Recipe, merged_around
from family import draw, quietly
from rewriting import applied, assert_equal_outputs, run
from test_onnx_zoo import run_file

import tamis
from tamis.capture import capture
from tamis.rewrite import Pipeline

diffusers = pytest.importorskip("diffusers")

EVERYWHERE = "tomesd:keep_ratio=0.4,max_downsample=2,merge_crossattn=true,merge_mlp=true"
SIZES = {"attention_head_dim": 8, "sample_size": (12, 10), "in_channels": 4, "out_channels": 4}


def unet():
    """Attention at the latent's own resolution (one block going down, two going up) and at half of it (one)."""
    channels = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "layers_per_block": 1}
    return diffusers.UNet2DConditionModel(**SIZES, **channels, **blocks)


def dit():
    sizes = {**SIZES, "sample_size": 12, "num_attention_heads": 2}
    return diffusers.DiTTransformer2DModel(**sizes, num_layers=2, patch_size=2, num_embeds_ada_norm=10)


def pixart():
    sizes = {**SIZES, "sample_size": 12, "num_attention_heads": 2, "cross_attention_dim": 16, "caption_channels": 24}
    return diffusers.PixArtTransformer2DModel(**sizes, num_layers=2, patch_size=2, use_additional_conditions=False)


def inputs_of(name, batch, dtype=torch.float64):
    """Latents, step and condition; every row has its own."""
    generator = torch.Generator().manual_seed(batch)
    rows, columns = SIZES["sample_size"] if name == "unet" else (12, 12)
    latent = torch.randn(batch, 4, rows, columns, generator=generator, dtype=dtype)
    text = torch.randn(batch, 5, 24, generator=generator, dtype=dtype)
    steps = torch.arange(batch) * 100 + 7
    if name == "unet":
        return (), {"sample": latent, "timestep": torch.tensor(7), "encoder_hidden_states": text}
    if name == "dit":
        return (), {"hidden_states": latent, "timestep": steps, "class_labels": torch.arange(batch) % 10}
    given = {"resolution": None, "aspect_ratio": None}
    return (), {"hidden_states": latent, "encoder_hidden_states": text, "timestep": steps, "added_cond_kwargs": given}


MODELS = {"unet": unet, "dit": dit, "pixart": pixart}


@cache
def model_of(name, dtype=torch.float64):
    return draw(quietly(MODELS[name])).to(dtype).eval()


@cache
def captured(name, dtype=torch.float64):
    return capture(model_of(name, dtype), (), inputs_of(name, 2, dtype)[1])


@cache
def rewritten(name, passes):
    return Pipeline.parse(passes).run(captured(name))


def blocks_of(name):
    """Every transformer block with its grid, in order."""
    model = model_of(name)
    if name != "unet":
        return [(i, block, (6, 6)) for i, block in enumerate(model.transformer_blocks)]
    places = [model.down_blocks[0].attentions[0], model.mid_block.attentions[0], *model.up_blocks[1].attentions]
    grids = [(12, 10), (6, 5), (12, 10), (12, 10)]
    return [(i, place.transformer_blocks[0], grid) for i, (place, grid) in enumerate(zip(places, grids, strict=True))]


def parts_of(block, everywhere):
    parts = [block.attn1, block.attn2, block.ff] if everywhere else [block.attn1]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("unet", "tomesd"),
        ("unet", EVERYWHERE),
        ("dit", "tomesd"),
        ("pixart", EVERYWHERE),
        pytest.param("dit", EVERYWHERE, marks=pytest.mark.full),
        pytest.param("pixart", "tomesd", marks=pytest.mark.full),
    ],
)
def test_a_rewritten_model_equals_the_wrapped_one(name, passes):
    everywhere, result = passes == EVERYWHERE, rewritten(name, passes)
    chosen = [one for one in blocks_of(name) if everywhere or one[2] != (6, 5)]
    counts = {(12, 10): (120, 60, 48), (6, 6): (36, 18, 15), (6, 5): (30, None, 12)}
    # 0.6 * 36 is 21.6, of which 21 merge; 0.6 * 30 is 18
    outcomes = [(one.layer, one.before, one.after) for one in applied(result)]
    assert outcomes == [
        (number, counts[grid][0], counts[grid][1 + everywhere])
        for number, block, grid in chosen
        for _ in parts_of(block, everywhere)
    ]
    wrapped = [(n, block, parts_of(block, everywhere), grid) for n, block, grid in chosen]
    args, kwargs = inputs_of(name, 3)
    with torch.no_grad(), merged_by_ratio(wrapped, "0.6" if everywhere else "0.5"):
        outputs = torch.utils._pytree.tree_leaves(model_of(name)(*args, **kwargs))
    assert_equal_outputs(run(result, (args, kwargs)), outputs, 1e-9)


def merged_by_ratio(blocks, ratio):
    """Every block with r tokens of its own count."""
    stack = ExitStack()
    for number, block, parts, (rows, columns) in blocks:
        r = int(rows * columns * Fraction(ratio))
        stack.enter_context(merged_around([(number, block, parts, (rows, columns))], Recipe(r)))
    return stack


def test_coarser_blocks_say_why_not():
    skipped = [one for one in rewritten("unet", "tomesd").outcomes if not one.applied]
    assert [(one.layer, one.reason) for one in skipped] == [
        (1, "its tokens lie 2 times coarser than the image, max_downsample is 1")
    ]


def test_a_row_does_not_depend_on_its_batch():
    args, kwargs = inputs_of("pixart", 3)
    first = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
    together, alone = (run(rewritten("pixart", EVERYWHERE), (args, one)) for one in (kwargs, first))
    assert_equal_outputs([together[0][:1]], alone, 1e-10)


def test_the_front_door_and_onnx_runtime(tmp_path):
    model, kwargs = model_of("dit", torch.float32), inputs_of("dit", 2, torch.float32)[1]
    fast = tamis.compile(model, (), kwargs=kwargs, passes="tomesd")
    assert fast.report.drift.relative_l2 > 1e-4
    assert [(row.tokens_in, row.tokens_out, row.measured) for row in fast.report.layers] == [(36, 36, 18)] * 2
    fast.export(tmp_path / "dit.onnx")  # held against torch at other sizes
    given = inputs_of("dit", 5, torch.float32)[1]
    found = run_file(tmp_path / "dit.onnx", {key: value.numpy() for key, value in given.items()})
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(fast(**given))
    assert_equal_outputs([torch.as_tensor(one) for one in found], expected, 1e-4)
