"""Files that ONNX Runtime's optimizers have been over, or its quantisers: captured, reduced, exported."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx_exports import ByName, folder
from torch import Tensor, nn

import tamis

WIDTH, HEADS, LAYERS = 32, 2, 2
MS = "com.microsoft"


class Layer(nn.Module):
    """A pre-norm layer with attention written out as the fusers look for it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (one.view(*one.shape[:2], HEADS, -1).permute(0, 2, 1, 3) for one in (self.q(y), self.k(y), self.v(y)))
        seen = (torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        y = torch.matmul(seen, v).permute(0, 2, 1, 3).contiguous()
        x = x + self.out(y.view(y.shape[0], y.shape[1], WIDTH))
        return x + self.down(F.gelu(self.up(self.between(x))))


class ViT(nn.Module):
    """A vision transformer for images of 32 pixels, with a norm after the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, WIDTH, 8, 8), nn.LayerNorm(WIDTH)
        self.first, self.places = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.layers, self.last = nn.ModuleList(Layer() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = self.norm(torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x)[:, 0])


@contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters and ONNX Runtime's tools have to say."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# --- the files ------------------------------------------------------------------------------------------------------


SMALL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
WORDS = {"vocab_size": 99, "max_position_embeddings": 64}
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": 99}
TEXT, IMAGE = ("input_ids", "attention_mask"), ("pixel_values",)
MODELS: dict[str, tuple[str, tuple[str, ...], dict[str, int]]] = {  # class of transformers, inputs, configuration
    "bert": ("BertModel", TEXT, {**SMALL, **WORDS}),
    "roberta": ("RobertaModel", TEXT, {**SMALL, **WORDS, "pad_token_id": 1}),
    "t5": ("T5EncoderModel", TEXT, T5),
    "clip": ("CLIPVisionModel", IMAGE, {**SMALL, "image_size": 32, "patch_size": 8}),
    "vit": ("", IMAGE, {}),
}


def model_of(name: str) -> nn.Module:
    """A model with attention written out, and random weights."""
    kind, inputs, options = MODELS[name]
    model: nn.Module = ViT()
    if kind:
        import transformers

        config = getattr(transformers, kind.replace("EncoderModel", "Model").replace("Model", "Config"))
        made = getattr(transformers, kind)(config(**options, attn_implementation="eager"))
        model = ByName(made, inputs, ("last_hidden_state",))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (0.5 if weight.ndim == 1 else 0))
    return model.eval()


@functools.cache
def source(name: str) -> Path:
    """The file before, by the TorchScript exporter."""
    path = folder() / f"{name}-written-out.onnx"
    inputs = MODELS[name][1]
    axes = {0: "batch", 1: "sequence"} if inputs == TEXT else {0: "batch"}
    with quietly():
        torch.onnx.export(
            model_of(name),
            tuple(inputs_of(name, 2, 9).values()),
            path,
            dynamo=False,
            opset_version=17,
            input_names=list(inputs),
            output_names=["result"],
            dynamic_axes={**dict.fromkeys(inputs, axes), "result": axes},
        )
    return path


def inputs_of(name: str, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs by name; of text, the last row is padded."""
    generator = torch.Generator().manual_seed(batch)
    if MODELS[name][1] == IMAGE:
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 3 :] = 0
    return {"input_ids": torch.randint(3, 90, (batch, length), generator=generator), "attention_mask": mask}


def fused(name: str, kind: str, path: Path, **options: bool) -> None:
    """The transformer optimizer, with some of its `FusionOptions` set."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    given = FusionOptions(kind)
    given.use_raw_attention_mask(options.pop("raw_mask", False))
    for option, value in options.items():
        assert hasattr(given, option)
        setattr(given, option, value)
    made = optimize_model(
        str(source(name)), model_type=kind, num_heads=HEADS, hidden_size=WIDTH, optimization_options=given, opt_level=0
    )
    made.save_model_to_file(str(path))


def extended(name: str, path: Path) -> None:
    """What a session of ONNX Runtime saves as the optimized model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(source(name), options, providers=["CPUExecutionProvider"])


def quantised(name: str, path: Path) -> None:
    """Fused, then `quantize_dynamic`."""
    from onnxruntime.quantization import quantize_dynamic

    before = path.with_suffix(".float.onnx")
    fused(name, "bert", before)
    quantize_dynamic(before, path, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})


