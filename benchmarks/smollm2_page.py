"""The generated parts of docs/long-prompts.md: perplexity, pass keys, recall, and where all is from."""

from __future__ import annotations

import math
import re
from typing import Any

from accuracy import verdict
from smollm2 import DENSE, DENSITIES, NEEDLE, STAGES, TEXTS, key

CONTROL = "random-tiles"
STATIC = ("a-shape", "bigbird", "longformer", "streaming-llm", "tri-shape")  # patterns that do not look at the input
BESIDE = "streaming-llm"  # the static pattern that methods which look at it are held to
MISSING = "not measured"
SHOWN = sorted(DENSITIES, reverse=True)
Cells = dict[str, Any]


def rendered(page: str, cells: Cells) -> str:
    """The page with the text between `<!-- NAME: generated -->` and `<!-- end -->` made from the results."""
    blocks = {f"perplexity-{length}": perplexity(cells, length) for length, what in STAGES if what == TEXTS}
    blocks |= {f"recall-{density:g}": recall(cells, density) for density in SHOWN}
    blocks |= {"keys": keys(cells), "budgets": budgets(cells), "source": source(cells)}
    for name, text in blocks.items():
        block = f"<!-- {name}: generated -->\n\n{text}\n\n<!-- end -->"
        page = re.sub(rf"<!-- {name}: generated -->.*?<!-- end -->", lambda _, new=block: new, page, flags=re.DOTALL)
    return page


def names(cells: Cells) -> list[str]:
    """All methods that have a cell, dense and the control aside."""
    return sorted({name.split("/")[0] for name in cells} - {DENSE, CONTROL})


def rows_of(cells: Cells) -> list[str]:
    """Methods in the order of a table: the control last."""
    return [*names(cells), CONTROL]


def perplexity(cells: Cells, length: int) -> str:
    """One row per method; at each density the perplexity, the pairs read, and how it stands to the control."""
    head = ["method", *(f"at {density:g}" for density in SHOWN)]
    dense, measured = texts(cells, DENSE, 1.0, length), [MISSING] * len(SHOWN)
    if dense:
        measured = [f"{score(dense):.2f} ({', '.join(dense)})", *[""] * (len(SHOWN) - 1)]
    lines = [_line(head), "|---" * len(head) + "|", _line([DENSE, *measured])]
    for name in rows_of(cells):
        lines.append(_line([f"`{name}`", *(_perplexity(cells, name, density, length) for density in SHOWN)]))
    return "\n".join(lines)


def _perplexity(cells: Cells, name: str, density: float, length: int) -> str:
    refused = cells.get(key(name, density, length, TEXTS[0]), {}).get("refused")
    if refused:
        return f"refused: {refused}"
    found = texts(cells, name, density, length)
    if not found:
        return MISSING
    read = sum(cell["density"] for cell in found.values()) / len(found)
    which = "" if len(found) == len(TEXTS) else f", {', '.join(found)} only"
    said = "" if name == CONTROL else f"; {_verdict(found, texts(cells, CONTROL, density, length))}"
    if name not in (*STATIC, CONTROL) and _verdict(found, texts(cells, BESIDE, density, length)).startswith("**"):
        said += f", **behind `{BESIDE}`**"
    return f"{score(found):.2f} (reads {read:.1%}{which}){said}"


def texts(cells: Cells, name: str, density: float, length: int) -> Cells:
    """The cells of the texts that were measured, by text."""
    found = {text: cells.get(key(name, density, length, text), {}) for text in TEXTS}
    return {text: cell for text, cell in found.items() if "nll" in cell}


def score(found: Cells) -> float:
    """Perplexity over the scored tokens of all texts."""
    lost = [one for cell in found.values() for one in cell["nll"]]
    return math.exp(sum(lost) / len(lost))


def _verdict(own: Cells, control: Cells) -> str:
    both = [text for text in own if text in control]
    pairs = [pair for text in both for pair in zip(control[text]["nll"], own[text]["nll"], strict=True)]
    return verdict({"difference": difference(pairs)}) if pairs else "no control"


def difference(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Mean of (control - method) over chunks of tokens, and its standard error; above 0 is for the method."""
    gains = [control - own for control, own in pairs]
    mean = sum(gains) / len(gains)
    spread = sum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1)
    return {"mean": mean, "error": (spread / len(gains)) ** 0.5}


def keys(cells: Cells) -> str:
    """One row per method; for each length and density how many of the keys were found, and their likelihood."""
    lengths = [length for length, what in STAGES if what == (NEEDLE,)]
    head = ["method", *(f"{length} at {density:g}" for length in lengths for density in SHOWN)]
    lines = [_line(head), "|---" * len(head) + "|"]
    dense = [part for length in lengths for part in (_found(cells, DENSE, 1.0, length), *[""] * (len(SHOWN) - 1))]
    lines.append(_line([DENSE, *dense]))
    for name in rows_of(cells):
        row = [_found(cells, name, density, length) for length in lengths for density in SHOWN]
        lines.append(_line([f"`{name}`", *row]))
    return "\n".join(lines)


def _found(cells: Cells, name: str, density: float, length: int) -> str:
    cell = cells.get(key(name, density, length, NEEDLE), {})
    if "keys" not in cell:
        return MISSING
    tried = cell["keys"]
    lost = sum(one["nll"] for one in tried) / len(tried)
    depths = "".join("x" if one["exact"] else "-" for one in tried)
    read = f", {cell['density']:.0%}" if name != DENSE else ""
    return f"`{depths}` {lost:.2f}{read}"


def recall(cells: Cells, density: float, length: int = 1024) -> str:
    """One row per layer, one column per method: mean over heads and lowest head, on the manual."""
    found = {name: cells.get(key(name, density, length, TEXTS[0]), {}) for name in rows_of(cells)}
    found = {name: cell for name, cell in found.items() if "recall" in cell}
    if not found:
        return MISSING
    lines = [_line(["layer", *(f"`{name}`" for name in found)]), "|---" * (len(found) + 1) + "|"]
    for layer in range(len(next(iter(found.values()))["recall"])):
        lines.append(_line([str(layer), *(_share(c["recall"][layer], c["lowest"][layer]) for c in found.values())]))
    mean = {name: sum(cell["recall"]) / len(cell["recall"]) for name, cell in found.items()}
    lines.append(_line(["all", *(_share(mean[name], min(cell["lowest"])) for name, cell in found.items())]))
    return "\n".join(lines)


def _share(mean: float, lowest: float) -> str:
    return f"{mean:.2f} / {lowest:.2f}"


def budgets(cells: Cells, length: int = 1024) -> str:
    """The recipes at one length."""
    lines = [_line(["density", "pass", "pairs read"]), "|---|---|---|"]
    for name in rows_of(cells):
        for density in SHOWN:
            cell = cells.get(key(name, density, length, TEXTS[0]), {})
            if "pass" in cell:
                lines.append(_line([f"{density:g}", f"`{cell['pass']}`", f"{cell['density']:.1%}"]))
    return "\n".join(lines)


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


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"
