"""Decoders with sparse attention as files with ONNX Runtime's own operators."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from decoders import captured, prompt
from torch.export import ExportedProgram

from tamis.lowering.onnx import export_onnx
from tamis.lowering.onnx_check import check_onnx
from tamis.lowering.onnx_contrib import contrib_forms
from tamis.rewrite import Pipeline
from tamis.runtime.verify import real_tokens_of

SIZES = [(1, 1, None), (3, 40, "mixed"), (4, 77, "left")]


def program(decoder: str, passes: str) -> ExportedProgram:
    _, graph = captured(decoder)
    return Pipeline.parse(passes).run(graph).graph.program


def domains(path: Path) -> set[str]:
    return {one.domain for one in onnx.load(path).opset_import}


@pytest.mark.parametrize(
    ("passes", "forms", "inline"),
    [
        (
            "a-shape:sink=0,local=9,layers=0+x-attention:block=16,layers=1",
            ["CausalAttention", "ListedAttention"],
            False,
        ),
        *(
            pytest.param(*values, marks=pytest.mark.full)
            for values in (
                ("a-shape:sink=0,local=9,layers=0", ["CausalAttention", "MaskedAttention"], True),
                ("block-sparse:density=0.3,block=8,share=kv", ["ListedAttention"] * 2, False),
                ("tri-shape:sink=2,local=5,last=4", ["ListedAndNearAttention"] * 2, False),
            )
        ),
    ],
)
def test_files_compute_what_torch_does(passes: str, forms: list[str], inline: bool, tmp_path: Path) -> None:
    made = program("qwen3", passes)
    assert [one.function for one in contrib_forms(made)] == forms
    path = export_onnx(made, tmp_path / "own.onnx", contrib=True, inline=inline)
    model = onnx.load(path)
    assert domains(path) == ({"", "com.microsoft"} if inline else {"", "com.microsoft", "tamis"})
    assert {one.name for one in model.functions}.issuperset(forms) is not inline
    nodes = [node for graph in (model.graph, *model.functions) for node in graph.node]
    assert any(node.op_type == "GroupQueryAttention" for node in nodes)
    inputs = [((), prompt(*size)) for size in SIZES]  # the export left no guard against the shortest
    assert check_onnx(path, made.module(), inputs, compared=real_tokens_of(made)) < 1e-5


@pytest.mark.full
def test_what_has_no_form_stays_standard(tmp_path: Path) -> None:
    made = program("llama", "a-shape:sink=0,local=9,layers=1")
    assert [form.function for form in contrib_forms(made)] == ["", ""]
    assert domains(export_onnx(made, tmp_path / "own.onnx", contrib=True)) == {"", "tamis"}
