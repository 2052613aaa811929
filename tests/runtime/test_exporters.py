"""Files of common exporters: captured, reduced and written, with ONNX Runtime's numbers; docs/exporters.md says so."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from exporter_matrix import NOT_VALID, REFUSED, cell
from exporters_page import PAGE, render, shown
from onnx_exports import EXPORTERS, exported
from onnx_models import MODELS

import tamis
from tamis.errors import NothingChanged

SAMPLE = {
    ("bert_v4", "optimized"),
    ("t5", "torchscript13"),
    ("dinov2", "torchscript11"),
    ("vit", "converted"),
    ("llama_past", "torchscript"),
}
CELLS = [
    pytest.param(name, exporter, marks=() if (name, exporter) in SAMPLE else pytest.mark.full)
    for name in MODELS
    for exporter in EXPORTERS
]


@pytest.mark.parametrize(("name", "exporter"), CELLS)
def test_the_exporter_matrix(tmp_path: Path, name: str, exporter: str) -> None:
    """See `cell`; the page says what came of it."""
    assert cell(name, exporter, tmp_path) == shown(PAGE.read_text())[name, exporter], "python tests/exporters_page.py"


def test_the_page_has_every_cell() -> None:
    page = PAGE.read_text()
    cells = shown(page)
    assert render(page, lambda name, exporter: cells[name, exporter]) == page
    assert [key for key, text in cells.items() if text == NOT_VALID] == [("t5", "torchscript11")]
    assert [key for key, text in cells.items() if REFUSED in text] == [("t5", "half")]


def test_the_optimizer_fuses_attention_as_transformers_4_wrote_it() -> None:
    """Of what later versions write it fuses norms alone; without this the column would hold no fused attention."""
    kinds = [node.op_type for node in onnx.load(exported("bert_v4", "optimized")).graph.node]
    assert kinds.count("Attention") == 2
    assert "EmbedLayerNormalization" in kinds


def test_tokens_behind_a_cache_are_not_reduced() -> None:
    with pytest.raises(NothingChanged, match="attention continues a key-value cache"):
        tamis.compile(str(exported("llama_past", "torchscript")), passes="tome:r=2")
