"""The table of memory in docs/sparse.md is that of the JSON beside it, and says what the page says."""

from __future__ import annotations

import json
from itertools import pairwise

import sparse_memory
from speed.table import fill

RESULTS = json.loads((sparse_memory.ROOT / "benchmarks" / "results" / "sparse_memory.json").read_text())


def test_the_page_shows_what_was_measured() -> None:
    page = sparse_memory.PAGE.read_text()
    assert fill(page, RESULTS, {"sparse_memory": sparse_memory.table}) == page


def test_memory_of_sparse_prompts_grows_with_their_length() -> None:
    """By less than a fifth more than the length, at every doubling; written-out attention by its square."""
    for way, peaks in RESULTS["peaks"].items():
        found = list(peaks.values())
        growth = [after / before for before, after in pairwise(found)]
        assert [*map(int, peaks)] == [2048, 4096, 8192, 16384]
        assert min(growth) > 3.5 if way == "eager" else max(growth) < 2.4, way
