"""Sparse attention of a prompt on a CPU, choosing included, beside dense causal attention.

    OMP_NUM_THREADS=1 python benchmarks/sparse_attention.py
        [--tokens 4096,8192] [--densities 0.0625,0.1,0.125,0.25,0.5] [--blocks 64,128] [--rounds 5]
        [--json benchmarks/results/sparse_attention.json]
        --json FILE --docs                    # measures nothing, renders FILE's table into docs/sparse.md

One prompt, the heads of Llama 3 8B (32 query heads, 8 key heads of 128), random numbers, float32, one thread.  Sparse
is the pass `block-sparse` with share="kv", lowered as by `mode="default"`.  Dense is
`scaled_dot_product_attention(is_causal=True, enable_gqa=True)`.  They take turns; a ratio is of the medians of CPU
seconds.

asked      part of the causal pairs; the pass's `density` is set so that its rows, rounded up, read at most that much
read       (query, key) pairs in the tiles it reads, of those in all causal tiles
of dense   CPU time, choosing and attention, over dense attention's
choosing   the choice alone, over dense attention's time
eager      the same without Inductor, where rows of queries copy their keys, over dense attention's time
gathered   the form that AOTInductor gets, with the keys of all rows gathered first, over dense attention's time
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed.cost_tables import sparse_attention as table
from speed.table import fill
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tamis.attention_index import Heads
from tamis.lowering.callables import lower
from tamis.op import OPS
from tamis.passes import BlockSparse
from tamis.target import Target

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sparse.md"
HEADS, KEY_HEADS, SIZE = 32, 8, 128
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(q: Tensor, k: Tensor, v: Tensor) -> Heads:
    """One layer's attention as a method sees it."""
    return Heads(
        queries=q, keys=k, values=v, lengths=None, scale=SIZE**-0.5, causal=True, softcap=None, layer=0, layers=1
    )


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the pass replaces."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def read(density: float, tiles: int) -> float:
    """Part of the causal tiles that the pass reads: of n each row reads density * n, rounded up, and at least two."""
    each = [min(n, max(2, -int(-density * n // 1))) for n in range(1, tiles + 1)]
    return sum(each) / (tiles * (tiles + 1) / 2)


def asked_for(density: float, tiles: int) -> float:
    """The largest of the pass's densities, in steps of 1 % of it, with which it reads at most this part."""
    steps = (density * i / 100 for i in range(100, 0, -1))
    return next((step for step in steps if read(step, tiles) <= density), density / 100)


class Layer(nn.Module):
    """The method's attention of one layer."""

    def __init__(self, method: BlockSparse) -> None:
        super().__init__()
        self.method = method

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1, heads, N, size]."""
        return self.method.attend(heads(q, k, v))


def variants(method: BlockSparse) -> dict[str, Call]:
    """What is timed."""

    def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiles = method.index(heads(q, k, v)).tiles
        parts = (tiles, None, None, None, "kv", method.block, method.block, 0, 0, 0, 0, SIZE**-0.5, True)
        return OPS["block_sparse_attention"].reference(q, k, v, *parts)

    example = tuple(torch.zeros(1, count, 2 * method.block, SIZE) for count in (HEADS, KEY_HEADS, KEY_HEADS))
    length = torch.export.Dim("length", min=method.block + 1)
    program = torch.export.export(Layer(method), example, dynamic_shapes=[{2: length}] * 3)
    return {
        "dense": dense,
        "sparse": lower(program, Target.parse("cpu"), "default"),
        "eager": lower(program, Target.parse("cpu")),
        "choosing": torch.compile(lambda q, k, v: method.index(heads(q, k, v)).tiles, dynamic=False),
        "gathered": gathered,
    }


def measure(tokens: int, density: float, block: int, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, count, tokens, SIZE, generator=generator) for count in (HEADS, KEY_HEADS, KEY_HEADS))
    count = -(-tokens // block)
    method = BlockSparse(density=asked_for(density, count), block=block, share="kv")
    calls = variants(method)
    tiles = calls["choosing"](q, k, v)
    assert ((tiles >= 0).sum((2, 3)) == round(read(method.density, count) * count * (count + 1) / 2)).all()
    torch.testing.assert_close(calls["sparse"](q, k, v), calls["gathered"](q, k, v), rtol=1e-4, atol=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call(q, k, v)
            if i:
                seconds[name].append(time.process_time() - start)
    whole = statistics.median(seconds["dense"])
    ratios = {name: statistics.median(spent) / whole for name, spent in seconds.items() if name != "dense"}
    each = [one / other for one, other in zip(seconds["sparse"], seconds["dense"], strict=True)]
    return {
        "tokens": tokens,
        "block": block,
        "asked": density,
        "density": method.density,
        "read": read(method.density, count),
        **ratios,
        "low": min(each),
        "high": max(each),
    }


def main() -> None:
    """Measure, print, write; or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4096,8192")
    parser.add_argument("--densities", default="0.0625,0.1,0.125,0.25,0.5")
    parser.add_argument("--blocks", default="64,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    if options.docs:
        PAGE.write_text(fill(PAGE.read_text(), json.loads(options.json.read_text()), {"sparse": table}))
        return
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    said = {
        "command": f"python benchmarks/sparse_attention.py --rounds {options.rounds}",
        "date": datetime.date.today().isoformat(),
        "machine": f"shared {platform.machine()}, no GPU, one thread",
        "versions": f"torch {torch.__version__}",
    }
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for tokens in map(int, options.tokens.split(",")):
        for density in map(float, options.densities.split(",")):
            for block in map(int, options.blocks.split(",")):
                torch.compiler.reset()
                row = measure(tokens, density, block, options.rounds)
                print({key: round(value, 4) for key, value in row.items()}, flush=True)
                rows[f"{tokens}, {density}, {block}"] = {**row, **said}
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
