"""The builders of attention indices against their definitions, one row at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch

import tamis.kernels  # noqa: F401  (registers the ops)


def walked(distances: list[int], columns: list[int], tokens: int, block: int) -> list[tuple[list[int], list[int]]]:
    """Tiles and columns of each row, by walking over the diagonals from left to right."""
    found = []
    for row in range(-(-tokens // block)):
        end, at = (row + 1) * block, None
        tiles: list[int] = []
        for distance in sorted((d for d in distances if 0 <= d < min(tokens, end)), reverse=True):
            stop = max(end - distance, block)
            if at is None or stop > at + block:
                at = stop
            elif stop > at:
                at += block
            else:
                continue
            tiles.append(at - block)
        tiles = [start for start in tiles if start < tokens]
        last = max(tiles, default=-1)
        alone = [c for c in columns if 0 <= c < last and not any(t <= c < t + block for t in tiles)]
        found.append((tiles, alone))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_slash_tiles_are_those_of_the_walk(seed: int) -> None:
    draw = random.Random(seed)
    tokens, block = draw.randint(1, 60), draw.randint(1, 7)
    distances = draw.sample(range(tokens), draw.randint(1, min(tokens, 9)))
    distances = sorted({0, *distances[1:]})
    columns = sorted(draw.sample(range(tokens), min(tokens, 5)))
    index = torch.ops.tamis.slash_tiles(torch.tensor([[distances]]), torch.tensor([[columns]]), tokens, block)
    tiles, alone = ([[x for x in row if x >= 0] for row in part[0, 0].tolist()] for part in index)
    assert list(zip(tiles, alone, strict=True)) == walked(distances, columns, tokens, block)
    for row, (row_tiles, row_alone) in enumerate(zip(tiles, alone, strict=True)):
        read = {k for start in row_tiles for k in range(start, start + block)} | set(row_alone)
        for query in range(row * block, min(tokens, (row + 1) * block)):
            wanted = {query - d for d in distances if d <= query} | {c for c in columns if c <= query}
            assert wanted <= read, "every chosen pair is read"


@pytest.mark.parametrize("seed", range(40))
def test_picked_tiles_are_those_of_the_definition(seed: int) -> None:
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    tiles, block = draw.randint(1, 9), draw.randint(1, 5)
    length = draw.randint(1, tiles * block)
    causal, sink, diagonal = (draw.random() < 0.6 for _ in range(3))
    keep = draw.choice([[0, 2, 1], [0, 50, 1], [1, 2, 3], [1, 0, 1]])
    mass = draw.choice([0.0, 0.3, 0.8, 1.0, 2.0])
    scores = torch.randint(0, 6, (1, 1, tiles, tiles), generator=generator).float()  # with ties
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = -torch.inf
    got = torch.ops.tamis.pick_tiles(scores, torch.tensor([length]), block, causal, sink, diagonal, keep, mass)
    for row in range(tiles):
        may = [c for c in range(tiles) if c * block < length and row * block < length and (c <= row or not causal)]
        always = [c for c in may if (sink and c == 0) or (diagonal and c == row)]
        line = scores[0, 0, row]
        rest = sorted((c for c in may if c not in always and line[c] > -math.inf), key=lambda c: (-float(line[c]), c))
        worth = {c: max(float(line[c]), 0.0) for c in (*always, *rest)}
        many, held, chosen = (keep[0] * len(may) + keep[1]) // keep[2], 0.0, []
        for c in (*always, *rest):
            within = len(chosen) < many and (mass >= 1 or held < mass * sum(worth.values()))
            if c in always or within:
                chosen.append(c)
            held += worth[c]
        assert [x for x in got[0, 0, row].tolist() if x >= 0] == sorted(c * block for c in chosen)


def test_all_the_mass_is_everything() -> None:
    """Sums in float32 that stop short of 1 do not cost a tile."""
    scores = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for mass in (1.0, 1.0000001):
        tiles = torch.ops.tamis.pick_tiles(scores, None, 4, True, False, False, [1, 0, 1], mass)
        assert (tiles >= 0).sum(-1)[0, 0].tolist() == list(range(1, 41))
