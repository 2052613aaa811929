"""Dense against reduced, side by side, in every back end on CPU: speed-up over what the FLOPs allow.

    python benchmarks/token_reduction.py                  # the whole matrix: 3 models x 2 batches x 3 back ends
        [--models vit_small_224,..] [--backends eager,..] [--batches 1,8]
        [--seconds 20] [--rounds 15] [--processes 1]      # per model, batch, back end and process
        [--json benchmarks/results/token_reduction.json]  # rows are merged into the file
        --json FILE --docs                                # measures nothing, renders FILE's tables into README and docs

One thread, float32, random weights: times depend on shapes only.  In every round dense, reduced and slice run once
each in random order; a round's speed-up is its dense time over its other time, the figure the median over rounds, and
over processes because memory placement moves one process by a few per cent.  Time is CPU time of the process.
A row takes `--seconds` of rounds, at least 3 of them and at most `--rounds`.

slice      the bound of any method: the same token counts by a free view, x[:, :n]
ideal      dense over reduced FLOPs, by torch's counter
of ideal   measured speed-up over ideal;  of slice  slice time over reduced time
Inductor runs mode "default"; the dense model is compiled for its batch, the reduced one for any.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed.table import NAMES, fill
from speed.variants import BACKENDS, CASES, calls, write_files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/performance.md")
MIN_ROUNDS = 3


def measure(case_name: str, backend: str, batches: list[int], seconds: float, rounds: int, files: Path) -> Any:
    """One process' result for each batch: seconds of every round, and how far reduced is from eager execution."""
    import torch

    torch.set_num_threads(1)
    case, results = CASES[case_name], []
    models, variants = calls(case, backend, files)
    eager = models.reduced.graph.program.module()
    for batch in batches:
        torch._dynamo.reset()  # a second batch must not make the dense model's batch a symbol
        x = torch.randn(batch, 3, case.side, case.side)
        with torch.inference_mode():
            difference = relative(variants["reduced"](x), eager(x))
            times = interleaved(variants, x, seconds, rounds)
        results.append({"batch": batch, "flop_ideal": models.ideal, "difference": difference, "times": times})
    return results


def relative(got: Any, expected: Any) -> float:
    """Largest difference over the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def interleaved(variants: dict[str, Any], x: Any, seconds: float, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every variant in every round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = float("inf")
    for i in range(rounds + 1):
        for name in random.sample(list(variants), len(variants)):
            start = time.process_time()
            variants[name](x)
            if i:
                times[name].append(time.process_time() - start)
        end = time.monotonic() + seconds if i == 0 else end
        if i >= MIN_ROUNDS and time.monotonic() > end:
            break
    return times


def row(case_name: str, backend: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of several processes say together."""

    def speedups(name: str) -> list[float]:
        return [
            statistics.median(a / b for a, b in zip(run["times"]["dense"], run["times"][name], strict=True))
            for run in runs
        ]

    ideal, measured, bound = runs[0]["flop_ideal"], speedups("reduced"), speedups("slice")
    ratios = [a / b for run in runs for a, b in zip(run["times"]["dense"], run["times"]["reduced"], strict=True)]
    return {
        "model": case_name,
        "recipe": CASES[case_name].recipe,
        "backend": backend,
        "batch": runs[0]["batch"],
        "dense_ms": 1e3 * statistics.median(t for run in runs for t in run["times"]["dense"]),
        "speedup": statistics.median(measured),
        "flop_ideal": ideal,
        "of_ideal": statistics.median(measured) / ideal,
        "low": min(ratios) / ideal,
        "high": max(ratios) / ideal,
        "slice_of_ideal": statistics.median(bound) / ideal,
        "of_slice": statistics.median(a / b for a, b in zip(measured, bound, strict=True)),
        "difference_to_eager": max(run["difference"] for run in runs),
        "rounds": [len(run["times"]["dense"]) for run in runs],
    }


