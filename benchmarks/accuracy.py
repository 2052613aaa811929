"""What token reduction costs in accuracy, beside random drop at the same token counts.

    python benchmarks/accuracy.py [--only digits] [--methods tome,evit] [--scenes 200]
    python benchmarks/accuracy.py --render

Two trained models: a small ViT of our own (`digits/`) on held-out scenes, and MiniLM with its real weights on retrieval
(`retrieval.py`).  Every registered method runs at the same keep ratios and at the same FLOPs; what keep ratio means is
the method's own affair, so the token counts are in the table.  Seeds: scenes are drawn three times; whatever draws at
random, the control above all, is drawn three times too.  Results go to results/accuracy.json, where they take the place
of those of the same methods, and from there into docs/accuracy.md; `--render` only writes the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULT, PAGE = HERE / "results" / "accuracy.json", HERE.parent / "docs" / "accuracy.md"
SEEDS = (0, 1, 2)
PACKAGES = ("torch", "timm", "transformers", "scikit-learn", "numpy")


def measure(
    task: Any, prepared: Any, groups: tuple[int, ...], only: list[str], parts: Mapping[str, Path]
) -> dict[str, Any]:
    """Dense scores and one row per method and level.

    groups  the series of data that the task has
    parts   what was trained for this model, by the method's name
    """
    from reductions import KEEP_RATIOS, extent, levels, methods, parts_of

    from tamis.errors import TamisError

    dense = [task.score(task.model, group) for group in groups]
    rows, depth = [], len(prepared.graph.layers)
    for cls in methods():
        if only and cls.name not in only:
            continue
        try:
            ratios = () if cls.own_count is True else KEEP_RATIOS
            own = parts_of(cls, parts)
            chosen = levels(lambda share, cls=cls, own=own: cls(**extent(cls, share, depth), **own), prepared, ratios)
        except TamisError as error:
            rows.append({"method": cls.name, "refused": str(error)})
            continue
        for title, (method, model) in chosen.items():
            rows.append({"method": cls.name, "level": title, **compare(task, prepared, groups, method, model)})
            print(json.dumps(rows[-1]), flush=True)
    return {"dense": {name: summary([one[name] for one in dense]) for name in dense[0]}, "rows": rows}


def compare(task: Any, prepared: Any, groups: tuple[int, ...], method: Any, model: Any) -> dict[str, Any]:
    """One row: a method's measures, the control's, and the difference of the first measure, item by item."""
    from reductions import compiled, control_of, drawn, flops_share, is_control

    def scores(draws: list[Any]) -> list[dict[str, np.ndarray]]:
        return [task.score(draws[i], groups[i % len(groups)]) for i in range(max(len(draws), len(groups)))]

    seeded = drawn(method, SEEDS[0]) is not method
    own = scores([compiled(prepared, drawn(method, seed)) for seed in SEEDS] if seeded else [model] * len(groups))
    row: dict[str, Any] = {
        "pass": str(method),
        "tokens": [layer.tokens_out for layer in model.report.layers],
        "flops": flops_share(model),
        "scores": {name: summary([one[name] for one in own]) for name in own[0]},
    }
    if is_control(method):
        return row
    controls = [compiled(prepared, control_of(method, seed)) for seed in SEEDS]
    counts = [[layer.tokens_out for layer in control.report.layers] for control in controls]
    assert counts == [row["tokens"]] * len(SEEDS), counts
    drops = scores(controls)
    row["control"] = {name: summary([one[name] for one in drops]) for name in drops[0]}
    row["difference"] = difference(own, drops, next(iter(own[0])))
    return row


def summary(values: list[np.ndarray]) -> dict[str, float]:
    """Mean over all, and the smallest and largest mean of a draw."""
    means = [float(one.mean()) for one in values]
    return {"mean": float(np.mean(means)), "low": min(means), "high": max(means)}


def difference(own: list[Any], control: list[Any], measure: str) -> dict[str, float]:
    """Mean of (method - control) over items, and its standard error.

    Where each draw has data of its own, items of all draws count; where all share one set, an item's draws are one.
    """
    pairs = [own[i % len(own)][measure] - one[measure] for i, one in enumerate(control)]
    items = np.concatenate(pairs) if len(own) == len(control) else np.mean(pairs, 0)
    return {"mean": float(items.mean()), "error": float(items.std(ddof=1) / len(items) ** 0.5)}


def verdict(row: dict[str, Any]) -> str:
    """What the difference says, at two standard errors."""
    if "difference" not in row:
        return "is the control"
    mean, error = row["difference"]["mean"], row["difference"]["error"]
    if abs(mean) <= 2 * error:
        return "not told apart"
    return "better" if mean > 0 else "**loses to the control**"


def digits(scenes: int, only: list[str]) -> dict[str, Any]:
    """The digits ViT on held-out scenes."""
    import hashlib

    from digits.model import WEIGHTS
    from digits.parts import PARTS
    from digits.task import Digits

    from tamis.runtime.api import prepare

    task = Digits(scenes)
    found = measure(task, prepare(task.model, (task.example(),)), SEEDS, only, PARTS)
    return {"scenes": scenes, "weights": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(), **found}


def retrieval(only: list[str]) -> dict[str, Any]:
    """MiniLM on halves of paragraphs."""
    from retrieval import PARAGRAPHS, Retrieval

    from tamis.runtime.api import prepare

    task = Retrieval()
    found = measure(task, prepare(task.model, (), task.example()), (0,), only, {})
    return {"paragraphs": PARAGRAPHS, "example_tokens": task.example()["input_ids"].shape[1], **found}


def facts(command: str, packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """What is needed to repeat a run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    return {
        "command": command,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared, no GPU",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def merged(old: dict[str, Any], new: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """New rows in the place of the old ones of the same methods; `runs` says of every method where its rows are from.

    Old rows of other data or another model (anything but rows and runs differs) are thrown away.
    """
    names = {row["method"] for row in new["rows"]}
    same = {k: v for k, v in old.items() if k not in ("rows", "runs")} == {k: v for k, v in new.items() if k != "rows"}
    kept = [row for row in old.get("rows", []) if row["method"] not in names] if same else []
    rows = sorted([*kept, *new["rows"]], key=lambda row: row["method"])
    runs = {row["method"]: run if row["method"] in names else old["runs"][row["method"]] for row in rows}
    return {**new, "rows": rows, "runs": runs}


def main() -> None:
    """Measure what was asked for, keep the rest of the result file, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes per seed (default: %(default)s)")
    parser.add_argument("--only", choices=("digits", "retrieval"), help="measure one of the two")
    parser.add_argument("--methods", default="", help="names with commas between them (default: all)")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from the result file")
    options = parser.parse_args()
    from accuracy_page import rendered

    only = [name for name in options.methods.split(",") if name]
    tasks = {"digits": lambda: digits(options.scenes, only), "retrieval": lambda: retrieval(only)}
    for name, run in tasks.items():
        if not options.render and options.only in (None, name):
            import torch

            torch.set_num_threads(1)
            new = run()
            found = results()  # as late as possible: another run may have written
            found[name] = merged(
                found.get(name, {}), new, facts("python benchmarks/accuracy.py " + _words(name, options))
            )
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text(), results()))


def results() -> dict[str, Any]:
    """The result file; {} where there is none."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def _words(name: str, options: argparse.Namespace) -> str:
    methods = f" --methods {options.methods}" if options.methods else ""
    return f"--only {name}{methods}" + (f" --scenes {options.scenes}" if name == "digits" else "")


if __name__ == "__main__":
    main()
