"""The table of whole prompts in docs/sparse.md is that of the JSON beside it."""

from __future__ import annotations

import json

import prompt_speed
from speed.table import fill

RESULTS = json.loads((prompt_speed.ROOT / "benchmarks" / "results" / "prompt_speed.json").read_text())


def test_the_page_shows_what_was_measured() -> None:
    page = prompt_speed.PAGE.read_text()
    assert fill(page, RESULTS, {"prompt_speed": prompt_speed.table}) == page


def test_a_pass_has_a_line_for_each_side() -> None:
    cells = {"compiled": [2.0, 1.5, 2.5], "transformers": [1.25, 1.0, 1.5]}
    measured = [{"pass": "a-shape", "break_even": 9, "rows": {"4096": cells}}]
    assert prompt_speed.table({"measured": measured, "date": "D", "machine": "M", "versions": "V"}).splitlines() == [
        "| pass | over | 4,096 tokens | break-even |",
        "|---|---|---|---|",
        "| `a-shape` | the compiled original | 2.00x (1.50 to 2.50) | 9 tokens |",
        "| `a-shape` | transformers | 1.25x (1.00 to 1.50) |  |",
        "",
        "D: M; V.",
    ]
