"""The generated parts of docs/long-prompts.md: perplexity, pass keys, recall, and where all is from."""

from __future__ import annotations

import re
from typing import Any

import smollm2_findings as findings
from smollm2 import DENSE, SHARED, TEXTS, key
from smollm2_scores import (
    BESIDE,
    CONTROL,
    KEY_LENGTHS,
    MISSING,
    SHOWN,
    TEXT_LENGTHS,
    Cells,
    against,
    behind,
    names,
    read,
    score,
    table,
    texts,
    tried,
)

LAYERS = (1024, 0.25)  # tokens and density at which recall is shown layer by layer


def rendered(page: str, cells: Cells) -> str:
    """The page with the text between `<!-- NAME: generated -->` and `<!-- end -->` made from the results."""
    blocks = {f"perplexity-{length}": perplexity(cells, length) for length in TEXT_LENGTHS}
    blocks |= {"found-texts": findings.perplexities(cells), "found-keys": findings.keys(cells)}
    blocks |= {"recall-layers": recall(cells), "recall-all": recalls(cells), "shares": shares(cells)}
    blocks |= {"keys": keys(cells), "budgets": budgets(cells), "source": source(cells)}
    for name, text in blocks.items():
        block = f"<!-- {name}: generated -->\n\n{text}\n\n<!-- end -->"
        page = re.sub(rf"<!-- {name}: generated -->.*?<!-- end -->", lambda _, new=block: new, page, flags=re.DOTALL)
    return page


def rows_of(cells: Cells) -> list[str]:
    """Methods in the order of a table: the control last."""
    return [*names(cells), CONTROL]


def perplexity(cells: Cells, length: int) -> str:
    """One row per method; at each density the perplexity, the pairs read, and how it stands to the control."""
    dense, measured = texts(cells, DENSE, 1.0, length), [MISSING] * len(SHOWN)
    if dense:
        measured = [f"{score(dense):.2f} ({', '.join(dense)})", *[""] * (len(SHOWN) - 1)]
    rows = [[f"`{name}`", *(_perplexity(cells, name, one, length) for one in SHOWN)] for name in rows_of(cells)]
    return table(["method", *(f"at {density:g}" for density in SHOWN)], [[DENSE, *measured], *rows])


def _perplexity(cells: Cells, name: str, density: float, length: int) -> str:
    refused = cells.get(key(name, density, length, TEXTS[0]), {}).get("refused")
    if refused:
        return f"refused: {refused}"
    found = texts(cells, name, density, length)
    if not found:
        return MISSING
    which = "" if len(found) == len(TEXTS) else f", {', '.join(found)} only"
    said = "" if name == CONTROL else f"; {against(found, texts(cells, CONTROL, density, length))}"
    said += f", **behind `{BESIDE}`**" if behind(cells, name, density, length) else ""
    return f"{score(found):.2f} (reads {read(found):.1%}{which}){said}"


def keys(cells: Cells) -> str:
    """One row per method; for each length and density how many of the keys were found, and their likelihood."""
    columns = [(length, density) for length in KEY_LENGTHS for density in SHOWN]
    alone = [_found(cells, DENSE, 1.0, length) if density == SHOWN[0] else "" for length, density in columns]
    rows = [
        [f"`{name}`", *(_found(cells, name, density, length) for length, density in columns)] for name in rows_of(cells)
    ]
    return table(["method", *_headed(columns)], [[DENSE, *alone], *rows])


def _headed(columns: list[tuple[int, float]]) -> list[str]:
    return [f"{length} at {density:g}" for length, density in columns]


def _found(cells: Cells, name: str, density: float, length: int) -> str:
    asked = tried(cells, name, density, length)
    if not asked:
        return MISSING
    lost = sum(one["nll"] for one in asked) / len(asked)
    depths = "".join("x" if one["exact"] else "-" for one in asked)
    said = f", {cells[key(name, density, length, 'needle')]['density']:.0%}" if name != DENSE else ""
    return f"`{depths}` {lost:.2f}{said}"


def recall(cells: Cells) -> str:
    """One row per layer, one column per method: mean over heads and lowest head, on the manual."""
    length, density = LAYERS
    found = {name: cells.get(key(name, density, length, TEXTS[0]), {}) for name in rows_of(cells)}
    found = {name: cell for name, cell in found.items() if "recall" in cell}
    if not found:
        return MISSING
    layers = range(len(next(iter(found.values()))["recall"]))
    rows = [[str(at), *(_share(c["recall"][at], c["lowest"][at]) for c in found.values())] for at in layers]
    return table(["layer", *(f"`{name}`" for name in found)], rows)


def recalls(cells: Cells) -> str:
    """One row per method; for each length and density the mean over layers and heads, and the lowest head of all."""
    columns = [(length, density) for length in TEXT_LENGTHS for density in SHOWN]
    rows = [
        [
            f"`{name}`",
            *(_over_layers(cells.get(key(name, density, length, TEXTS[0]), {})) for length, density in columns),
        ]
        for name in rows_of(cells)
    ]
    return table(["method", *_headed(columns)], rows)


def _over_layers(cell: dict[str, Any]) -> str:
    return _share(sum(cell["recall"]) / len(cell["recall"]), min(cell["lowest"])) if "recall" in cell else MISSING


def _share(mean: float, lowest: float) -> str:
    return f"{mean:.2f} / {lowest:.2f}"


def shares(cells: Cells) -> str:
    """A row for each method and who shares its choice, its own first: perplexity, pairs read and recall."""
    length = SHARED[0]
    others = sorted({name.split("/")[0] for name in cells if ":" in name})
    rows = []
    for method in sorted({name.partition(":")[0] for name in others}):
        for name in (method, *(other for other in others if other.startswith(f"{method}:"))):
            who = name.partition(":share=")[2] or "its own"
            rows.append([f"`{method}`", who, *(_shared(cells, name, density, length) for density in SHOWN)])
    return table(["method", "share", *(f"at {density:g}" for density in SHOWN)], rows) if rows else MISSING


def _shared(cells: Cells, name: str, density: float, length: int) -> str:
    found = texts(cells, name, density, length)
    if len(found) < len(TEXTS):
        return MISSING
    return f"{score(found):.2f} (reads {read(found):.1%}), {_over_layers(found[TEXTS[0]])}"


def budgets(cells: Cells, length: int = 1024) -> str:
    """The recipes at one length."""
    rows = []
    for name in rows_of(cells):
        for density in SHOWN:
            cell = cells.get(key(name, density, length, TEXTS[0]), {})
            if "pass" in cell:
                rows.append([f"{density:g}", f"`{cell['pass']}`", f"{cell['density']:.1%}"])
    return table(["density", "pass", "pairs read"], rows)


def source(cells: Cells) -> str:
    """Days, commits, machine, versions and texts of all cells; the command of each is in the results file."""
    runs = [cell["run"] for cell in cells.values()]
    if not runs:
        return MISSING
    days, commits = sorted({run["date"] for run in runs}), sorted({run["commit"][:7] for run in runs})
    versions = {", ".join(f"{name} {number}" for name, number in run["versions"].items()) for run in runs}
    hashes = {f"{name.rsplit('/')[-1]} {cell['sha256'][:12]}" for name, cell in cells.items() if "sha256" in cell}
    said = [
        ", ".join(days),
        "; ".join(sorted({run["machine"] for run in runs})),
        "; ".join(sorted(versions)),
        f"commits {', '.join(commits)}",
        f"SHA-256 of the texts: {', '.join(sorted(hashes))}",
    ]
    return f"`python benchmarks/smollm2.py`, {'; '.join(said)}."
