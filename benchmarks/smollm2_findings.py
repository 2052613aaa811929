"""What the results on SmolLM2 come to: who stays near dense attention, who is behind what, where pass keys are lost."""

from __future__ import annotations

from smollm2 import DENSE, TEXTS
from smollm2_scores import (
    BESIDE,
    BETTER,
    CONTROL,
    KEY_LENGTHS,
    MISSING,
    SHOWN,
    STATIC,
    TEXT_LENGTHS,
    Cells,
    against,
    behind,
    names,
    score,
    table,
    texts,
    tried,
)

NEAR, NEXT = 0.05, 3  # of the dense perplexity, by which one may be above it; how many that are not are named


def perplexities(cells: Cells) -> str:
    """A row for each length and density that is measured: who is near dense attention, and who is behind what."""
    head = ["tokens", "density", f"within {NEAR:.0%} of dense", "the next", f"`{BESIDE}`", f"`{CONTROL}`"]
    rows = []
    for length in TEXT_LENGTHS:
        dense = texts(cells, DENSE, 1.0, length)
        for density in SHOWN:
            found = {name: texts(cells, name, density, length) for name in (*names(cells), CONTROL)}
            found = {name: own for name, own in found.items() if len(own) == len(dense) == len(TEXTS)}
            over = {name: score(own) / score(dense) - 1 for name, own in found.items()}
            control = found.pop(CONTROL, None)
            if not control:
                continue
            order = sorted(found, key=over.__getitem__)
            near = [name for name in order if over[name] <= NEAR]
            some = (near, order[len(near) : len(near) + NEXT])
            rows.append(
                [
                    *(str(length), f"{density:g}"),
                    *(_listed([f"`{name}` {over[name]:+.1%}" for name in listed]) for listed in some),
                    *(f"{over[name]:+.1%}" if name in over else MISSING for name in (BESIDE, CONTROL)),
                    _listed([f"`{name}`" for name in found if behind(cells, name, density, length)]),
                    _listed([f"`{name}`" for name, own in found.items() if against(own, control) != BETTER]),
                ]
            )
    return table([*head, f"behind `{BESIDE}`", "not better than the control"], rows)


def keys(cells: Cells) -> str:
    """A row for each length and density that is measured: who finds all keys that dense attention does, who none."""
    rows = []
    for length in KEY_LENGTHS:
        dense = tried(cells, DENSE, 1.0, length)
        wanted = [place for place, one in enumerate(dense) if one["exact"]]
        for density in SHOWN:
            exact = {name: [one["exact"] for one in tried(cells, name, density, length)] for name in names(cells)}
            exact = {name: found for name, found in exact.items() if found}
            if not (wanted and exact):
                continue
            every = [f"`{name}`" for name, found in exact.items() if all(found[place] for place in wanted)]
            none = [f"`{name}`" for name, found in exact.items() if not any(found[place] for place in wanted)]
            looking = [found for name, found in exact.items() if name not in STATIC]
            depths = [
                f"{one['depth']:.0%}: {sum(found[place] for found in looking)}" for place, one in enumerate(dense)
            ]
            by_depth = f"of {len(looking)}, {', '.join(depths)}"
            rows.append([str(length), f"{density:g}", _listed(every), _listed(none), by_depth])
    head = ["tokens", "density", "all that dense finds", "none of them", "found at each depth by those that look"]
    return table(head, rows)


def _listed(found: list[str]) -> str:
    return ", ".join(found) or "none"
