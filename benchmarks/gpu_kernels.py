"""Kernels on a GPU against what the machine can do: rows K1, K2, K4, K6 and K7 of the goals.

    python benchmarks/gpu_kernels.py [--json FILE]
        [--rehearse]        # tiny sizes on the CPU: shows that the script runs, measures nothing worth keeping

Every time is a median of replays of a CUDA graph on random inputs, with the cache flushed in between.  Floors are bytes
over the rate of a device copy, and FLOPs over the rate of a bfloat16 product of 8192 x 8192 matrices, both measured in
the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.counts import HALF, CountRule, at_most

ops = torch.ops.tamis
Call = Callable[[], Any]


class Machine:
    """A device, its clock, and its measured ceilings: bytes and floating point operations per second."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = "cpu" if rehearse else "cuda"
        size = 64 if rehearse else 8192
        a, b = (self.random(size, size) for _ in range(2))
        large = self.random(2**10 if rehearse else 2**29)
        target = torch.empty_like(large)
        self.flops = 2 * size**3 / self.seconds(lambda: a @ b)
        self.bytes = 2 * large.nbytes / self.seconds(lambda: target.copy_(large))

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A tensor of normal numbers."""
        return torch.randn(*shape, device=self.device).to(dtype)

    def seconds(self, call: Call) -> float:
        """Of one call."""
        if self.rehearse:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        from triton.testing import do_bench_cudagraph

        with torch.no_grad():
            return 1e-3 * do_bench_cudagraph(call, rep=50, return_mode="median")


def main(doc: str | None, parts: Iterable[Callable[[Machine], list[dict[str, Any]]]]) -> None:
    """Read the command line, measure part by part, print the rows, and write what there is after each part."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.rehearse or torch.cuda.is_available()):
        raise SystemExit("no CUDA device; --rehearse runs tiny sizes on the CPU")
    machine = Machine(options.rehearse)
    result: dict[str, Any] = {
        "rehearsal": machine.rehearse,
        "ceilings": {"tflops": machine.flops / 1e12, "gbytes": machine.bytes / 1e9},
        "rows": [],
        "left_out": [],
    }
    for part in parts:
        try:
            result["rows"] += part(machine)
        except Exception as error:  # the other parts still count, and what failed is in the file
            if machine.rehearse:
                raise
            result["left_out"].append(f"{part.__name__}: {type(error).__name__}: {error}")
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def reductions(machine: Machine) -> list[dict[str, Any]]:
    """K1 and K2: merge + add + norm over its byte floor, and what matching and merging add to a dense block."""
    sizes = [(256, 197, 13, 768, 12), (256, 577, 23, 1024, 16), (8, 197, 13, 768, 12)]
    if machine.rehearse:
        sizes = [(2, 21, 3, 32, 2)]
    return [_reduction(machine, *size) for size in sizes]


def _reduction(machine: Machine, batch: int, tokens: int, r: int, width: int, heads: int) -> dict[str, Any]:
    rule = CountRule(1, (at_most(r), HALF))
    out = rule.out(tokens)
    keys = machine.random(batch, heads, tokens, width // heads)
    x, added = (machine.random(batch, tokens, width) for _ in range(2))
    weight, gamma, beta = torch.ones(batch, tokens, device=machine.device), machine.random(width), machine.random(width)
    slot, leader, moved = ops.match_keys(keys, None, out, 1, rule.flat())
    plan = (slot, leader, moved, weight, None, True)
    fused = machine.seconds(lambda: ops.add_reduce_norm(x, added, None, *plan, "layer", gamma, beta, 1e-6, False))
    matching = machine.seconds(lambda: ops.match_keys(keys, None, out, 1, rule.flat()))
    dense = torch.compile(lambda x, added: (x + added, F.layer_norm(x + added, (width,), gamma, beta, 1e-6)))
    dense(x, added)
    dense_norm = machine.seconds(lambda: dense(x, added))
    floor = (x.nbytes + added.nbytes + 2 * batch * out * width * x.itemsize) / machine.bytes
    block = _block(machine, batch, tokens, width, heads)
    return {
        "row": "K1, K2",
        "shape": f"B={batch} N={tokens}->{out} C={width}",
        "merge_add_norm_us": 1e6 * fused,
        "over_floor": fused / floor,
        "match_us": 1e6 * matching,
        "dense_add_norm_us": 1e6 * dense_norm,
        "block_us": 1e6 * block,
        "extra_of_block": (matching + fused - dense_norm) / block,
    }


def _block(machine: Machine, batch: int, tokens: int, width: int, heads: int) -> float:
    """Seconds of a dense block, compiled."""
    from timm.models.vision_transformer import Block

    block = Block(width, heads, qkv_bias=True).eval().to(machine.device, torch.bfloat16)
    compiled, x = torch.compile(block), machine.random(batch, tokens, width)
    with torch.no_grad():
        compiled(x)
        return machine.seconds(lambda: compiled(x))


def statistics(machine: Machine) -> list[dict[str, Any]]:
    """K4: attention with column means, and with the class token's row, over attention without."""
    sizes = [(2, 2, 21, 16)] if machine.rehearse else [(256, 12, 197, 64), (256, 16, 577, 64)]
    rows = []
    for batch, heads, tokens, width in sizes:
        q, k, v = (machine.random(batch, heads, tokens, width) for _ in range(3))
        scale = width**-0.5
        plain = machine.seconds(lambda: ops.attention(q, k, v, None, None, scale, False))  # noqa: B023
        with_lse = machine.seconds(lambda: ops.attention_with_lse(q, k, v, None, None, scale, False))  # noqa: B023
        _, lse = ops.attention_with_lse(q, k, v, None, None, scale, False)
        received = machine.seconds(lambda: ops.attention_received(q, k, lse, None, None, None, scale, False))  # noqa: B023
        row = machine.seconds(lambda: ops.attention_rows(q[:, :, :1], k, None, None, scale))  # noqa: B023
        sdpa = machine.seconds(lambda: F.scaled_dot_product_attention(q, k, v))  # noqa: B023
        rows.append(
            {
                "row": "K4",
                "shape": f"B={batch} H={heads} N={tokens} D={width}",
                "attention_us": 1e6 * plain,
                "sdpa_us": 1e6 * sdpa,
                "with_log_sum_exp": with_lse / plain,
                "with_column_means": (with_lse + received) / plain,
                "with_class_row": (plain + row) / plain,
            }
        )
    return rows


def long_attention(machine: Machine) -> list[dict[str, Any]]:
    """K6 and K7: dense attention of 128-wide heads over the matrix rate, and against torch's."""
    batch, heads, tokens, width = (1, 2, 40, 16) if machine.rehearse else (1, 16, 16384, 128)
    rows = []
    for causal in (False, True):
        q, k, v = (machine.random(batch, heads, tokens, width) for _ in range(3))
        call = (q, k, v, None, None, width**-0.5, causal)
        ours = machine.seconds(lambda: ops.attention(*call))  # noqa: B023
        sdpa = machine.seconds(lambda: F.scaled_dot_product_attention(*call[:3], is_causal=call[6]))  # noqa: B023
        flops = 4 * batch * heads * tokens**2 * width / (2 if causal else 1)
        rows.append(
            {
                "row": "K6, K7",
                "shape": f"H={heads} N={tokens} D={width}{' causal' if causal else ''}",
                "of_matrix_rate": flops / ours / machine.flops,
                "sdpa_over_ours": sdpa / ours,
            }
        )
    return rows


if __name__ == "__main__":
    main(__doc__, (reductions, statistics, long_attention))
