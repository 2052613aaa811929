"""Every token op through Inductor on a CPU against the same op in eager execution.

    python benchmarks/ops.py
        [--models vit_small,vit_base] [--batches 1,8] [--rounds 150]
        [--json benchmarks/results/ops.json]
        --json FILE --docs                     # measures nothing, renders FILE's table into docs/performance.md

One thread, float32, 197 tokens of which 13 leave, batch and token counts as symbols, as in a compiled model.  An op
costs what a program of 10 calls of it takes more than one of 2, over 8: what calling any compiled function costs once,
guards and arguments, is a figure of its own.  Every call reads a part of one stacked tensor, and freed memory stays
with the process, so that no variant pays for pages which another one gave back.  CPU time, medians over rounds in which
all programs run in random order; in brackets are the 5th and the 95th percentile of the ratio over resampled rounds.

compiled alone        the op's reference inlined and compiled by Inductor, over eager
as tamis compiles it  the same for `mode="default"`, over eager
once                  microseconds that a call of the compiled program takes beside its ops
how                   called: Inductor's code calls the op; inlined: it compiles the reference
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from speed.cost_tables import ops as op_table
from speed.table import fill
from torch import Tensor, nn

from tamis.capture.canonical import canonicalise
from tamis.counts import HALF, CountRule, at_most
from tamis.lowering import callables
from tamis.lowering.inline import CALLED
from tamis.target import Target

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
WIDTHS = {"vit_small": 384, "vit_base": 768}
TOKENS, LEAVE, FEW, MANY = 197, 13, 2, 10
RESAMPLED = 400
RULE = CountRule(1, (at_most(LEAVE), HALF))
OPS = torch.ops.tamis
Times = dict[tuple[str, int], list[float]]  # by variant and number of calls, a figure for each round
SYMBOLS = {TOKENS: "tokens", TOKENS - LEAVE: "kept", LEAVE: "left"}  # by size; the batch is one too


class Calls(nn.Module):
    """One op on each of the first parts of a stacked tensor."""

    def __init__(self, function: Callable[..., Any], calls: int) -> None:
        super().__init__()
        self.function, self.calls = function, calls

    def forward(self, stack: Tensor, rest: tuple[Any, ...]) -> list[Any]:
        """What the op answers for each."""
        return [self.function(stack[i], *rest) for i in range(self.calls)]


def count(like: Tensor) -> Any:
    """Tokens after the reduction of `like` [B, N, ...]."""
    return OPS.token_count(like, 1, 1, RULE.flat())


def cases(batch: int, width: int) -> Iterator[tuple[str, Callable[..., Any], Callable[[], Tensor], tuple[Any, ...]]]:
    """Name, function of a first tensor and others, the maker of the first, and the others."""
    generator = torch.Generator().manual_seed(0)
    heads = width // 64

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, valid = draw(batch, TOKENS, width), torch.rand(batch, TOKENS, generator=generator) > 0.2
    slot, leader, moved = OPS.bipartite_match(x, None, RULE.out(TOKENS), 1, RULE.flat())
    weight, k, v = torch.ones(batch, TOKENS), draw(batch, heads, TOKENS, 64), draw(batch, heads, TOKENS, 64)
    plan, scale = (slot, leader, moved), 0.125

    def match(x: Tensor, valid: Tensor | None = None) -> Any:
        return OPS.bipartite_match(x, valid, count(x), 1, RULE.flat())

    def select(x: Tensor, fuse: bool) -> Any:
        return OPS.select_tokens(x, None, count(x), 1, RULE.flat(), "original", fuse)

    def metric() -> Tensor:
        return draw(batch, TOKENS, 64)

    def features() -> Tensor:
        return draw(batch, TOKENS, width)

    def queries() -> Tensor:
        return draw(batch, heads, TOKENS, 64)

    yield "bipartite_match", match, metric, ()
    yield "bipartite_match, padded", match, metric, (valid,)
    yield "merge_tokens", lambda x, *plan: OPS.merge_tokens(x, *plan, False), features, (*plan, weight)
    yield "reduce_tokens", lambda x, *plan: OPS.reduce_tokens(x, *plan, True), features, (*plan, weight)
    yield "select_tokens", lambda x: select(x, False), lambda: draw(batch, TOKENS), ()
    yield "select_tokens, fused", lambda x: select(x, True), lambda: draw(batch, TOKENS), ()
    yield "restore_tokens", OPS.restore_tokens, lambda: draw(batch, TOKENS - LEAVE, width), (slot,)
    yield "order_slots", OPS.order_slots, lambda: slot.clone(), (leader, moved)
    yield "valid_slots", lambda x: OPS.valid_slots(x, count(x), 1, RULE.flat()), lambda: valid.clone(), ()
    yield "attention", lambda q, *kv: OPS.attention(q, *kv, None, None, scale, False), queries, (k, v)
    yield "attention, sizes", lambda q, *kv: OPS.attention(q, *kv, None, scale, False), queries, (k, v, weight)
    yield "attention_lse", lambda q, *kv: OPS.attention_lse(q, *kv, None, scale, False), queries, (k, weight)
    first = lambda: draw(batch, heads, 1, 64)  # noqa: E731
    yield "attention_rows", lambda q, *kv: OPS.attention_rows(q, *kv, None, scale), first, (k, weight)


def exported(module: nn.Module, stack: Tensor, rest: tuple[Any, ...]) -> Any:
    """The program of `Calls`; batch and token axes are symbols."""
    dims = {size: torch.export.Dim(name) for size, name in SYMBOLS.items()}
    batch = torch.export.Dim("batch")

    def axes(x: Tensor, first: int) -> dict[int, Any]:
        found = {axis: dims[size] for axis, size in enumerate(x.shape) if axis > first and size in dims}
        return {first: batch, **found}

    def grown(x: Tensor, first: int) -> Tensor:
        """An example of 1 would make the batch a number."""
        return x if x.shape[first] > 1 else torch.cat([x, x], first)

    stack, rest = grown(stack, 1), tuple(grown(x, 0) for x in rest)
    shapes = (axes(stack, 1), tuple(axes(x, 0) for x in rest))
    return canonicalise(torch.export.export(module, (stack, rest), dynamic_shapes=shapes))


def measure(model: str, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each op."""
    for name, function, make, rest in cases(batch, WIDTHS[model]):
        stack = torch.stack([make() for _ in range(MANY)])
        torch._dynamo.reset()
        variants: dict[tuple[str, int], Any] = {}
        for calls in (FEW, MANY):
            variants["eager", calls] = module = Calls(function, calls)
            program = exported(module, stack, rest)
            variants["lowered", calls] = callables.lower(program, Target.parse("cpu"), "default")
            variants["inlined", calls] = inlined(program)
        times = interleaved(variants, (stack, rest), rounds)
        row: dict[str, Any] = {
            "op": name,
            "shape": f"{model}, batch {batch}",
            "eager_ms": 1e3 * marginal(times, "eager"),
        }
        for kind in ("inlined", "lowered"):
            row[kind] = marginal(times, kind) / marginal(times, "eager")
            row[f"{kind}_from"], row[f"{kind}_to"] = spread(times, kind)
        row["once_us"] = 1e6 * (statistics.median(times["lowered", FEW]) - FEW * marginal(times, "lowered"))
        row["how"] = "called" if name.split(",")[0] in CALLED else "inlined"
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        yield row


