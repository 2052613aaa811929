"""What a run reports, as plain data: tokens and FLOPs per layer, what every pass did, drift, speed.

Everything here turns into JSON with `to_dict` and back with `Report.from_dict`; drawing it is `runtime/render.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .rewrite import Outcome


@dataclass(frozen=True)
class Drift:
    """How far the outputs moved from the original's.

    relative_l2  largest relative L2 difference of any row (batch entry) of any output, over real tokens; inf where the
                 result is NaN or the original's row is zero and the result's is not
    cosine       smallest cosine between a row and the original's
    top1         fraction of rows with the same largest entry, where an output looks like logits [B, classes]; else None
    rows         rows compared (batch entries)
    outputs      relative L2 per output
    left_out     outputs that could not be compared, with the reason
    """

    relative_l2: float
    cosine: float
    top1: float | None
    rows: int
    outputs: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        agreement = "" if self.top1 is None else f", top-1 agreement {self.top1:.1%}"
        left_out = "".join(f"; {name} left out: {why}" for name, why in self.left_out.items())
        return f"relative L2 {self.relative_l2:.3g}, cosine {self.cosine:.6f}{agreement} ({self.rows} rows{left_out})"


@dataclass(frozen=True)
class Benchmark:
    """Original against result, timed in turn (A B A B).  Times in milliseconds per call, medians over the rounds.

    speedup  median over rounds of original time / result time;  low, high: the smallest and largest of these ratios
    shapes   the inputs, as text
    device   where both were run;  mode: by what (eager, a mode of torch.compile, ONNX Runtime)
    """

    speedup: float
    low: float
    high: float
    original_ms: float
    result_ms: float
    rounds: int
    shapes: str
    device: str
    mode: str = "eager"

    def __str__(self) -> str:
        word = "faster" if self.speedup >= 1 else "SLOWER"
        return (
            f"{self.speedup:.2f}x {word} ({self.low:.2f}-{self.high:.2f} over {self.rounds} rounds): "
            f"{self.original_ms:.2f} ms -> {self.result_ms:.2f} ms at {self.shapes}, {self.device}, {self.mode}"
        )


@dataclass(frozen=True)
class LayerRow:
    """Tokens and FLOPs of one layer of the stream at the example inputs; None where they are not known.

    tokens_in, tokens_out  predicted from the count rules;  measured: query tokens its attention saw when it was run
    """

    layer: int
    module: str
    tokens_in: int | None
    tokens_out: int | None
    measured: int | None = None
    flops_before: int | None = None
    flops_after: int | None = None


@dataclass(frozen=True)
class Report:
    """All that is said of one compilation."""

    name: str
    passes: tuple[str, ...]
    outcomes: tuple[dict[str, Any], ...] = ()
    layers: tuple[LayerRow, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)
    prefix: int = 0
    flops_before: int | None = None
    flops_after: int | None = None
    skipped_sites: tuple[dict[str, Any], ...] = ()
    drift: Drift | None = None
    benchmarks: tuple[Benchmark, ...] = ()
    notes: tuple[str, ...] = ()
    artifacts: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)  # `runtime.calibrate.Calibration` as plain data

    @property
    def changed(self) -> bool:
        """True when any place of the model was changed."""
        return any(outcome["applied"] for outcome in self.outcomes)

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs of the original over those of the result."""
        return self.flops_before / self.flops_after if self.flops_before and self.flops_after else None

    def with_changes(self, **changes: Any) -> Report:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON (an infinite drift becomes the text "inf")."""
        return _plain({**asdict(self), "changed": self.changed, "flops_ratio": self.flops_ratio})

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Report:
        """Inverse of `to_dict`."""
        known = {f.name for f in fields(Report)}
        values: dict[str, Any] = {key: value for key, value in data.items() if key in known}
        for name in ("passes", "outcomes", "skipped_sites", "notes", "artifacts"):
            values[name] = tuple(values.get(name, ()))
        values["layers"] = tuple(LayerRow(**row) for row in values.get("layers", ()))
        if values.get("drift"):
            values["drift"] = Drift(**_floats(values["drift"], ("relative_l2", "cosine")))
        values["benchmarks"] = tuple(Benchmark(**one) for one in values.get("benchmarks", ()))
        return Report(**values)

    def __str__(self) -> str:
        return "\n".join([self.headline(), *self._table(), *self.remarks()])

    def headline(self) -> str:
        """`vit_small: tome:r=13; 9.2 -> 5.4 GFLOPs (1.70x fewer)`."""
        passes = " + ".join(self.passes) or "no passes"
        if self.flops_ratio is None:
            return f"{self.name}: {passes}"
        before, after = flops_text(self.flops_before), flops_text(self.flops_after)
        return f"{self.name}: {passes}; {before} -> {after} FLOPs ({_compared(self.flops_ratio)})"

    def remarks(self) -> list[str]:
        """Drift, speed, skipped places and notes, one line each."""
        lines = [f"drift: {self.drift}"] if self.drift else []
        lines += [f"speed: {benchmark}" for benchmark in self.benchmarks]
        lines += [f"skipped: {reason}" for reason in self._skips()]
        lines += [f"note: {remark}" for remark in self._said_of(applied=True)]
        lines += [f"note: {note}" for note in self.notes]
        return lines + [f"wrote {artifact['path']}" for artifact in self.artifacts]

    def _skips(self) -> list[str]:
        sites = [f"site {s['index']} ({s['node']}): {s['reason']}" for s in self.skipped_sites]
        return self._said_of(applied=False) + sites

    def _said_of(self, *, applied: bool) -> list[str]:
        """Reasons of places that were changed, or were not, with the layers they hold for, each reason once."""
        places: dict[tuple[str, str], list[str]] = {}
        for outcome in self.outcomes:
            if outcome["applied"] == applied and (outcome["reason"] or not applied):
                where = "the model" if outcome["layer"] is None else str(outcome["layer"])
                places.setdefault((outcome["pass"], outcome["reason"]), []).append(where)
        return [f"{name} at layer {', '.join(at)}: {reason}" for (name, reason), at in places.items()]

    def table(self) -> list[tuple[str, ...]]:
        """The ledger as text, headings first; [] without a stream.

        Measured tokens are shown where a run differed from the prediction, the only time they say something new.
        """
        if not self.layers:
            return []
        surprising = any(row.measured not in (None, row.tokens_in) for row in self.layers)
        return [tuple(_headings(surprising)), *(tuple(_cells(row, surprising)) for row in self.layers)]

    def _table(self) -> list[str]:
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _headings(with_measured: bool) -> list[str]:
    return ["layer", "tokens in", "out", *["measured in"] * with_measured, "FLOPs before", "after"]


def _cells(row: LayerRow, with_measured: bool) -> list[str]:
    counts = [row.tokens_in, row.tokens_out, *[row.measured] * with_measured]
    shown = ("?" if count is None else str(count) for count in counts)
    return [str(row.layer), *shown, flops_text(row.flops_before), flops_text(row.flops_after)]


def outcome_dict(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data; counts that are symbols become their names."""
    return {
        "pass": outcome.pass_name,
        "layer": outcome.layer,
        "site": outcome.site,
        "applied": outcome.applied,
        "reason": outcome.reason,
        "before": outcome.before if isinstance(outcome.before, int | None) else str(outcome.before),
        "after": outcome.after if isinstance(outcome.after, int | None) else str(outcome.after),
        "inside": outcome.inside,
    }


def _compared(ratio: float) -> str:
    """`1.70x fewer`, `1.02x more`, or that both are alike to two places, for FLOPs before over FLOPs after."""
    if round(ratio, 2) == 1 == round(1 / ratio, 2):
        return "as many"
    return f"{ratio:.2f}x fewer" if ratio > 1 else f"{1 / ratio:.2f}x more"


def flops_text(flops: int | None) -> str:
    """`9.21 G`; "?" when unknown."""
    if flops is None:
        return "?"
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= scale:
            return f"{flops / scale:.2f} {unit}"
    return str(flops)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _floats(data: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    outputs = {name: float(value) for name, value in data.get("outputs", {}).items()}
    return {**data, **{name: float(data[name]) for name in names}, "outputs": outputs}
