"""Peak memory of a prompt's forward against its length: dense attention and sparse, each run a process of its own.

    python benchmarks/sparse_memory.py
        [--lengths 2048 4096 8192 16384]
        [--ways eager sdpa "block-sparse:density=0.25" ...]
        [--json benchmarks/results/sparse_memory.json]
        --json FILE --docs                   # measures nothing, renders FILE's table into docs/sparse.md

A Llama with random weights, 2 layers of 2 query heads and 1 key head, head size 64: small, so that what grows with the
length is seen and not the weights.  One row, an attention mask without padding, float32, one thread.

eager, sdpa  the module of transformers, by its `attn_implementation`
otherwise    `tamis.compile(model, passes=WAY)`, run eagerly
peak         the largest resident size while the prompt runs (VmHWM, reset before) less the resident size before
             (VmRSS), after a short prompt ran; the cache that comes out and the last token's logits are in it
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from speed.table import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "sparse.md"
LENGTHS = (2048, 4096, 8192, 16384)
WAYS = ("eager", "sdpa", "a-shape:sink=64,local=1024", "block-sparse:density=0.25", "vertical-slash")
NAMES = {"eager": "dense, eager", "sdpa": "dense, SDPA"}


def measure(way: str, length: int) -> float:
    """Peak of one process, in MB of a million bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tamis

    torch.set_num_threads(1)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 64}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1 << 17,
        attn_implementation="eager" if way == "eager" else "sdpa",
    )
    model = LlamaForCausalLM(config).eval()

    def prompt(tokens: int) -> dict[str, Any]:
        ids = torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}

    run: Any = model if way in NAMES else tamis.compile(model, kwargs=prompt(128), passes=way, verify=False)
    with torch.no_grad():
        run(**prompt(128))
        given = prompt(length)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        run(**given)
    return (resident("VmHWM") - before) / 1e6


def resident(what: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def child(way: str, length: int) -> float:
    """`measure` in a process of its own, whose allocator gives freed memory back at once."""
    command = [sys.executable, __file__, "--one", way, str(length)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=settings)
    return float(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """A row per way: megabytes at each length, and how many times the last is that of half its length."""
    lengths = [int(one) for one in next(iter(results["peaks"].values()))]
    lines = ["| attention | " + " | ".join(f"{n:,} tokens" for n in lengths) + " | last doubling |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for way, peaks in results["peaks"].items():
        found = [peaks[str(n)] for n in lengths]
        name = NAMES.get(way, f"`{way}`")
        lines.append(f"| {name} | " + " | ".join(f"{x:.0f} MB" for x in found) + f" | {found[-1] / found[-2]:.1f}x |")
    return "\n".join([*lines, "", f"{results['date']}: {results['machine']}; {results['versions']}."])


def main() -> None:
    """Measure, print, write; or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options.one[0], int(options.one[1])))
        return
    if options.docs:
        PAGE.write_text(fill(PAGE.read_text(), json.loads(options.json.read_text()), {"sparse_memory": table}))
        return
    import torch
    import transformers

    peaks: dict[str, dict[str, float]] = {}
    for way in options.ways:
        for length in options.lengths:
            peaks.setdefault(way, {})[str(length)] = child(way, length)
            print(f"{way}, {length}: {peaks[way][str(length)]:.1f} MB", flush=True)
    results = {
        "command": " ".join(["python benchmarks/sparse_memory.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"shared {platform.machine()}, no GPU, one thread",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "peaks": peaks,
    }
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
