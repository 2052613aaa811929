"""Focus-DETR on DETR's encoder: against layers written out that update the chosen tokens alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from family import draw, quietly
from rewriting import applied, assert_equal_outputs, run
from safetensors.torch import save_file
from test_onnx_zoo import assert_file_equals
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from tamis.capture import capture
from tamis.errors import BadParameter, NothingChanged
from tamis.passes import FocusDETR
from tamis.rewrite import Pipeline
from tamis.weight_errors import WeightsMismatch

WIDTH, HEADS, LAYERS = 32, 4, 3
COUNTS = (7, 5, 4)  # of 12: floor(0.5 * 12) + 1, and 1, 0.8, 0.6 of it
SHAPES = {"layer1.0": (32,), "layer1.1": (32, 32), "layer2.0": (16, 32), "layer2.2": (8, 16), "layer2.4": (1, 8)}


@cache
def weights():
    generator, found = torch.Generator().manual_seed(3), {}
    for name, shape in SHAPES.items():
        found[f"enc_mask_predictor.{name}.weight"] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        found[f"enc_mask_predictor.{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return found


@cache
def detr(dtype=torch.float64):
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
    backbone = ResNetConfig(**sizes, layer_type="basic", out_features=["stage4"])
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    widths = {"d_model": WIDTH, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    rest = {"encoder_layers": LAYERS, "decoder_layers": 2, "num_queries": 6, "num_labels": 3}
    whole = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": backbone}
    return (
        draw(quietly(lambda: DetrForObjectDetection(DetrConfig(**whole, **heads, **widths, **rest)))).to(dtype).eval()
    )


def images(batch, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, 3, 96, 128, generator=generator).to(dtype)}  # 3 x 4 tokens


@cache
def captured(dtype=torch.float64):
    return capture(detr(dtype), (), images(2, dtype))


@cache
def rewritten(dtype=torch.float64):
    return Pipeline.parse([FocusDETR(weights=weights())]).run(captured(dtype))


def scores(x):
    """[B, N] of what enters the encoder, in float32 as the scorer is."""
    own = {name.removeprefix("enc_mask_predictor."): tensor for name, tensor in weights().items()}
    z = layer_norm(x.float(), (WIDTH,), own["layer1.0.weight"], own["layer1.0.bias"])
    z = gelu(linear(z, own["layer1.1.weight"], own["layer1.1.bias"]))
    z = torch.cat([z[..., : WIDTH // 2], z[..., WIDTH // 2 :].mean(1, keepdim=True).expand(-1, 12, -1)], -1)
    for name in ("layer2.0", "layer2.2"):
        z = gelu(linear(z, own[f"{name}.weight"], own[f"{name}.bias"]))
    return linear(z, own["layer2.4.weight"], own["layer2.4.bias"]).squeeze(-1)


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def update(layer, x, places, chosen):
    """One layer of DETR's encoder for the chosen tokens [K] of one image [N, C]; all are keys and values."""
    attention, keys = layer.self_attn, (x + places)[None]
    q, k, v = attention.q_proj(keys[:, chosen]), attention.k_proj(keys), attention.v_proj(x[None])
    seen = scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)
    y = layer.self_attn_layer_norm(x[None, chosen] + attention.o_proj(seen))
    y = layer.final_layer_norm(y + layer.mlp(y))
    out = x.clone()
    out[chosen] = y[0]
    return out


def expected(batch):
    """DETR's outputs with its encoder's layers replaced, and the tokens that each updated."""
    return written_out(detr(), detr().model.encoder.layers, images(batch))


def written_out(model, layers, inputs):
    """A model's outputs with some layers updating the chosen tokens alone, and how many these are."""
    undo, seen, state = [], [], {}

    def replaced(index, layer):
        def forward(hidden_states, attention_mask, spatial_position_embeddings=None, **_):
            if index == 0:
                order = torch.sort(scores(hidden_states), dim=1, descending=True, stable=True).indices
                state["order"] = order
            rows = []
            for row, order in zip(range(len(hidden_states)), state["order"], strict=True):
                chosen = order[: COUNTS[index]].sort().values
                places = spatial_position_embeddings[row if len(spatial_position_embeddings) > 1 else 0]
                rows.append(update(layer, hidden_states[row], places, chosen))
            seen.append(COUNTS[index])
            return torch.stack(rows)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = replaced(index, layer)
        undo.append(layer)
    try:
        with torch.no_grad():
            return torch.utils._pytree.tree_leaves(model(**inputs)), seen
    finally:
        for layer in undo:
            del layer.forward


