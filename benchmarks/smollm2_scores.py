"""What the cells of results/smollm2.json say: who was measured, perplexity, and how it stands to another's."""

from __future__ import annotations

import math
from typing import Any

from accuracy import verdict
from smollm2 import DENSE, DENSITIES, NEEDLE, STAGES, TEXTS, key

CONTROL = "random-tiles"
STATIC = ("a-shape", "bigbird", "dilated", "lm-infinite", "longformer", "streaming-llm", "tri-shape")  # see no input
BESIDE = "streaming-llm"  # the static pattern that methods which look at the input are held to
BETTER, LOSES = "better", "**loses to the control**"
MISSING = "not measured"
SHOWN = sorted(DENSITIES, reverse=True)
TEXT_LENGTHS = [length for length, what in STAGES if what == TEXTS]
KEY_LENGTHS = [length for length, what in STAGES if what == (NEEDLE,)]
Cells = dict[str, Any]


def names(cells: Cells) -> list[str]:
    """All methods that have a cell, dense, the control, and choices shared otherwise aside."""
    return sorted({name.split("/")[0] for name in cells if ":" not in name} - {DENSE, CONTROL})


def texts(cells: Cells, name: str, density: float, length: int) -> Cells:
    """The cells of the texts that were measured, by text."""
    found = {text: cells.get(key(name, density, length, text), {}) for text in TEXTS}
    return {text: cell for text, cell in found.items() if "nll" in cell}


def score(found: Cells) -> float:
    """Perplexity over the scored tokens of all texts."""
    lost = [one for cell in found.values() for one in cell["nll"]]
    return math.exp(sum(lost) / len(lost))


def read(found: Cells) -> float:
    """Part of the pairs read, mean of the texts."""
    return sum(cell["density"] for cell in found.values()) / len(found)


def against(own: Cells, other: Cells) -> str:
    """How the same tokens fare: BETTER, LOSES, or not told apart; "no control" where no text is in both."""
    both = [text for text in own if text in other]
    pairs = [pair for text in both for pair in zip(other[text]["nll"], own[text]["nll"], strict=True)]
    return verdict({"difference": difference(pairs)}) if pairs else "no control"


def difference(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Mean of (control - method) over chunks of tokens, and its standard error; above 0 is for the method."""
    gains = [control - own for control, own in pairs]
    mean = sum(gains) / len(gains)
    spread = sum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1)
    return {"mean": mean, "error": (spread / len(gains)) ** 0.5}


def behind(cells: Cells, name: str, density: float, length: int) -> bool:
    """Whether a method that looks at the input loses to the static pattern BESIDE."""
    if name in (*STATIC, CONTROL):
        return False
    return against(texts(cells, name, density, length), texts(cells, BESIDE, density, length)) == LOSES


def tried(cells: Cells, name: str, density: float, length: int) -> list[dict[str, Any]]:
    """The pass keys asked for, by depth."""
    keys: list[dict[str, Any]] = cells.get(key(name, density, length, NEEDLE), {}).get("keys", [])
    return keys


def line(values: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(values)} |"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])
