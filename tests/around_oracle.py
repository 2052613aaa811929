"""tomesd by the definition: modules of a model wrapped to merge what they get and to copy back what they give.

Plain torch and Python lists, one token at a time; nothing of the rewriter or its ops is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tamis.kernels.hash_scores import hash_scores

Slots = list[list[int]]


@dataclass(frozen=True)
class Recipe:
    """Parameters of the card: r tokens merge, in cells of sy x sx; seed None: the first token of each cell."""

    r: int
    sx: int = 2
    sy: int = 2
    seed: int | None = 0
    prefix: int = 0


def destinations(recipe: Recipe, rows: int, columns: int, block: int) -> list[int]:
    """One token of each complete cell, ascending."""
    found = []
    across = columns // recipe.sx
    for i in range(rows // recipe.sy):
        for j in range(across):
            draw = 0
            if recipe.seed is not None:
                hashed = hash_scores(torch.tensor(i * across + j), recipe.seed, block)
                draw = int(hashed) % (recipe.sx * recipe.sy)
            y, x = i * recipe.sy + draw // recipe.sx, j * recipe.sx + draw % recipe.sx
            found.append(recipe.prefix + y * columns + x)
    return sorted(found)


def slots_of(x: Tensor, places: Sequence[int], r: int, prefix: int) -> Slots:
    """Tokens of one row [N, C] by slot: the protected, sources that stay by falling similarity, destinations."""
    unit = [row / max(float(row.norm()), 1e-12) for row in x]
    sources = [i for i in range(prefix, len(unit)) if i not in places]
    best = {i: [float(unit[i] @ unit[j]) for j in places] for i in sources}
    goal = {i: max(range(len(places)), key=lambda j, i=i: (best[i][j], -j)) for i in sources}
    order = sorted(sources, key=lambda i: (-best[i][goal[i]], i))
    r = min(r, len(sources))
    joined = [[place, *(i for i in sorted(order[:r]) if goal[i] == j)] for j, place in enumerate(places)]
    return [[i] for i in range(prefix)] + [[i] for i in order[r:]] + joined


def merge(x: Tensor, slots: Sequence[Slots]) -> Tensor:
    """[B, N, C] -> [B, N', C]: the plain mean of every slot."""
    return torch.stack(
        [torch.stack([row[slot].mean(0) for slot in of_row]) for row, of_row in zip(x, slots, strict=True)]
    )


def unmerge(y: Tensor, slots: Sequence[Slots]) -> Tensor:
    """[B, N', C] -> [B, N, C]: every token gets a copy of its slot."""
    rows = []
    for row, of_row in zip(y, slots, strict=True):
        slot_of = {i: place for place, slot in enumerate(of_row) for i in slot}
        rows.append(torch.stack([row[slot_of[i]] for i in range(len(slot_of))]))
    return torch.stack(rows)


@contextmanager
def merged_around(
    blocks: Sequence[tuple[int, nn.Module, Sequence[nn.Module], tuple[int, int]]], recipe: Recipe
) -> Iterator[list[int]]:
    """While inside, (number of the block, the block, its sub-layers, its grid) run on merged tokens.

    -> the tokens that every sub-layer got, in order
    """
    seen: list[int] = []
    undo: list[Any] = []
    for number, block, sub_layers, (rows, columns) in blocks:
        plan: dict[str, Any] = {}

        def decide(_: Any, args: Any, kwargs: Any, plan: Any = plan, at: Any = (rows, columns, number)) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            places = destinations(recipe, *at)
            plan["slots"] = [slots_of(row, places, recipe.r, recipe.prefix) for row in x]

        undo.append(block.register_forward_pre_hook(decide, with_kwargs=True))
        for sub_layer in sub_layers:

            def forward(x: Tensor, *args: Any, plan: Any = plan, own: Any = sub_layer.forward, **kwargs: Any) -> Tensor:
                seen.append(len(plan["slots"][0]))
                return unmerge(own(merge(x, plan["slots"]), *args, **kwargs), plan["slots"])

            sub_layer.forward = forward
    try:
        yield seen
    finally:
        for hook in undo:
            hook.remove()
        for _, _, sub_layers, _ in blocks:
            for sub_layer in sub_layers:
                del sub_layer.forward
