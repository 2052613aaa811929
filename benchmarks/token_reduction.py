"""Dense against reduced, side by side: speed-up over what the FLOPs allow.

    python benchmarks/token_reduction.py [--rounds 15] [--processes 3] [--json FILE]

vit_small 224, ToMe r=13, batch 8, one thread, float32, random weights (times depend on shapes only).  In every round
all variants run once in random order; the ratio of a round is dense / variant; the figure is the median over rounds,
and over processes because memory placement moves one process by a few per cent.  "slice" is the bound: the same token
counts by a free view (x[:, :n]), without matching or merging.  FLOP-ideal is dense over reduced FLOPs by torch's
counter.
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

MODEL, RECIPE, BATCH, R = "vit_small_patch16_224", "tome:r=13", 8, 13


def slice_oracle(model: Any) -> Callable[[Any], Any]:
    """The model with r tokens fewer after every attention, by a view."""

    def run(x: Any) -> Any:
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks:
            x = x + block.ls1(block.attn(block.norm1(x)))
            x = x[:, : x.shape[1] - R]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))

    return run


def onnx_session(path: str) -> Callable[[Any], Any]:
    """A file in ONNX Runtime on one CPU thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def variants(directory: str) -> tuple[dict[str, tuple[str, Callable[[Any], Any]]], float, Any]:
    """name -> (what it is compared with, callable); the FLOP-ideal speed-up; an input."""
    import timm
    import torch

    import tamis

    torch.set_num_threads(1)
    model, x = timm.create_model(MODEL).eval(), torch.randn(BATCH, 3, 224, 224)
    fast = tamis.compile(model, (x[:2],), passes=RECIPE, verify=False)
    fast.export(f"{directory}/reduced.onnx", check=False)
    same = tamis.compile(model, (x[:2],), passes="tome:r=0", allow_noop=True, verify=False)
    same.export(f"{directory}/dense.onnx", check=False)
    return (
        {
            "eager dense": ("eager dense", model),
            "eager tome": ("eager dense", fast),
            "eager slice": ("eager dense", slice_oracle(model)),
            "onnxruntime dense": ("onnxruntime dense", onnx_session(f"{directory}/dense.onnx")),
            "onnxruntime tome": ("onnxruntime dense", onnx_session(f"{directory}/reduced.onnx")),
        },
        fast.report.flops_before / fast.report.flops_after,
        x,
    )


def measure(rounds: int) -> dict[str, Any]:
    """Median speed-ups of one process."""
    import torch

    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        compared, ideal, x = variants(directory)
        times: dict[str, list[float]] = {name: [] for name in compared}
        for i in range(rounds + 1):
            for name in random.sample(list(compared), len(compared)):
                start = time.process_time()
                compared[name][1](x)
                if i:
                    times[name].append(time.process_time() - start)
    speedups = {
        name: statistics.median(a / b for a, b in zip(times[base], times[name], strict=True))
        for name, (base, _) in compared.items()
    }
    return {"flop_ideal": ideal, "speedup": speedups}


def main() -> None:
    """Run in several processes and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help="one process, JSON on stdout")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.rounds)))
        return
    command = [sys.executable, __file__, "--one", "--rounds", str(options.rounds)]
    runs = []
    for _ in range(options.processes):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    report(runs, options)


def report(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Table on stdout, all runs in the JSON file."""
    import onnxruntime
    import torch

    ideal = runs[0]["flop_ideal"]
    print(f"{MODEL} {RECIPE} batch {BATCH}, 1 thread; FLOP-ideal {ideal:.3f}")
    for name in runs[0]["speedup"]:
        values = [run["speedup"][name] for run in runs]
        median = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"  {name:20} {median:.3f}x   {median / ideal:.2f} of ideal   ({spread} over processes)")
    if options.json:
        arguments = f"--rounds {options.rounds} --processes {options.processes}"
        facts = {
            "command": f"python benchmarks/token_reduction.py {arguments}",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, shared, no GPU",
            "versions": {
                "torch": torch.__version__,
                "onnxruntime": onnxruntime.__version__,
                "python": platform.python_version(),
            },
            "runs": runs,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