@pytest.mark.parametrize("batch", [1, 3])
def test_a_rewritten_detector_equals_the_one_written_out(batch):
    outputs, seen = expected(batch)
    assert_equal_outputs(run(rewritten(), ((), images(batch))), outputs, 1e-9)
    outcomes = [(one.layer, one.before, one.after, one.inside) for one in applied(rewritten())]
    assert outcomes == [(layer, 12, count, "the block") for layer, count in enumerate(seen)]


def rt_detr():
    """RT-DETR: one layer of plain attention on the coarsest map, convolutions, and queries picked from all maps."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
    backbone = RTDetrResNetConfig(**sizes, layer_type="basic", out_features=["stage4"])
    maps = {
        "encoder_in_channels": [16],
        "feat_strides": [32],
        "encode_proj_layers": [0],
        "decoder_in_channels": [WIDTH],
    }
    widths = {"d_model": WIDTH, "encoder_hidden_dim": WIDTH, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "decoder_n_points": 1}
    rest = {"num_feature_levels": 1, "decoder_layers": 1, "num_queries": 4, "num_labels": 3, "num_denoising": 0}
    config = RTDetrConfig(backbone_config=backbone, use_timm_backbone=False, **maps, **widths, **heads, **rest)
    return draw(quietly(lambda: RTDetrForObjectDetection(config))).eval()


def test_the_encoder_of_a_detector_that_picks_its_queries():
    """Its decoder is deeper, but each of its tokens stands for an answer."""
    model, inputs = rt_detr(), images(2, torch.float32)
    graph = capture(model, (), inputs)
    assert [site.module for site in graph.sites if site.role == "stream"] == ["model.encoder.aifi.0.layers.0.self_attn"]
    assert "stands for one answer" in graph.sites[1].reason
    result = Pipeline.parse([FocusDETR(weights=weights())]).run(graph)
    outputs, seen = written_out(model, model.model.encoder.aifi[0].layers, inputs)
    assert [one.after for one in applied(result)] == seen == [7]
    assert_equal_outputs(run(result, ((), inputs)), outputs, 1e-4)


def test_other_layers_say_why_not():
    skipped = [(one.layer, one.reason) for one in rewritten().outcomes if not one.applied]
    why = "it is no layer of the model's deepest stream with the tokens of an image"
    assert skipped == [(3, why), (4, why)]


def test_layers_count_through_all_streams():
    """The decoder's two follow the encoder's three, for the scorer's tensors as for the places."""
    with pytest.raises(NothingChanged, match="deepest stream"):
        Pipeline.parse([FocusDETR(weights=weights(), layers=[4])]).run(captured())
    result = Pipeline.parse([FocusDETR(weights=weights(), layers=[-4])]).run(captured())
    assert [one.layer for one in applied(result)] == [1]


def test_scores_are_made_once():
    count = sum("select_tokens" in str(node.target) for node in rewritten().graph.graph.nodes)
    sizes = [
        tuple(node.args[1].meta["val"].shape) for node in rewritten().graph.graph.nodes if "linear" in str(node.target)
    ]
    assert (count, sizes.count((8, 16))) == (LAYERS, 1)


def test_onnx_runtime_equals_torch(tmp_path):
    inputs = [((), images(batch, torch.float32)) for batch in (1, 4)]
    feeds = [(args, kwargs, {"pixel_values": kwargs["pixel_values"].numpy()}) for args, kwargs in inputs]
    called = assert_file_equals(rewritten(torch.float32).graph.program, feeds, tmp_path / "model.onnx")
    assert called >= {"SelectTokens", "RestoreTokens"}


def test_from_a_file_with_other_fractions(tmp_path):
    save_file(weights(), tmp_path / "scorer.safetensors")
    text = f"focus-detr:keep_ratio=0.3,fractions=[1,0.5],weights={tmp_path / 'scorer.safetensors'}"
    result = Pipeline.parse(text).run(captured())
    assert [one.after for one in applied(result)] == [4, 2, 2]  # floor(3.6) + 1


def test_padding_that_is_not_known_is_refused():
    mask = torch.ones(2, 96, 128, dtype=torch.int64)
    graph = capture(detr(), (), {**images(2), "pixel_mask": mask})
    for method in (FocusDETR(weights=weights()), "tomesd:max_downsample=32"):
        with pytest.raises(NothingChanged, match="padding"):
            Pipeline.parse([method] if isinstance(method, FocusDETR) else method).run(graph)


def test_wrong_parameters():
    for wrong in ({"keep_ratio": 0}, {"keep_ratio": 2}, {"fractions": []}, {"fractions": [0.5, 1.5]}):
        with pytest.raises(BadParameter):
            FocusDETR(weights=weights(), **wrong)
    with pytest.raises(BadParameter, match="weights"):
        FocusDETR()
    few = {name: tensor for name, tensor in weights().items() if "layer1" in name}
    with pytest.raises(WeightsMismatch):
        Pipeline.parse([FocusDETR(weights=few)]).run(captured())