def marginal(times: Times, kind: str) -> float:
    """Seconds that one call more takes."""
    return (statistics.median(times[kind, MANY]) - statistics.median(times[kind, FEW])) / (MANY - FEW)


def spread(times: Times, kind: str) -> tuple[float, float]:
    """5th and 95th percentile of the ratio to eager over resampled rounds."""
    rounds = len(next(iter(times.values())))
    ratios = []
    for _ in range(RESAMPLED):
        drawn = random.choices(range(rounds), k=rounds)
        some = {key: [values[i] for i in drawn] for key, values in times.items()}
        ratios.append(marginal(some, kind) / marginal(some, "eager"))
    ordered = sorted(ratios)
    return ordered[RESAMPLED // 20], ordered[-RESAMPLED // 20]


def inlined(program: Any) -> Any:
    """The program with every op compiled."""
    kept, callables.CALLED = callables.CALLED, frozenset()
    try:
        return callables.lower(program, Target.parse("cpu"), "default")
    finally:
        callables.CALLED = kept


def interleaved(variants: dict[tuple[str, int], Any], call: tuple[Any, ...], rounds: int) -> Times:
    """CPU seconds of every variant in every round; two rounds before are not counted."""
    times: Times = {name: [] for name in variants}
    with torch.no_grad():
        for i in range(rounds + 2):
            for name in random.sample(list(variants), len(variants)):
                start = time.process_time()
                variants[name](*call)
                if i > 1:
                    times[name].append(time.process_time() - start)
    return times


def keep_memory() -> None:
    """Let glibc's allocator keep what is freed; elsewhere nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in (
        ((-3, 2**25), (-1, 2**30), (-2, 2**27)) if mallopt else ()
    ):  # mmap and trim threshold, top pad
        mallopt(parameter, value)


def main() -> None:
    """Measure, print, write; or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(WIDTHS))
    parser.add_argument("--batches", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8])
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    if options.docs:
        PAGE.write_text(fill(PAGE.read_text(), json.loads(options.json.read_text()), {"ops": op_table}))
        return
    torch.set_num_threads(1)
    keep_memory()
    batches = ",".join(map(str, options.batches))
    said = {
        "command": f"python benchmarks/ops.py --models {','.join(options.models)} --batches {batches}"
        f" --rounds {options.rounds}",
        "date": datetime.date.today().isoformat(),
        "machine": f"shared {platform.machine()}, no GPU, one thread",
        "versions": f"torch {torch.__version__}",
    }
    rows = {}
    for model in options.models:
        for batch in options.batches:
            for row in measure(model, batch, options.rounds):
                rows[f"{row['op']}, {row['shape']}"] = {**row, **said}
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
