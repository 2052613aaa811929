"""Original and result timed in turn, A B A B, so that a machine that slows down slows both."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from ..parameters import check_whole
from ..report import Benchmark

MIN_ROUND_SECONDS = 0.05  # below this a clock tick and a context switch are part of the result


def benchmark(
    original: Callable[[], Any],
    result: Callable[[], Any],
    *,
    repeats: int = 7,
    shapes: str,
    device: torch.device | str = "cpu",
    mode: str,
) -> Benchmark:
    """Time two calls alternately after a warm-up and give the median of the rounds' ratios.

    Each round calls A as often as fills 50 ms, then B as often; the ratio of a round is its A over its B, so slow
    drifts of the machine cancel.

    Args:
        original: calls the original model once.
        result: calls the result once.
        repeats: rounds, 1 or more.
        shapes: inputs as text, for the line it prints.
        device: where both run; CUDA is synchronised around each round.
        mode: by what both are run, for the line it prints.
    """
    check_whole("CompiledModel.benchmark", 1, repeats=repeats)
    device = torch.device(device)
    calls = _calls_per_round(original, device)
    _calls_per_round(result, device)
    a, b = [], []
    for _ in range(repeats + 1):
        a.append(_seconds(original, calls, device))
        b.append(_seconds(result, calls, device))
    a, b = a[1:], b[1:]  # a compiler may still specialise in the first round
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} x{torch.get_num_threads()}"
    return Benchmark(
        speedup=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        original_ms=1e3 * statistics.median(a),
        result_ms=1e3 * statistics.median(b),
        rounds=len(ratios),
        shapes=shapes,
        device=name,
        mode=mode,
    )


def benchmark_onnx(
    original: ExportedProgram,
    path: str | os.PathLike[str],
    inputs: Sequence[Any],
    *,
    contrib: bool = False,
    repeats: int = 7,
    shapes: str,
) -> Benchmark:
    """Time an ONNX file against the original exported alike, both in ONNX Runtime on the CPU with torch's threads.

    Args:
        original: the captured program before any rewrite; its file is written to a temporary directory.
        path: the result's file.
        inputs: the flat inputs of one call.
        contrib: the file has ONNX Runtime's own operators, so the original's gets them too.
        repeats, shapes: as for `benchmark`.
    """
    from ..lowering.onnx import export_onnx
    from ..lowering.onnx_check import feeds, open_session

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        dense = export_onnx(original, os.path.join(folder, "original.onnx"), contrib=contrib)
        before, after = (open_session(file, str(file), threads=threads) for file in (dense, path))
    given = feeds(after, inputs)
    return benchmark(
        lambda: before.run(None, given),
        lambda: after.run(None, given),
        repeats=repeats,
        shapes=shapes,
        mode="ONNX Runtime",
    )


def _calls_per_round(call: Callable[[], Any], device: torch.device) -> int:
    """Warm up (two calls compile and fill caches), then see how many calls fill a round."""
    _seconds(call, 2, device)
    return int(MIN_ROUND_SECONDS / max(_seconds(call, 1, device), 1e-9)) + 1


def _seconds(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls
