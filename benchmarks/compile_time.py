"""Cold compilation by Inductor on a CPU: a reduced ViT against the dense one, and what our own passes take.

    python benchmarks/compile_time.py
        [--models vit_small,vit_base] [--processes 3]
        [--json benchmarks/results/compile_time.json]  # models measured now replace those in the file
        --json FILE --docs                             # measures nothing, renders FILE's table into docs/performance.md

Every figure is CPU seconds of one process and the C++ compilers it starts, with an empty cache, one compiler at a time;
dense and reduced take turns, and a figure is the median over processes.

once      what the first compilation on a machine pays whatever the model is: finding out what the compiler can do
dense     torch.compile(model)(images) less a second call
passes    from the captured graph to the rewritten one
reduced   passes, lowering and the first call less a second one; capture (torch.export) is apart
ratio     (once + reduced) / (once + dense), as with an empty cache; "without once" is reduced / dense
kernels   distinct C++ kernels that Inductor generated
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed.cost_tables import compile_time
from speed.table import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
MODELS = {
    "vit_small": ("vit_small_patch16_224", 12, "tome:r=13"),
    "vit_base": ("vit_base_patch16_224", 12, "tome:r=13"),
    "vit_tiny_4": ("vit_tiny_patch16_224", 4, "tome:r=13"),
}
KINDS = ("dense", "reduced")


def seconds() -> float:
    """CPU time of this process and of those it started that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What the function returns, and the seconds it took; what was there before is collected before, not in between."""
    gc.collect()
    start = seconds()
    result = function()
    return result, seconds() - start


def measure(name: str, kind: str) -> dict[str, Any]:
    """One process' figures."""
    import timm
    import torch
    from torch._inductor.utils import run_and_get_code

    torch.set_num_threads(1)
    torch.manual_seed(0)  # noqa: TID251 - timm draws weights from the global generator
    timm_name, depth, recipe = MODELS[name]
    model = timm.create_model(timm_name, depth=depth).eval()
    x = torch.randn(2, 3, 224, 224)
    found: dict[str, Any] = {}
    with torch.no_grad():
        _, found["once"] = timed(lambda: torch.compile(torch.sin)(torch.ones(64)))
        module = torch.compile(model) if kind == "dense" else reduced(model, x, recipe, found)
        (_, codes), first = timed(lambda: run_and_get_code(module, x))
        _, again = timed(lambda: module(x))
    found[kind] = found.get("passes", 0.0) + found.get("lowering", 0.0) + first - again
    found["kernels"] = sum(line.startswith("cpp_") for line in definitions("\n".join(codes)))
    return found


def reduced(model: Any, x: Any, recipe: str, found: dict[str, Any]) -> Any:
    """The rewritten model, lowered but not yet compiled."""
    from tamis.capture import capture
    from tamis.lowering.callables import lower
    from tamis.rewrite import Pipeline
    from tamis.target import Target

    graph, found["capture"] = timed(lambda: capture(model, (x,)))
    result, found["passes"] = timed(lambda: Pipeline.parse(recipe).run(graph, symbolic_counts=True))
    module, found["lowering"] = timed(lambda: lower(result.graph.program, Target.parse("cpu"), "default"))
    return module


def definitions(code: str) -> list[str]:
    """Lines of generated code that define a kernel."""
    return [line for line in code.splitlines() if "= async_compile.cpp" in line]


def child(name: str, kind: str) -> dict[str, Any]:
    """`measure` in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        settings = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", name, kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **settings})
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What all processes say together."""

    def median(kind: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[kind])

    once = statistics.median(run["once"] for kind in KINDS for run in runs[kind])
    dense, after = median("dense", "dense"), median("reduced", "reduced")
    return {
        "model": MODELS[name][0],
        "layers": MODELS[name][1],
        "recipe": MODELS[name][2],
        "once": once,
        "dense": dense,
        "reduced": after,
        "ratio": (once + after) / (once + dense),
        "ratio_without_once": after / dense,
        "kernels_dense": max(run["kernels"] for run in runs["dense"]),
        "kernels_reduced": max(run["kernels"] for run in runs["reduced"]),
        "capture": median("reduced", "capture"),
        "passes": median("reduced", "passes"),
        "lowering": median("reduced", "lowering"),
        "passes_of_dense": median("reduced", "passes") / (once + dense),
        "runs": runs,
    }


def measure_all(models: list[str], processes: int) -> dict[str, Any]:
    """A row for each model, dense and reduced in turn."""
    rows = {}
    for name in models:
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(processes):
            for kind in KINDS:
                runs[kind].append(child(name, kind))
        rows[name] = row(name, runs)
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in rows[name].items()}
        print(json.dumps({key: value for key, value in shown.items() if key != "runs"}), flush=True)
    return rows


def facts(models: list[str], processes: int) -> dict[str, str]:
    """How, when and on what it was measured."""
    import torch

    return {
        "command": f"python benchmarks/compile_time.py --models {','.join(models)} --processes {processes}",
        "date": datetime.date.today().isoformat(),
        "machine": f"shared {platform.machine()}, no GPU, one thread",
        "versions": f"torch {torch.__version__}",
    }


def main() -> None:
    """Measure, print, write; or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["vit_small", "vit_base"])
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    if options.docs:
        PAGE.write_text(fill(PAGE.read_text(), before, {"compile": compile_time}))
        return
    said = facts(options.models, options.processes)
    rows = {name: {**one, **said} for name, one in measure_all(options.models, options.processes).items()}
    if options.json:
        options.json.write_text(json.dumps({**before, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
