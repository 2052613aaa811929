"""The table of all methods: what it renders, that cells are kept one by one, and that the page holds the results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import accuracy
import pytest
import vision_page
import vision_table
from published import PUBLISHED
from reductions import methods

MOVED = {"relative_l2": 0.1, "cosine": 0.99}
DRIFT = {"pass": "tome:keep_ratio=0.9", "flops": 0.597, "moved": MOVED, "control": {"relative_l2": 0.2, "cosine": 0.98}}
RUN = {"date": "2026-01-01", "commit": "0123456789", "machine": "x86_64", "versions": {"torch": "2.15"}}


def scored(method: str, mean: float, gain: float) -> dict[str, object]:
    """A row of the accuracy results at 60% of the FLOPs."""
    score = {"accuracy": {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}}
    control = {"accuracy": {"mean": mean - gain, "low": mean - gain, "high": mean - gain}}
    row = {"method": method, "level": "60% of the FLOPs", "scores": score, "control": control, "flops": 0.61}
    return {**row, "difference": {"mean": gain, "error": 0.01}}


def test_a_row_says_what_was_measured_what_was_not_and_what_loses() -> None:
    digits = {
        "dense": {"accuracy": {"mean": 0.975}},
        "rows": [scored("evit", 0.5, -0.1), scored("tome", 0.9, 0.1), {"method": "ats", "refused": "no\nclass token"}],
    }
    speed = {"speedup": 0.9, "low": 0.8, "high": 1.0}
    cells = {"tome/60/drift": DRIFT, "tome/60/eager": speed, "pool/60/drift": {"refused": "no grid"}}
    lines = vision_page.table(60, cells, digits).splitlines()
    assert lines[2:] == [
        "| dense | 100% | 97.5 |  |  | 100% | 0 |  | 1 | 1 | 1 |",
        "| `tome` | 61% | 90.0 (89.0 to 91.0) | 80.0 (80.0 to 80.0) | better | `tome:keep_ratio=0.9`, 60% "
        "| 0.100, cosine 0.990 | 0.200, cosine 0.980 | 0.90x (0.80 to 1.00) **slower** | not measured | not measured |",
        "| `evit` | 61% | 50.0 (49.0 to 51.0) | 60.0 (60.0 to 60.0) | **loses to the control** "
        "| not measured |  |  |  |  |  |",
        "| `ats` | refused: no class token |  |  |  | not measured |  |  |  |  |  |",
        "| `pool` | not measured |  |  |  | refused: no grid |  |  |  |  |  |",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_other_levels_do_not_get_in() -> None:
    digits = {"dense": {"accuracy": {"mean": 1.0}}, "rows": [scored("tome", 0.9, 0.1)]}
    assert "`tome`" not in vision_page.table(80, {"pool/60/drift": DRIFT}, digits)
    assert "not measured" in vision_page.table(80, {"pool/60/drift": DRIFT}, digits).splitlines()[-1]


def test_every_method_has_its_published_figures() -> None:
    assert PUBLISHED.keys() >= {cls.name for cls in methods()}


def test_a_cell_is_kept_as_soon_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_table, "RESULT", tmp_path / "vision.json")
    options = argparse.Namespace(seconds=4.0, rounds=3)
    assert vision_table.cells() == {}
    for name in ("tome/60/eager", "evit/60/drift"):
        vision_table.keep(name, {"speedup": 1.5}, options)
    found = json.loads((tmp_path / "vision.json").read_text())
    assert list(found) == ["evit/60/drift", "tome/60/eager"]
    run = found["tome/60/eager"]["run"]
    assert run["command"].endswith("--methods tome --what eager --levels 60 --seconds 4 --rounds 3")
    assert {"commit", "date", "machine"} <= run.keys()
    assert set(run["versions"]) == {"python", *vision_table.PACKAGES}


def test_the_page_says_what_was_measured() -> None:
    page, found = vision_table.PAGE.read_text(), accuracy.results()
    assert vision_page.rendered(page, vision_table.cells(), found) == page
    assert vision_page.source({"a": {"run": RUN}}) in vision_page.rendered(page, {"a/60/eager": {"run": RUN}}, found)