def few_bits(name: str, path: Path, bits: int) -> None:
    """Fused, then the products made MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    before = path.with_suffix(".float.onnx")
    fused(name, "bert", before)
    quantizer = MatMulNBitsQuantizer(onnx.load(before), block_size=16, is_symmetric=False, bits=bits)
    quantizer.process()
    onnx.save(quantizer.model.model, path)


Maker = Callable[[str, Path], None]
BERT = {"SkipLayerNormalization": 4, "BiasGelu": 2}
CASES: dict[str, tuple[str, Maker, dict[str, int]]] = {  # model, what is done to it, and what must be in the file then
    "bert": ("bert", functools.partial(fused, kind="bert"), BERT | {"EmbedLayerNormalization": 1, "Attention": 2}),
    "bert, mask [B, N]": ("bert", functools.partial(fused, kind="bert", raw_mask=True), BERT | {"Attention": 2}),
    "bert, heads apart": (
        "bert", functools.partial(fused, kind="bert", use_multi_head_attention=True), BERT | {"MultiHeadAttention": 2},
    ),
    "bert, fast GELU": ("bert", functools.partial(fused, kind="bert", enable_gelu_approximation=True), {"FastGelu": 2}),
    "bert, integers": ("bert", quantised, {"QAttention": 2}),
    "bert, 4 bits": ("bert", functools.partial(few_bits, bits=4), {"MatMulNBits": 6, "Attention": 2}),
    "bert, 8 bits": ("bert", functools.partial(few_bits, bits=8), {"MatMulNBits": 6, "Attention": 2}),
    "bert, by a session": ("bert", extended, {"FusedMatMul": 2, "BiasGelu": 2}),
    "roberta": ("roberta", functools.partial(fused, kind="bert"), BERT | {"Attention": 2}),
    "vit": ("vit", functools.partial(fused, kind="vit"), BERT | {"Attention": 2}),
    "vit, heads apart": (
        "vit", functools.partial(fused, kind="vit", use_multi_head_attention=True), {"MultiHeadAttention": 2},
    ),
    "vit, by a session": ("vit", extended, {"BiasGelu": 2}),
    "clip": ("clip", functools.partial(fused, kind="clip"), {"Attention": 2, "QuickGelu": 2}),
    "t5": ("t5", functools.partial(fused, kind="t5"), {"SkipSimplifiedLayerNormalization": 4}),
}  # fmt: skip
MAIN = ("bert", "bert, heads apart", "bert, integers", "bert, 4 bits", "vit", "clip")
NAMES = [pytest.param(name, marks=() if name in MAIN else pytest.mark.full) for name in CASES]


@functools.cache
def made(name: str) -> Path:
    """The file of a case, which has the nodes that it is about."""
    model, maker, expected = CASES[name]
    path = folder() / f"ort-{list(CASES).index(name)}.onnx"
    with quietly():
        maker(model, path=path)
    found = Counter(node.op_type for node in onnx.load(path).graph.node if node.domain == MS)
    assert {op: found[op] for op in expected} == expected
    return path


@functools.cache
def reduced(name: str) -> Any:
    """The file with tokens merged; `original` is the graph before."""
    return tamis.compile(str(made(name)), passes="tome:r=2", verify=False)


def run(path: Path, feeds: dict[str, Tensor]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {one.name: feeds[one.name].numpy() for one in session.get_inputs()})


def flat(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


# --- what holds for them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_captured_file_agrees_and_its_layers_are_sites(name: str) -> None:
    graph = reduced(name).original
    assert [site.role for site in graph.sites] == ["stream"] * LAYERS
    padded = "pixel_values" not in inputs_of(CASES[name][0], 1, 9)
    assert [site.mask.padded for site in graph.sites] == [padded] * LAYERS
    for batch, length in ((3, 11), (1, 9)):
        feeds = inputs_of(CASES[name][0], batch, length)
        with torch.no_grad():
            results = flat(graph.program.module()(*feeds.values()))
        for one, other in zip(results, run(made(name), feeds), strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_merging_leaves_a_file_that_agrees_with_torch(name: str, tmp_path: Path) -> None:
    fast = reduced(name)
    fast.export(tmp_path / "out.onnx")
    for batch, length in ((3, 11), (1, 9)):
        feeds = inputs_of(CASES[name][0], batch, length)
        with torch.no_grad():
            results = [one.numpy() for one in flat(fast(**feeds))]
        before = run(made(name), feeds)
        for one, other, dense in zip(results, run(tmp_path / "out.onnx", feeds), before, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
            assert np.abs(one - dense).max() > 1e-4  # tokens were merged
