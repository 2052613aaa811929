"""Random tiles: the control that every method which chooses keys must beat at the same number of pairs.

The counterpart of random drop (`random`) for sparse attention; the draw is an integer hash, the same in torch and in
ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention_index import Heads
from ...registry import register
from ..sparse_scores import drawn_tiles
from .block_sparse import TileMethod


@register("random-tiles")
@dataclass(frozen=True)
class RandomTiles(TileMethod):
    """Every row of queries reads random tiles, the first and its own among them: a control, not a method.

    The draw goes by (seed, layer, list, row, tile) and by nothing in the input.

    Args:
        density: of the tiles that a row may read, at most this fraction is read (rounded up); 1.0 is dense attention.
        block: tokens of a tile.
        share: who shares a draw: each "query" head, each "kv" head, or the "layer".
        sink: always read the first tile; not in layers with a window of the model's own.
        diagonal: always read the row's own tile.
        seed: another draw for each.
        layers: layers to use it in; all of them by default.
    """

    bidirectional = True

    seed: int = 0

    def scores(self, heads: Heads) -> Tensor:
        """A hash of each tile."""
        lists = {"layer": 1, "kv": heads.keys.shape[1], "query": heads.queries.shape[1]}[self.share]
        scope = torch.arange(lists, device=heads.queries.device).reshape(1, lists, 1, 1)
        return drawn_tiles(heads, self.block, self.seed, scope)
