"""The generated parts of docs/methods.md: a table for each level, the published figures, and where all is from."""

from __future__ import annotations

import re
from typing import Any

from accuracy import verdict
from published import PUBLISHED
from speed.table import NAMES

LEVELS = (80, 60, 40)
MISSING = "not measured"


def rendered(page: str, cells: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """The page with the text between `<!-- NAME: generated -->` and `<!-- end -->` made from the results."""
    blocks = {f"level-{level}": table(level, cells, accuracy["digits"]) for level in LEVELS}
    blocks |= {"published": published(accuracy["digits"]), "source": source(cells)}
    for name, text in blocks.items():
        block = f"<!-- {name}: generated -->\n\n{text}\n\n<!-- end -->"
        page = re.sub(rf"<!-- {name}: generated -->.*?<!-- end -->", lambda _, new=block: new, page, flags=re.DOTALL)
    return page


def table(level: int, cells: dict[str, Any], digits: dict[str, Any]) -> str:
    """One row per method: the digits ViT at the level, then ViT-small."""
    head = ["method", "digits: FLOPs", "accuracy", "control", "against the control", "ViT-small", "drift", "control"]
    lines = [_line([*head, *NAMES.values()]), "|---" * (len(head) + len(NAMES)) + "|"]
    dense = f"{100 * digits['dense']['accuracy']['mean']:.1f}"
    lines.append(_line(["dense", "100%", dense, "", "", "100%", "0", "", *["1"] * len(NAMES)]))
    lines += [_line(row) for row in _rows(level, cells, digits)]
    return "\n".join(lines)


def _rows(level: int, cells: dict[str, Any], digits: dict[str, Any]) -> list[list[str]]:
    rows = {row["method"]: row for row in digits["rows"] if row.get("level", f"{level}% of").startswith(f"{level}% of")}
    names = sorted({*rows, *(name.split("/")[0] for name in cells)}, key=lambda name: (_accuracy(rows.get(name)), name))
    return [[f"`{name}`", *_on_digits(rows.get(name)), *_on_vit(name, level, cells)] for name in names]


def _accuracy(row: dict[str, Any] | None) -> float:
    """For the order: the best first, what has no accuracy last."""
    return -row["scores"]["accuracy"]["mean"] if row and "scores" in row else 1.0


def _on_digits(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return [MISSING, "", "", ""]
    if "refused" in row:
        return [f"refused: {' '.join(row['refused'].split())}", "", "", ""]
    control = _spread(row["control"]["accuracy"]) if "control" in row else ""
    return [f"{row['flops']:.0%}", _spread(row["scores"]["accuracy"]), control, verdict(row)]


def _on_vit(name: str, level: int, cells: dict[str, Any]) -> list[str]:
    cell = cells.get(f"{name}/{level}/drift")
    if cell is None:
        return [MISSING, "", "", *[""] * len(NAMES)]
    if "refused" in cell:
        return [f"refused: {cell['refused']}", "", "", *[""] * len(NAMES)]
    moved = _drift(cell.get("moved")) if "moved" in cell else "random parts"
    speeds = [_speed(cells.get(f"{name}/{level}/{backend}")) for backend in NAMES]
    return [f"`{cell['pass']}`, {cell['flops']:.0%}", moved, _drift(cell.get("control")), *speeds]


def _spread(value: dict[str, float]) -> str:
    """Mean in per cent, and the lowest and highest of the draws."""
    return f"{100 * value['mean']:.1f} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def _drift(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['relative_l2']:.3f}, cosine {value['cosine']:.3f}"


def _speed(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return MISSING
    slower = " **slower**" if cell["speedup"] < 1 else ""
    return f"{cell['speedup']:.2f}x ({cell['low']:.2f} to {cell['high']:.2f}){slower}"


def published(digits: dict[str, Any]) -> str:
    """One row per method: its own table, in one line."""
    names = sorted({row["method"] for row in digits["rows"]})
    rows = [_line([f"`{name}`", PUBLISHED[name]]) for name in names]
    return "\n".join([_line(["method", "what its own paper or code says of it"]), "|---|---|", *rows])


def source(cells: dict[str, Any]) -> str:
    """Days, commits, machine and versions of all cells; the command of each is in the results file."""
    runs = [cell["run"] for cell in cells.values()]
    if not runs:
        return MISSING
    days, commits = sorted({run["date"] for run in runs}), sorted({run["commit"][:7] for run in runs})
    machines = sorted({run["machine"] for run in runs})
    packages = ("python", "torch", "timm", "onnxruntime")
    versions = sorted(
        {", ".join(f"{name} {run['versions'][name]}" for name in packages if name in run["versions"]) for run in runs}
    )
    said = [", ".join(days), "; ".join(machines), "; ".join(versions), f"commits {', '.join(commits)}"]
    return f"`python benchmarks/vision_table.py`, {'; '.join(said)}."


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"
