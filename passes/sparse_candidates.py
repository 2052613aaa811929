"""Patterns of about equal cost, of which a search may give each head the one that suits it.

Source: the search space of Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv 2407.02490, section 3.2 (methods, llm
1.4): a-shape, vertical-slash between many columns and many diagonals, and tiles.  Differs: sizes follow from the length
and the budget, where the release has a fixed list for 30k tokens.
"""

from __future__ import annotations

from math import ceil

from .methods.a_shape import AShape
from .methods.block_sparse import BlockSparse
from .methods.vertical_slash import VerticalSlash
from .sparse import SparseAttention

SHORTEST = 64  # tokens below which no pattern of tiles leaves anything out
PARTS = ((1, 8), (1, 2), (7, 8))  # of a vertical-slash budget that columns have
SPREAD = (1, 4, 16)  # a diagonal that stands alone costs as much as a tile; neighbours share theirs


def candidates(tokens: int, budget: float, share: str = "query") -> list[SparseAttention]:
    """Patterns that read about `budget` of the causal pairs of `tokens` tokens, 64 or more.

    Tiles are a 64th of the prompt, between 16 and 64: larger ones leave little choice, and diagonals cost too much.
    """
    block = 64 if tokens >= 4096 else 32 if tokens >= 2048 else 16
    window = _window(tokens, budget)
    sink = min(64, window // 4)
    found: list[SparseAttention] = [AShape(sink=sink, local=max(1, window - sink))]
    estimate = max(1, min(64, tokens // 32))
    # a row of a tile's queries reads up to two tiles more than it chose
    free = max(_window(tokens, budget - estimate / tokens) - 2 * block, 4)
    for part, whole in PARTS:
        columns = max(1, free * part // whole)
        for spread in SPREAD:
            slashes = max(2, (free - columns) // spread)
            near, sinks = min(100, slashes // 2), min(30, columns // 4)
            chosen = {"columns": columns, "slashes": slashes, "sink": sinks, "near": near}
            one = VerticalSlash(**chosen, estimate=estimate, share=share, block=block)
            found += [one] if one not in found else []
    return [*found, BlockSparse(density=_density(tokens, budget, block), block=block, share=share)]


def _window(tokens: int, budget: float) -> int:
    """The widest window that reads at most `budget` of the causal pairs."""
    allowed = budget * tokens * (tokens + 1) / 2
    width = 1
    while width < tokens and (width + 1) * tokens - width * (width + 1) // 2 <= allowed:
        width += 1
    return width


def _density(tokens: int, budget: float, block: int) -> float:
    """The largest density, in steps of 1/200, at which tiles read at most `budget` of the causal pairs."""
    allowed = budget * tokens * (tokens + 1) / 2
    rows = ceil(tokens / block)

    def pairs(density: float) -> int:
        tiles = (max(ceil(density * (row + 1)), min(2, row + 1)) - 1 for row in range(rows))
        return sum(block * block * count + block * (block + 1) // 2 for count in tiles)

    return max((step / 200 for step in range(1, 201) if pairs(step / 200) <= allowed), default=1 / 200)