def measure_all(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Every row and node count asked for, each model and back end in processes of its own.

    `keep` is given all there is after each back end: a long run that is cut off leaves what it had.
    """
    results: dict[str, Any] = {"rows": [], "nodes": {}}
    for case_name in options.models:
        with tempfile.TemporaryDirectory() as files:
            if "onnxruntime" in options.backends:
                results["nodes"][case_name] = child(options, files, case_name, "files")
            for backend in options.backends:
                runs = [child(options, files, case_name, backend) for _ in range(options.processes)]
                for of_one_batch in zip(*runs, strict=True):
                    results["rows"].append(row(case_name, backend, list(of_one_batch)))
                    show(results["rows"][-1])
                keep(results)


def child(options: argparse.Namespace, files: str, case_name: str, what: str) -> Any:
    """The JSON that this script, run as `--one`, prints last."""
    command = [sys.executable, __file__, "--one", case_name, what, files, *shared_arguments(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def shared_arguments(options: argparse.Namespace) -> list[str]:
    """The arguments that say how long to measure what."""
    batches = ",".join(map(str, options.batches))
    return ["--batches", batches, "--seconds", f"{options.seconds:g}", "--rounds", str(options.rounds)]


def one(options: argparse.Namespace) -> Any:
    """A child's work: write the files, or measure a back end."""
    case_name, what, files = options.one
    if what == "files":
        return write_files(CASES[case_name], Path(files))
    return measure(case_name, what, options.batches, options.seconds, options.rounds, Path(files))


def show(result: dict[str, Any]) -> None:
    """One line per row, as soon as it is there."""
    print(
        f"{result['model']} {result['recipe']} batch {result['batch']} {NAMES[result['backend']]}:"
        f" {result['speedup']:.2f}x of {result['flop_ideal']:.2f}x = {result['of_ideal']:.3f} of ideal"
        f" ({result['low']:.2f} to {result['high']:.2f}), slice {result['slice_of_ideal']:.3f} of ideal,"
        f" {result['of_slice']:.3f} of slice; differs from eager by {result['difference_to_eager']:.0e}"
        f" ({result['rounds']} rounds)",
        flush=True,
    )


def merged(results: dict[str, Any], before: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The rows of the file with those measured now in their places, ordered by model, batch, back end."""
    import onnxruntime
    import torch

    arguments = ["--models", ",".join(options.models), "--backends", ",".join(options.backends)]
    arguments += [*shared_arguments(options), "--processes", str(options.processes)]
    facts = {
        "command": f"python benchmarks/token_reduction.py {' '.join(arguments)}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, no GPU, one thread",
        "versions": f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}",
    }
    rows = {key(one): one for one in [*before.get("rows", []), *({**one, **facts} for one in results["rows"])]}
    order = [(model, batch, backend) for model in CASES for batch in (1, 8) for backend in BACKENDS]
    place = {which: i for i, which in enumerate(order)}
    found = sorted(rows.values(), key=lambda one: place.get(key(one), len(order)))
    return {"rows": found, "nodes": {**before.get("nodes", {}), **results["nodes"]}}


def key(result: dict[str, Any]) -> tuple[str, int, str]:
    """What a row is of."""
    return result["model"], result["batch"], result["backend"]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(known: Any) -> Any:
        def read(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(known):
                parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
            return chosen

        return read

    parser.add_argument("--models", type=names(CASES), default=list(CASES))
    parser.add_argument("--backends", type=names(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--batches", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--docs", action="store_true", help="render the tables of --json into the pages, measure nothing"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.docs and options.json is None:
        parser.error("--docs renders the file that --json names")
    return options


def main() -> None:
    """Measure, print, write; or render."""
    options = parsed()
    if options.one:
        print(json.dumps(one(options)))
        return
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    if options.docs:
        for page in PAGES:
            (ROOT / page).write_text(fill((ROOT / page).read_text(), before))
        return

    def keep(results: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(merged(results, before, options), indent=1) + "\n")

    measure_all(options, keep)


if __name__ == "__main__":
    main()
