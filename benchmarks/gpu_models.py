"""Dense against reduced on a GPU, end to end: rows M1 to M4 and M8 of the goals.

    python benchmarks/gpu_models.py [--models vit_base_224,..] [--batches 1,8,64,256] [--json FILE]
        [--seconds 240]     # compile and measure no further row after this many
        [--rehearse]        # tiny models on the CPU: shows that the script runs, measures nothing worth keeping

bfloat16, random weights: times depend on shapes only.  Dense is the best of torch.compile's "reduce-overhead" and, for
the models that have it below, "max-autotune"; both use CUDA graphs and torch's own attention.  In every round each
variant runs once in random order on one of several fresh inputs; figures are medians over rounds of the ratio within a
round, timed by CUDA events.

ideal      dense over reduced FLOPs;  of ideal   measured speed-up over it (M1)
slice      the same token counts by a free view;  of slice  slice time over reduced time (M2, M3)
memory     peak of the reduced over peak of dense (M8)
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from speed.variants import SliceOracle

import tamis


@dataclass(frozen=True)
class Case:
    """A model of timm, the recipe that reduces it, the side of its images, and whether dense is autotuned too."""

    model: str
    recipe: str
    side: int
    autotune: bool = False


CASES = {
    "vit_base_224": Case("vit_base_patch16_224", "tome:r=13", 224, autotune=True),
    "deit_small_224": Case("deit_small_patch16_224", "tome:r=13", 224),
    "vit_large_336": Case("vit_large_patch14_clip_336", "tome:r=23", 336),
    "vit_base_384": Case("vit_base_patch16_384", "tome:r=45", 384),
}
REHEARSAL = {"tiny_64": Case("vit_tiny_patch16_224", "tome:r=2", 64)}
ROUNDS, INPUTS = 20, 4
Call = Callable[[Any], Any]


def variants(case: Case, device: str, rehearse: bool) -> tuple[dict[str, Call], float]:
    """The compiled variants by name, and dense over reduced FLOPs."""
    torch.manual_seed(0)  # noqa: TID251 - timm draws weights from the global generator
    extra = {"img_size": case.side, "depth": 2} if rehearse else {}
    dense = timm.create_model(case.model, **extra).eval().to(device, torch.bfloat16)
    example = torch.randn(2, 3, case.side, case.side, device=device, dtype=torch.bfloat16)
    mode = "default" if rehearse else "reduce-overhead"
    reduced = tamis.compile(dense, (example,), passes=case.recipe, mode=mode, verify=False)
    counts = [row.tokens_out for row in reduced.report.layers]
    # constants, as the best code for one shape would have; Dynamo compiles anew for every batch
    sliced = torch.compile(SliceOracle(dense, counts), mode=None if rehearse else mode, dynamic=False)
    found: dict[str, Call] = {
        "dense": torch.compile(dense, mode=None if rehearse else mode, dynamic=False),
        "slice": sliced,
        "reduced": reduced,
    }
    if case.autotune and not rehearse:
        found["dense autotuned"] = torch.compile(dense, mode="max-autotune", dynamic=False)
    return found, reduced.report.flops_before / reduced.report.flops_after


def measure(calls: dict[str, Call], inputs: list[Any]) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every round by variant, and its peak of allocated bytes."""
    peaks = {}
    for name, call in calls.items():
        for x in inputs[:2]:
            call(x)  # compiles, records the graph
        call(inputs[0])
        peaks[name] = peak_of(lambda call=call: call(inputs[0]))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        x = random.choice(inputs)
        for name in random.sample(list(calls), len(calls)):
            times[name].append(seconds(lambda name=name, x=x: calls[name](x)))
    return times, peaks


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, by CUDA events where there is a GPU."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end)


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes allocated at most during a call; 0 without a GPU."""
    if not torch.cuda.is_available():
        call()
        return 0
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def row(name: str, case: Case, batch: int, ideal: float, times: dict[str, list[float]], peaks: dict[str, int]) -> Any:
    """What one model and batch came to."""
    dense_names = [one for one in times if one.startswith("dense")]
    best = min(dense_names, key=lambda one: statistics.median(times[one]))

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    speedup, bound = ratio(best, "reduced"), ratio(best, "slice")
    return {
        "model": name,
        "recipe": case.recipe,
        "batch": batch,
        "best_dense": best,
        "dense_ms": 1e3 * statistics.median(times[best]),
        "reduced_ms": 1e3 * statistics.median(times["reduced"]),
        "flop_ideal": ideal,
        "speedup": speedup,
        "of_ideal": speedup / ideal,
        "slice_of_ideal": bound / ideal,
        "of_slice": ratio("slice", "reduced"),
        "memory": peaks["reduced"] / peaks["dense"] if peaks["dense"] else None,
        "rounds": len(times["reduced"]),
    }


def measure_all(options: argparse.Namespace) -> None:
    """Every row asked for, as long as time is left; the file is written after each."""
    cases = REHEARSAL if options.rehearse else CASES
    device, batches = ("cpu", [2]) if options.rehearse else ("cuda", [int(b) for b in options.batches.split(",")])
    result: dict[str, Any] = {"rehearsal": options.rehearse, "rows": [], "left_out": []}
    end = time.monotonic() + options.seconds
    for name in options.models.split(",") if options.models else cases:
        if time.monotonic() > end:
            result["left_out"].append(f"{name}: out of time")
            continue
        case = cases[name]
        with torch.inference_mode():
            calls, ideal = variants(case, device, options.rehearse)
            for batch in batches:
                if time.monotonic() > end:
                    result["left_out"].append(f"{name} batch {batch}: out of time")
                    continue
                inputs = [torch.randn(batch, 3, case.side, case.side).to(device, torch.bfloat16) for _ in range(INPUTS)]
                result["rows"].append(row(name, case, batch, ideal, *measure(calls, inputs)))
                print(json.dumps(result["rows"][-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="")
    parser.add_argument("--batches", default="256,8,1,64")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.rehearse or torch.cuda.is_available()):
        raise SystemExit("no CUDA device; --rehearse runs tiny models on the CPU")
    measure_all(options)


if __name__ == "__main__":
    main()
