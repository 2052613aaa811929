"""The tables of measured speed: what they render, and that the pages hold what the results file says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import token_reduction
from speed.table import fill, render

ROOT = Path(__file__).resolve().parents[2]


def measured(speedup: float, batch: int = 8, backend: str = "eager", model: str = "vit_small_224") -> dict[str, object]:
    """A row as the script writes it."""
    shares = {"of_ideal": speedup / 2, "low": 0.5, "high": 1.0, "slice_of_ideal": 0.99, "of_slice": 0.95}
    what = {"model": model, "recipe": "tome", "backend": backend, "batch": batch}
    return {**what, **shares, "dense_ms": 100.4, "speedup": speedup, "flop_ideal": 2.0}


def test_a_row_says_whether_its_goal_is_met() -> None:
    lines = render({"rows": [measured(1.94), measured(1.92), measured(1.5, batch=3)]}, "full").splitlines()
    assert lines[2:] == [
        "| vit_small_224 `tome` | 8 | eager | 100 | 1.94x | 2.00x | 0.97 (0.50 to 1.00) | 0.97 met | 0.99 | 0.95 |",
        "| vit_small_224 `tome` | 8 | eager | 100 | 1.92x | 2.00x | 0.96 (0.50 to 1.00) | 0.97 missed | 0.99 | 0.95 |",
        "| vit_small_224 `tome` | 3 | eager | 100 | 1.50x | 2.00x | 0.75 (0.50 to 1.00) |  | 0.99 | 0.95 |",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_the_short_table_has_a_column_for_each_back_end_measured() -> None:
    rows = [measured(1.9), measured(1.8, backend="onnxruntime"), measured(1.7, batch=1)]
    assert render({"rows": rows}, "short").splitlines() == [
        "| model | batch | ideal | eager | ONNX Runtime |",
        "|---|---|---|---|---|",
        "| vit_small_224 `tome` | 8 | 2.00x | 1.90x (0.95) | 1.80x (0.90) |",
        "| vit_small_224 `tome` | 1 | 2.00x | 1.70x (0.85) |  |",
    ]


def test_node_counts_are_over_the_dense_file() -> None:
    counts = {"dense": {"graph": 100}, "reduced": {"graph": 90, "stored": 150}, "inlined": {"graph": 210}}
    line = render({"nodes": {"m": counts}}, "nodes").splitlines()[-1]
    assert line == "| m | 100 | 90 (0.90x) | 150 (1.50x) | 210 (2.10x) |"


def test_only_what_is_between_the_markers_changes() -> None:
    page = "a\n<!-- speed: short -->\nold\n<!-- end -->\nb\n"
    filled = fill(page, {"rows": [measured(1.9)]})
    assert filled.startswith("a\n<!-- speed: short -->\n| model |")
    assert filled.endswith("(0.95) |\n<!-- end -->\nb\n")
    assert fill(filled, {"rows": [measured(1.9)]}) == filled
    two = fill("<!-- speed: short -->\n<!-- end -->\nbetween\n<!-- speed: full -->\n<!-- end -->", {"rows": []})
    assert "between" in two
    for broken in ("no marker", "<!-- speed: short -->\nno end"):
        with pytest.raises(ValueError, match="end"):
            fill(broken, {"rows": []})


def test_new_rows_take_the_place_of_old_ones_in_a_fixed_order() -> None:
    options = argparse.Namespace(models=["m"], backends=["eager"], batches=[8], seconds=1.0, rounds=3, processes=2)
    before = {"rows": [measured(1.0), measured(1.1, batch=1)], "nodes": {"m": {"dense": 1}}}
    now = {"rows": [measured(1.2), measured(1.3, backend="onnxruntime")], "nodes": {"n": {"dense": 2}}}
    after = token_reduction.merged(now, before, options)
    found = [(row["batch"], row["backend"], row["speedup"]) for row in after["rows"]]
    assert found == [(1, "eager", 1.1), (8, "eager", 1.2), (8, "onnxruntime", 1.3)]
    assert after["nodes"] == {"m": {"dense": 1}, "n": {"dense": 2}}
    assert after["rows"][1]["command"].endswith("--batches 8 --seconds 1 --rounds 3 --processes 2")


def test_a_row_takes_medians_over_rounds_then_processes() -> None:
    def run(dense: list[float], reduced: list[float]) -> dict[str, object]:
        times = {"dense": dense, "reduced": reduced, "slice": [one / 2 for one in dense]}
        return {"batch": 1, "flop_ideal": 2.0, "difference": 1e-6, "times": times}

    row = token_reduction.row("vit_small_224", "eager", [run([2, 4, 6], [2, 2, 2]), run([3, 3, 3], [1, 2, 1])])
    assert row["speedup"] == 2.5  # of 2 and 3
    assert row["of_ideal"] == 1.25
    assert row["slice_of_ideal"] == 1.0
    assert row["of_slice"] == 1.25
    assert (row["low"], row["high"]) == (0.5, 1.5)
    assert row["rounds"] == [3, 3]


def test_the_slice_oracle_has_the_counts_of_the_reduced_model() -> None:
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    from speed.variants import SliceOracle

    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=64).eval()
    seen: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = SliceOracle(model, [14, 11])(x)
        got = SliceOracle(model, [1, 1])(x, torch.empty(14, 0), torch.empty(11, 0))
        whole = SliceOracle(model, [17, 17])(x)
    assert seen == [14, 11, 14, 11, 17, 17]
    assert torch.equal(got, expected)
    torch.testing.assert_close(whole, model(x))


@pytest.mark.parametrize("page", token_reduction.PAGES)
def test_pages_hold_what_was_measured(page: str) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "token_reduction.json").read_text())
    text = (ROOT / page).read_text()
    assert fill(text, results) == text
