"""Embeddings, norms, activations and products that ONNX Runtime's optimizers fuse, against ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_node import Case, got, want
from torch import Tensor

from tamis.capture.onnx import table
from tamis.capture.onnx.example import example_of
from tamis.capture.onnx.module import OnnxModule
from tamis.capture.onnx.reader import from_proto

GENERATOR = torch.Generator().manual_seed(1)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def whole(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 255, shape, generator=GENERATOR).to(torch.uint8)


X, TINY, ROW = floats(2, 3, 8), floats(2, 3, 8) * 1e-5, floats(8)
IDS, SEGMENTS = whole([1, 5, 3, 8], [2, 2, 7, 0]), whole([0, 0, 1, 1], [0, 1, 1, 1])
TABLES = [floats(9, 8), floats(7, 8), floats(2, 8), floats(8), floats(8)]
BYTES = [bytes_of(9, 8), bytes_of(7, 8), bytes_of(2, 8), bytes_of(8), bytes_of(8)]
SCALES, ZEROS = [torch.tensor(0.01 * i) for i in range(1, 6)], [bytes_of(1)[0] for _ in range(5)]
IMAGE, KERNEL, CHANNELS = floats(2, 3, 6, 6), floats(4, 3, 3, 3), floats(4)
TURNS = {"cos": floats(16, 4).cos(), "sin": floats(16, 4).sin()}


def activation(name: str, inputs: list[Tensor | None] | None = None, **attributes: Any) -> Case:
    return Case(name, inputs or [X], attributes)


def embedding(
    mask: Tensor | None = None, positions: Tensor | None = None, outputs: tuple[int, ...] = (0, 1), **attributes: Any
) -> Case:
    inputs = [IDS, SEGMENTS, *TABLES, mask, positions]
    return Case("EmbedLayerNormalization", inputs, attributes, outputs, range(2, 7))


def product(a: tuple[int, ...], b: tuple[int, ...], **attributes: Any) -> Case:
    return Case("FusedMatMul", [floats(*a), floats(*b)], attributes)


def dense(name: str, **attributes: Any) -> Case:
    return Case("FusedGemm", [floats(4, 5), floats(6, 5), floats(6)], {"activation": name, "transB": 1, **attributes})


def image(name: str, *, residual: Tensor | None = None, **attributes: Any) -> Case:
    return Case("FusedConv", [IMAGE, KERNEL, CHANNELS, residual], {"activation": name, **attributes})


def rotated(x: Tensor, positions: Tensor, size: int = 8, **attributes: Any) -> Case:
    inputs = [x, positions, TURNS["cos"][:, : size // 2], TURNS["sin"][:, : size // 2]]
    return Case("RotaryEmbedding", inputs, attributes, constants=(2, 3))


PLACES, START = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 9]]), torch.tensor([3])
CASES = {
    "FastGelu": activation("FastGelu"),
    "FastGelu with bias": activation("FastGelu", [X, ROW]),
    "BiasGelu": activation("BiasGelu", [X, ROW]),
    "Gelu": activation("Gelu"),
    "QuickGelu": activation("QuickGelu", alpha=1.5),
    "QuickGelu of one": activation("QuickGelu", alpha=1.0),
    "QuickGelu as it comes": activation("QuickGelu"),
    "FusedMatMul": product((2, 4, 5), (2, 6, 5), alpha=0.25, transB=1),
    "FusedMatMul with a matrix": product((2, 4, 5), (6, 5), transB=1),
    "FusedMatMul of columns": product((2, 5, 4), (2, 5, 6), transA=1),
    "FusedMatMul, rows before the batch": product((4, 2, 5), (2, 5, 6), transBatchA=1),
    "FusedMatMul, rows before two batch axes": product((4, 3, 2, 5), (3, 2, 5, 6), transBatchA=1),
    "FusedMatMul, rows of b before the batch": product((2, 4, 5), (5, 2, 6), transBatchB=1),
    "FusedMatMul, both of a": product((5, 2, 4), (2, 5, 6), transBatchA=1, transA=1),
    "FusedMatMul, both of b": product((2, 4, 5), (6, 2, 5), transBatchB=1, transB=1),
    "TransposeMatMul": Case("TransposeMatMul", [floats(2, 5, 4), floats(2, 5, 6)], {"transA": 1}),
    "FusedGemm": dense("Relu"),
    "FusedGemm alone": Case("FusedGemm", [floats(4, 5), floats(5, 6)], {"activation": "Tanh", "alpha": 0.5}),
    "FusedGemm leaky": dense("LeakyRelu", activation_alpha=0.2),
    "FusedGemm hard": dense("HardSigmoid", activation_alpha=0.3, activation_beta=0.4),
    "FusedGemm soft": dense("Softplus", beta=0.5),
    "FusedConv": image("Relu", pads=[1, 1, 1, 1], strides=[2, 2]),
    "FusedConv with a residual": image("Relu", residual=floats(2, 4, 4, 4)),
    "FusedConv clipped": image("Clip", activation_params=[-0.3, 0.4]),
    "FusedConv leaky": image("LeakyRelu", activation_params=[0.2], dilations=[2, 2]),
    "FusedConv hard": image("HardSigmoid", activation_params=[0.3, 0.4]),
    "SimplifiedLayerNormalization": Case(
        "SimplifiedLayerNormalization", [X, ROW], {"axis": -1, "epsilon": 1e-3}, domain=""
    ),
    "SimplifiedLayerNormalization of little": Case("SimplifiedLayerNormalization", [TINY, ROW], {}, (0, 1), domain=""),
    "SkipLayerNormalization": Case("SkipLayerNormalization", [X, X, ROW, ROW, ROW], {"epsilon": 1e-3}, (0, 3)),
    "SkipLayerNormalization alone": Case("SkipLayerNormalization", [X, X, ROW]),
    "SkipLayerNormalization of little": Case("SkipLayerNormalization", [TINY, TINY, ROW, ROW]),
    "SkipLayerNormalization, one skip for all": Case("SkipLayerNormalization", [X, floats(1, 3, 8), ROW, ROW]),
    "SkipLayerNormalization, a skip without batch": Case("SkipLayerNormalization", [X, floats(3, 8), ROW, ROW]),
    "SkipLayerNormalization of rows": Case("SkipLayerNormalization", [X[0], X[1], ROW, ROW], {}, (0, 3)),
    "SkipSimplifiedLayerNormalization": Case("SkipSimplifiedLayerNormalization", [X, X, ROW, ROW], {}, (0, 3)),
    "SkipSimplifiedLayerNormalization of little": Case("SkipSimplifiedLayerNormalization", [TINY, TINY, ROW]),
    "EmbedLayerNormalization": embedding(),
    "EmbedLayerNormalization with a mask": embedding(whole([1, 1, 1, 0], [1, 1, 0, 0])),
    "EmbedLayerNormalization counts ones": embedding(whole([0, 1, 0, 1], [2, 1, 0, 0])),
    "EmbedLayerNormalization with its sum": embedding(outputs=(0, 1, 2), epsilon=0.1),
    "EmbedLayerNormalization at positions": embedding(positions=whole([0, 2, 1, 1], [4, 5, 6, 0])),
    "EmbedLayerNormalization at one row's positions": embedding(positions=whole([0, 2, 1, 1])),
    "EmbedLayerNormalization without segments": Case(
        "EmbedLayerNormalization", [IDS, None, *TABLES[:2], None, *TABLES[3:]], {}, (0, 1)
    ),
    "QEmbedLayerNormalization": Case(
        "QEmbedLayerNormalization",
        [IDS, SEGMENTS, *BYTES, whole([1, 1, 1, 0], [1, 1, 0, 0]), *SCALES, *ZEROS],
        {},
        (0, 1),
    ),
    "RotaryEmbedding": rotated(floats(2, 5, 16), PLACES),
    "RotaryEmbedding from one place on": rotated(floats(2, 5, 16), START),
    "RotaryEmbedding of heads": rotated(floats(2, 2, 5, 8), PLACES),
    "RotaryEmbedding of heads from one place on": rotated(floats(2, 2, 5, 8), START),
    "RotaryEmbedding of neighbours": rotated(floats(2, 5, 16), PLACES, interleaved=1),
    "RotaryEmbedding with heads": rotated(floats(2, 5, 16), PLACES, num_heads=2),
    "RotaryEmbedding of a part": rotated(floats(2, 5, 16), PLACES, 4, rotary_embedding_dim=4, num_heads=2),
    "RotaryEmbedding of a part of heads": rotated(floats(2, 2, 5, 8), PLACES, 4, rotary_embedding_dim=4, num_heads=2),
    "MatMulIntegerToFloat": Case(
        "MatMulIntegerToFloat", [bytes_of(2, 4, 8), bytes_of(8, 6), torch.tensor(0.1), torch.tensor(0.2)]
    ),
    "MatMulIntegerToFloat by column": Case(
        "MatMulIntegerToFloat",
        [bytes_of(2, 4, 8), bytes_of(8, 6), torch.tensor(0.1), floats(6).abs(), bytes_of(1)[0], bytes_of(6), floats(6)],
    ),
    "DynamicQuantizeMatMul": Case("DynamicQuantizeMatMul", [floats(2, 4, 8), bytes_of(8, 6), torch.tensor(0.2)]),
    "DynamicQuantizeMatMul by column": Case(
        "DynamicQuantizeMatMul", [floats(2, 4, 8), bytes_of(8, 6), floats(6).abs(), bytes_of(6), floats(6)]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_onnx_runtime(name: str) -> None:
    expected, results = want(CASES[name]), got(CASES[name])
    assert len(results) == len(expected)
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == other.dtype
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale)


# --- what ONNX Runtime has no CPU kernel for ------------------------------------------------------------------------


def test_layers_of_sums_and_products() -> None:
    x, bias, skip = floats(2, 3, 8), floats(8), floats(2, 3, 8)
    (total,) = got(Case("BiasAdd", [x, bias, skip]))
    np.testing.assert_allclose(total, (x + bias + skip).numpy(), rtol=1e-6)
    (split,) = got(Case("BiasSplitGelu", [x, bias]))
    (gate,) = want(Case("Gelu", [(x + bias)[..., 4:]]))
    np.testing.assert_allclose(split, (x + bias)[..., :4].numpy() * gate, rtol=1e-5, atol=1e-6)
    weight = floats(8, 6)
    (fast,) = got(Case("GemmFastGelu", [x, weight, floats(6) * 0]))
    np.testing.assert_allclose(fast, want(Case("FastGelu", [x @ weight]))[0], rtol=1e-5, atol=1e-6)


def test_the_simplified_norm_of_either_domain_is_the_same() -> None:
    norm = Case("SimplifiedLayerNormalization", [X, ROW], {"axis": -1, "epsilon": 1e-3})
    np.testing.assert_allclose(got(norm)[0], want(replace(norm, domain=""))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("both", [True, False])
def test_relative_position_bias_is_t5s(both: bool) -> None:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(num_heads=3, d_model=12, d_kv=4, is_decoder=not both)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    with torch.no_grad():
        layer.relative_attention_bias.weight.copy_(floats(32, 3))
        expected = layer.compute_bias(200, 200)
        table = layer.relative_attention_bias.weight.t().reshape(32, 3)  # the file has it column by column
    sizes = torch.tensor(200), torch.tensor(200)
    attributes = {"max_distance": 128, "is_bidirectional": int(both)}
    (bias,) = got(Case("RelativePositionBias", [table.detach(), *sizes], attributes, constants=(0, 1, 2)))
    np.testing.assert_array_equal(bias, expected.numpy())


def test_gated_relative_position_bias() -> None:
    heads, tokens, size = 2, 5, 4
    query, bias, relative = floats(3, tokens, heads * size), floats(heads * size), floats(1, heads, tokens, tokens)
    weight, offset, constant = floats(size, 8), floats(8), floats(1, heads, 1, 1)
    inputs = [query, bias, relative, weight, offset, constant]
    (result,) = got(Case("GatedRelativePositionBias", inputs, {"num_heads": heads}))
    layer = (query + bias).reshape(3, tokens, heads, size).transpose(1, 2)
    sums = (layer @ weight + offset).view(3, heads, tokens, 2, 4).sum(-1)
    update, reset = torch.sigmoid(sums).chunk(2, -1)
    expected = (update * (reset * constant - 1.0) + 2.0) * relative
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_every_operation_of_the_domain_has_a_test() -> None:
    table.fill()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    missing = [name for domain, name in table.TABLE if domain == table.CONTRIB and f'"{name}"' not in tests]
    assert missing == []


def test_example_ids_are_in_the_tables_of_fused_embeddings() -> None:
    ids = torch.zeros(2, 16, dtype=torch.int32)
    tables = [floats(3, 8), floats(16, 8), floats(1, 8), floats(8), floats(8)]
    model = Case("EmbedLayerNormalization", [ids, ids, *tables], {}, (0, 1), range(2, 7)).model()
    words, segments = example_of(OnnxModule(from_proto(model, "m.onnx", Path())), "m.onnx").args
    assert (words.min(), words.max(), segments.max()) == (0, 2, 0)
