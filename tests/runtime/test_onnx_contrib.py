"""What the report says of files with ONNX Runtime's own operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from decoders import captured

from tamis.rewrite import Pipeline
from tamis.runtime.package import contrib_notes


def notes(decoder: str, passes: str, **changes: Any) -> list[str]:
    _, graph = captured(decoder)
    result = Pipeline.parse(passes).run(graph).graph
    return contrib_notes(SimpleNamespace(**{"original": graph, "graph": result, **changes}))


def test_layers_and_the_forms_they_have() -> None:
    assert notes("llama", "block-sparse:block=8,layers=1") == [
        "the ONNX file has standard operators: GroupQueryAttention takes head sizes that are multiples of 8, and this "
        "is 12 (layer 0, layer 1)"
    ]
    mixed = "block-sparse:block=8,layers=0+a-shape:sink=0,local=4,layers=1"
    assert notes("qwen3", mixed) == [
        "the ONNX file has ListedAttention (layer 0)",
        "the ONNX file has CausalAttention (layer 1)",
    ]
    (first, _) = notes("qwen3", mixed, original=None)
    assert first == "the ONNX file has ListedAttention (block_sparse_attention)"
