"""Results of `token_reduction.py` as tables of the documentation, between `<!-- speed: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Table = Callable[[dict[str, Any]], str]

GOALS = {1: 0.90, 8: 0.97}  # of the FLOP ideal, by batch
NODES_GOAL = 1.5
NAMES = {"eager": "eager", "inductor": "Inductor", "onnxruntime": "ONNX Runtime"}


def render(results: dict[str, Any], name: str) -> str:
    """The table called `name`: full, nodes or short."""
    return TABLES[name](results)


def full(results: dict[str, Any]) -> str:
    """A row for everything measured, then when and on what."""
    head = ["model", "batch", "back end", "dense, ms", "speed-up", "FLOP ideal", "of ideal", "goal"]
    lines = [_line(*head, "slice, of ideal", "of slice"), "|---" * 10 + "|"]
    for row in results["rows"]:
        goal = GOALS.get(row["batch"])
        verdict = "" if goal is None else f"{goal:.2f} {'met' if round(row['of_ideal'], 2) >= goal else 'missed'}"
        cells = [
            f"{row['model']} `{row['recipe']}`",
            row["batch"],
            NAMES[row["backend"]],
            f"{row['dense_ms']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['flop_ideal']:.2f}x",
            f"{row['of_ideal']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            verdict,
            f"{row['slice_of_ideal']:.2f}",
            f"{row['of_slice']:.2f}",
        ]
        lines.append(_line(*cells))
    measured = sorted(
        {f"{row['date']}: {row['machine']}; {row['versions']}." for row in results["rows"] if "date" in row}
    )
    return "\n".join([*lines, *(["", *measured] if measured else [])])


def nodes(results: dict[str, Any]) -> str:
    """Node counts of the exported files, and what of the dense file's they are."""
    lines = [_line("model", "dense", "main graph", "with functions once", "inlined"), "|---" * 5 + "|"]
    for model, counts in results["nodes"].items():
        dense = counts["dense"]["graph"]
        kinds = [counts["reduced"]["graph"], counts["reduced"]["stored"], counts["inlined"]["graph"]]
        cells = [f"{count} ({count / dense:.2f}x)" for count in kinds]
        lines.append(_line(model, dense, *cells))
    return "\n".join(lines)


def short(results: dict[str, Any]) -> str:
    """Part of the FLOP ideal by back end, a line per model and batch."""
    columns = [name for name in NAMES if any(row["backend"] == name for row in results["rows"])]
    lines = [_line("model", "batch", "ideal", *(NAMES[name] for name in columns)), "|---" * (3 + len(columns)) + "|"]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in results["rows"]:
        found.setdefault((row["model"], row["batch"]), {})[row["backend"]] = row
    for (model, batch), by_backend in found.items():
        first = next(iter(by_backend.values()))
        cells = [
            f"{by_backend[name]['speedup']:.2f}x ({by_backend[name]['of_ideal']:.2f})" if name in by_backend else ""
            for name in columns
        ]
        lines.append(_line(f"{model} `{first['recipe']}`", batch, f"{first['flop_ideal']:.2f}x", *cells))
    return "\n".join(lines)


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


TABLES: dict[str, Table] = {"full": full, "nodes": nodes, "short": short}


def fill(page: str, results: dict[str, Any], tables: Mapping[str, Table] = TABLES) -> str:
    """The page with every one of the tables between its markers rendered anew; other tables stay.

    Raises:
        ValueError: a marker without its end, or none of the tables at all.
    """
    pattern = re.compile(r"(<!-- speed: (\w+) -->\n)((?:(?!<!-- ).)*)(<!-- end -->)", re.DOTALL)
    names = {match[2] for match in pattern.finditer(page)}
    if page.count("<!-- speed: ") != len(pattern.findall(page)) or not names & tables.keys():
        raise ValueError("every <!-- speed: NAME --> needs its <!-- end -->, and a page one of them")

    def rendered(match: re.Match[str]) -> str:
        return f"{tables[match[2]](results)}\n" if match[2] in tables else match[3]

    return pattern.sub(lambda match: f"{match[1]}{rendered(match)}{match[4]}", page)
