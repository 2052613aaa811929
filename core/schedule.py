"""Amounts that change from layer to layer, as users write them.

    13            the same everywhere                 [16, 12, 8]   per layer, 0 beyond the end (ToMe's list form)
    26->0         linear from first to last layer     {3: 16, 6: 8} these layers only
    (13, -1)      ToMe's published (r, inflection)    0.7           a ratio works in all forms

`Schedule.at(layer, layers)` gives the amount at one of `layers` layers (the selected ones when a pass has `layers=`).
Linear amounts of r are truncated towards zero, as ToMe's parse_r does; ratios are not rounded.
Source: methods card 1.3 ([S utils.py:80-105]); (r, f) gives int(lo + step*i) with lo = int(r*(1-f)), hi = 2r - lo.
With one layer the published formula divides by zero; here it gives r.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from .errors import BadParameter

Number = int | float
FORMS = "a number, a->b, [list], {layer: amount} or (r, inflection)"


@dataclass(frozen=True)
class Schedule:
    """An amount per layer.  `kind` is constant, list, linear, table or inflection; `values` what was written."""

    kind: str
    values: tuple[Any, ...]

    @staticmethod
    def of(value: Any, *, where: str = "schedule", name: str = "r") -> Schedule:
        """Read a schedule from a Python value or its text form; raises BadParameter."""
        schedule = _read(value)
        if schedule is None:
            raise BadParameter(where=where, name=name, rule=FORMS, got=repr(value), hint="for example r=13 or r=26->0.")
        return schedule

    def at(self, layer: int, layers: int) -> Number:
        """The amount at layer index `layer` (0-based) out of `layers`."""
        if self.kind == "constant":
            return self.values[0]
        if self.kind == "list":
            return self.values[layer] if layer < len(self.values) else 0
        if self.kind == "table":
            return dict(self.values).get(layer, 0)
        first, last = self._ends()
        if layers == 1:
            return self.values[0]
        value = first + (last - first) / (layers - 1) * layer
        return int(value) if all(isinstance(v, int) for v in (first, last)) else value

    def amounts(self) -> list[Number]:
        """Every amount that was written, for range checks."""
        if self.kind == "table":
            return [amount for _, amount in self.values]
        return [self.values[0]] if self.kind == "inflection" else list(self.values)

    def _ends(self) -> tuple[Number, Number]:
        if self.kind == "linear":
            return self.values[0], self.values[1]
        r, inflection = self.values
        low = int(r * (1 - inflection))
        return low, 2 * r - low

    def __str__(self) -> str:
        match self.kind:
            case "constant":
                return f"{self.values[0]}"
            case "list":
                return f"[{','.join(map(str, self.values))}]"
            case "linear":
                return f"{self.values[0]}->{self.values[1]}"
            case "table":
                return "{" + ",".join(f"{k}:{v}" for k, v in self.values) + "}"
            case _:
                return f"({self.values[0]},{self.values[1]})"


def _read(value: Any) -> Schedule | None:
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        return _read_text(value.strip())
    if _is_number(value):
        return Schedule("constant", (value,))
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return Schedule("list", tuple(value))
    if isinstance(value, dict) and value and all(isinstance(k, int) and _is_number(v) for k, v in value.items()):
        return Schedule("table", tuple(sorted(value.items())))
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int) and _is_number(value[1]):
        return Schedule("inflection", value)
    return None


def _read_text(text: str) -> Schedule | None:
    if "->" in text:
        ends = [_literal(part) for part in text.split("->")]
        return Schedule("linear", tuple(ends)) if len(ends) == 2 and all(map(_is_number, ends)) else None
    value = _literal(text)
    return None if isinstance(value, str) else _read(value)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
