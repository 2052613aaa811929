"""Files of exporters that the tests do not install, in tests/data/onnx: the README there says what made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exporter_matrix import assert_close, by_name, run_file
from torch import Tensor

import tamis
from tamis.capture import capture

FILES = Path(__file__).resolve().parents[2] / "data" / "onnx"
BOTH = ("last_hidden_state", "pooler_output")


def tokens(batch: int, length: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Token ids and their mask; the last row is padded."""
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return ids.to(dtype), mask.to(dtype)


def tf_bert(batch: int) -> dict[str, Tensor]:
    return dict(zip(("input_ids", "attention_mask"), tokens(batch, 8 + batch, torch.int32), strict=True))


def bert(batch: int) -> dict[str, Tensor]:
    ids, mask = tokens(batch, 8 + batch)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 40).long()}


def vit(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))}


def llama(batch: int, past: int) -> dict[str, Tensor]:
    ids, _ = tokens(batch, 4)
    mask, positions = torch.ones(batch, past + 4, dtype=torch.int64), torch.arange(past, past + 4).expand(batch, 4)
    generator = torch.Generator().manual_seed(past)
    cache = {
        f"past_key_values.{layer}.{kind}": torch.randn(batch, 1, past, 16, generator=generator)
        for layer in (0, 1)
        for kind in ("key", "value")
    }
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}


@pytest.mark.parametrize(("name", "inputs"), [("tf2onnx-bert", tf_bert), ("optimum-bert", bert), ("optimum-vit", vit)])
def test_encoders_are_captured_and_reduced(name: str, inputs: object, tmp_path: Path) -> None:
    path = FILES / f"{name}.onnx"
    graph = capture(str(path))
    assert [site.role for site in graph.sites] == ["stream"] * 2
    assert {site.mask.kind for site in graph.sites} == {"full" if inputs is vit else "padding"}
    fast = tamis.compile(str(path), passes="tome:keep_ratio=0.8")
    assert all(row.tokens_out < row.tokens_in for row in fast.report.layers)
    fast.export(tmp_path / "fast.onnx")
    for batch in (1, 3):
        given = inputs(batch)  # type: ignore[operator]
        with torch.no_grad():
            assert_close(by_name(graph.program.module()(*given.values()), BOTH), run_file(path, given))
        assert_close(run_file(tmp_path / "fast.onnx", given), by_name(fast(**given), BOTH))


def test_a_decoder_is_captured_behind_its_cache() -> None:
    path = FILES / "optimum-llama.onnx"
    graph = capture(str(path))
    assert [(site.role, site.cached) for site in graph.sites] == [("stream", True)] * 2
    for batch, past in ((1, 0), (3, 1), (2, 6)):
        given = llama(batch, past)
        with torch.no_grad():
            assert_close(graph.program.module()(*given.values()), run_file(path, given))
