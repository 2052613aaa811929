"""Small decoders in ONNX Runtime's spelling: what `convert_to_onnx` makes of GPT-2, and the model builder of Llama."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"
LAYERS, WIDTH, HEADS, GROUPS, SIZE, WORDS = 2, 64, 4, 2, 16, 50


class Writer:
    """Nodes and random weights of a graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.generator = torch.Generator().manual_seed(1)

    def add(self, op: str, inputs: list[str], outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        """A node; names of its results."""
        name = f"node_{len(self.nodes)}"
        results = [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, results, name=name, domain=domain, **attributes))
        return results

    def one(self, op: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        """The only result of a node."""
        return self.add(op, inputs, 1, domain, **attributes)[0]

    def weight(self, *shape: int, about: float = 0.0) -> str:
        """A random weight."""
        drawn = torch.randn(shape, generator=self.generator) * (0.1 if about else 0.2) + about
        return self.constant(drawn.numpy())

    def constant(self, value: Any) -> str:
        """A tensor of the file."""
        name = f"weights.{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: dict[str, str]) -> onnx.ModelProto:
        """The model; its outputs are float and of unknown sizes."""
        for name, result in outputs.items():
            self.nodes.append(helper.make_node("Identity", [result], [name]))
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "decoder", inputs, infos, initializer=self.weights)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MS, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def llama() -> onnx.ModelProto:
    """GroupQueryAttention with rotation and a cache, root-mean-square norms fused with residual sums."""
    w = Writer()
    mask_sum = w.one("ReduceSum", ["attention_mask", w.constant(np.array([1]))], keepdims=0)
    lengths = w.one("Cast", [w.one("Sub", [mask_sum, w.constant(np.array(1))])], to=TensorProto.INT32)
    total = w.one("Gather", [w.one("Shape", ["attention_mask"]), w.constant(np.array(1))])
    total = w.one("Cast", [total], to=TensorProto.INT32)
    angles = torch.arange(64.0).unsqueeze(1) * 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    turns = [w.constant(angles.cos().numpy()), w.constant(angles.sin().numpy())]
    stream = w.one("Gather", [w.weight(WORDS, WIDTH), "input_ids"])
    normed = w.one("SimplifiedLayerNormalization", [stream, w.weight(WIDTH, about=1.0)], axis=-1, epsilon=1e-6)
    outputs: dict[str, str] = {}
    for layer in range(LAYERS):
        q, k, v = (w.one("MatMul", [normed, w.weight(WIDTH, n * SIZE)]) for n in (HEADS, GROUPS, GROUPS))
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        attended, *present = w.add(
            "GroupQueryAttention", [q, k, v, *past, lengths, total, *turns], 3, MS,
            num_heads=HEADS, kv_num_heads=GROUPS, do_rotary=1,
        )  # fmt: skip
        outputs |= {f"present.{layer}.{part}": name for part, name in zip(("key", "value"), present, strict=True)}
        added = w.one("MatMul", [attended, w.weight(HEADS * SIZE, WIDTH)])
        normed, _, _, stream = skip(w, "SkipSimplifiedLayerNormalization", stream, added)
        gate, up = (w.one("MatMul", [normed, w.weight(WIDTH, WIDTH)]) for _ in range(2))
        gated = w.one("Mul", [w.one("Mul", [gate, w.one("Sigmoid", [gate])]), up])
        normed, _, _, stream = skip(
            w, "SkipSimplifiedLayerNormalization", stream, w.one("MatMul", [gated, w.weight(WIDTH, WIDTH)])
        )
    logits = w.one("MatMul", [normed, w.weight(WIDTH, WORDS)])
    cache = ["batch_size", GROUPS, "past_sequence_length", SIZE]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        *(helper.make_tensor_value_info(f"past_key_values.{i}.{p}", TensorProto.FLOAT, cache)
          for i in range(LAYERS) for p in ("key", "value")),
    ]  # fmt: skip
    return w.model(inputs, {"logits": logits, **outputs})


def gpt2() -> onnx.ModelProto:
    """Attention with the projections in it, causal, with keys and values of earlier tokens in one tensor per layer."""
    w = Writer()
    words = w.one("Gather", [w.weight(WORDS, WIDTH), "input_ids"])
    stream = w.one("Add", [words, w.one("Gather", [w.weight(64, WIDTH), "position_ids"])])
    mask = w.one("Cast", ["attention_mask"], to=TensorProto.INT32)
    scale, shift = w.weight(WIDTH, about=1.0), w.weight(WIDTH)
    normed = w.one("LayerNormalization", [stream, scale, shift], axis=-1, epsilon=1e-5)
    outputs: dict[str, str] = {}
    for layer in range(LAYERS):
        projection = [w.weight(WIDTH, 3 * WIDTH), w.weight(3 * WIDTH)]
        attended, outputs[f"present_{layer}"] = w.add(
            "Attention", [normed, *projection, mask, f"past_{layer}"], 2, MS, num_heads=HEADS, unidirectional=1
        )
        added = w.one("MatMul", [attended, w.weight(WIDTH, WIDTH)])
        normed, _, _, stream = skip(w, "SkipLayerNormalization", stream, added)
        wide = w.one("FastGelu", [w.one("MatMul", [normed, w.weight(WIDTH, WIDTH)]), w.weight(WIDTH)], MS)
        normed, _, _, stream = skip(
            w, "SkipLayerNormalization", stream, w.one("MatMul", [wide, w.weight(WIDTH, WIDTH)])
        )
    logits = w.one("MatMul", [normed, w.weight(WIDTH, WORDS)])
    integers = {
        "input_ids": ["batch_size", "seq_len"],
        "position_ids": ["batch_size", "seq_len"],
        "attention_mask": ["batch_size", "total_seq_len"],
    }
    past = [2, "batch_size", HEADS, "past_seq_len", SIZE]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name, dims in integers.items()]
    inputs += [helper.make_tensor_value_info(f"past_{i}", TensorProto.FLOAT, past) for i in range(LAYERS)]
    return w.model(inputs, {"logits": logits, **outputs})


def skip(w: Writer, op: str, stream: str, added: str) -> list[str]:
    """The norm of a residual sum, and as the last result the sum."""
    weights = [w.weight(WIDTH, about=1.0)]
    if op == "SkipLayerNormalization":
        weights += [w.weight(WIDTH), w.weight(WIDTH)]
    return w.add(op, [stream, added, *weights], 4, MS, epsilon=1e-5)
