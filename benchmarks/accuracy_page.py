"""The generated parts of docs/accuracy.md: two tables, and one line each on how they came about."""

from __future__ import annotations

import re
from typing import Any

from accuracy import verdict

MEASURES = {"accuracy": "accuracy", "mrr": "MRR", "first": "right one first", "same_ten": "same ten first"}


def rendered(page: str, found: dict[str, Any]) -> str:
    """The page with the text between `<!-- NAME: generated -->` and `<!-- end -->` made from the results."""
    for name, result in found.items():
        block = f"<!-- {name}: generated -->\n\n{_source(result)}\n\n{table(result)}\n\n<!-- end -->"
        page = re.sub(rf"<!-- {name}: generated -->.*?<!-- end -->", lambda _, text=block: text, page, flags=re.DOTALL)
    return page


def table(result: dict[str, Any]) -> str:
    """One row per method and level, in Markdown."""
    measures = list(result["dense"])
    headings = ["level", "pass", "tokens after each layer", "FLOPs", *(MEASURES[name] for name in measures)]
    headings += [f"{MEASURES[measures[0]]} of the control", "difference", "against the control"]
    dense = ["", "dense", "", "100%", *(_score(result["dense"][name]) for name in measures), "", "", ""]
    rows = [headings, ["---"] * len(headings), dense]
    for row in sorted(result["rows"], key=_place):
        rows.append(_refused(row, len(headings)) if "refused" in row else _cells(row, measures))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _place(row: dict[str, Any]) -> tuple[bool, bool, float]:
    """Keep ratios first, then FLOPs, falling; refusals last."""
    level = row.get("level", "")
    amount = float(re.search(r"[\d.]+", level).group()) if level else 0.0  # type: ignore[union-attr]
    return not level, "FLOPs" in level, -amount


def _cells(row: dict[str, Any], measures: list[str]) -> list[str]:
    control, difference = row.get("control"), row.get("difference")
    name = measures[0]
    return [
        row["level"],
        f"`{row['pass']}`",
        " ".join(map(str, row["tokens"])),
        f"{row['flops']:.0%}",
        *(_score(row["scores"][measure]) for measure in measures),
        _score(control[name]) if control else "",
        f"{100 * difference['mean']:+.1f} ± {100 * difference['error']:.1f}" if difference else "",
        verdict(row),
    ]


def _refused(row: dict[str, Any], width: int) -> list[str]:
    reason = " ".join(row["refused"].split())
    return ["all", f"`{row['method']}`", f"refused: {reason}", *[""] * (width - 3)]


def _score(value: dict[str, float]) -> str:
    """Mean in per cent, and in brackets the lowest and highest of the draws where they differ."""
    spread = f" ({100 * value['low']:.1f} to {100 * value['high']:.1f})" if value["low"] != value["high"] else ""
    return f"{100 * value['mean']:.1f}{spread}"


def _source(result: dict[str, Any]) -> str:
    """One line per run: its command, date, machine, versions and commit."""
    lines = []
    for run in result["runs"].values():
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        lines.append(f"`{run['command']}`, {run['date']}, {run['machine']}; {versions}; commit {run['commit'][:7]}.")
    return "\n\n".join(dict.fromkeys(lines))
