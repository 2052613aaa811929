"""tomesd: merging around the attention of diffusion models, undone behind it.

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023, arXiv 2303.17604; code
dbolya/tomesd (methods card 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...counts import CountRule, at_most, keep_at_least
from ...errors import BadParameter
from ...kernels.hash_scores import hash_scores
from ...registry import register
from ...tokens import Plan, Tokens
from ..sub_layers import Place, SubLayerReduction


@register("tomesd")
@dataclass(frozen=True)
class ToMeSD(SubLayerReduction):
    """Merge tokens of an image into a token of each cell before a sub-layer, and copy the results back behind it.

    In every cell of sy x sx tokens one is a destination, the same in every row of the batch; of the others those most
    similar to a destination (cosine of what enters the block) merge into it, as a plain mean.  The plan is made once
    per block and used around each of its sub-layers.  Tokens outside complete cells are no destinations.

    Differs from the code: the destinations are drawn by a hash of (seed, block, cell), the same at every step of a
    diffusion and for any batch; class and register tokens of other models stay as they are; the image that
    `max_downsample` counts from is what the model's first convolution makes of its input (in a U-Net, the latent).
    Blocks with causal attention or a padding mask are left whole, with the reason: cells are those of an image.

    Args:
        keep_ratio: fraction of tokens kept inside, 0.5 by default (the paper's ratio is 1 - keep_ratio).  At most
            1 - 1/(sx*sy) of them can merge; where more was asked for, the report says so.
        r: tokens merged, instead of keep_ratio.
        max_downsample: only blocks whose tokens lie at most so much coarser than the image.
        sx, sy: columns and rows of a cell.
        use_rand: draw the destination of each cell; off: its first token.
        seed: another draw for each.
        merge_attn, merge_crossattn, merge_mlp: around which sub-layers.
        image: rows and columns of the image, where the model has no convolution that says them.
    """

    keep_ratio: float | None = None
    r: int | None = None
    max_downsample: int = 1
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    seed: int = 0
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    image: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", 0.5)
        if isinstance(self.image, list):
            object.__setattr__(self, "image", tuple(self.image))
        ratio, r, image = self.keep_ratio, self.r, self.image
        for name, rule, holds in (
            ("r or keep_ratio", "given, one of them", r is None or ratio is None),
            ("keep_ratio", "in (0, 1]", ratio is None or 0 < ratio <= 1),
            ("r", "a whole number >= 0", r is None or r >= 0),
            ("max_downsample", "a whole number >= 1", self.max_downsample >= 1),
            ("sx", "a whole number >= 1", self.sx >= 1),
            ("sy", "a whole number >= 1", self.sy >= 1),
            ("merge_attn", "true, or another sub-layer is named", bool(self.kinds)),
            ("image", "two whole numbers, rows and columns", image is None or _is_image(image)),
        ):
            if not holds:
                got = getattr(self, name, "both")
                raise BadParameter(where=self.name, name=name, rule=rule, got=repr(got), hint="see --list-passes.")

    @property
    def kinds(self) -> frozenset[str]:
        """By the switches."""
        switches = {"self": self.merge_attn, "cross": self.merge_crossattn, "mlp": self.merge_mlp}
        return frozenset(kind for kind, on in switches.items() if on)

    def grid_of(self, place: Place) -> tuple[int, int] | None:
        """By the image that the user gave or the model has."""
        image = self.image or place.image
        return None if image is None else place.grid(image)

    def rule(self, place: Place) -> CountRule | str:
        """r or floor(T * (1 - keep_ratio)) of T tokens, at most those that are no destinations."""
        if place.padding != "none":
            return "some tokens may be padding, which lies in no image"
        image = self.image or place.image
        grid = self.grid_of(place)
        if image is None or grid is None:
            size = "no size of the image is known" if image is None else f"the image is {image[0]} x {image[1]}"
            return (
                f"its {place.tokens - place.prefix} tokens lie on no known grid: {size}; image=[rows,columns] gives it"
            )
        step = place.downsampling(image)
        assert step is not None
        if step > self.max_downsample:
            return f"its tokens lie {step} times coarser than the image, max_downsample is {self.max_downsample}"
        cells = (grid[0] // self.sy) * (grid[1] // self.sx)
        if not cells:
            return f"its grid of {grid[0]} x {grid[1]} tokens holds no cell of {self.sy} x {self.sx}"
        amount = at_most(self.r) if self.r is not None else keep_at_least(self.keep_ratio or 1)
        return CountRule(place.prefix, (amount, (1, -cells, 1)))

    def note(self, place: Place) -> str:
        """Whether fewer merge than were asked for."""
        rule = self.rule(place)
        assert isinstance(rule, CountRule)
        asked, most = (CountRule(place.prefix, (term,)).removed(place.tokens) for term in rule.terms)
        if asked <= most:
            return ""
        return f"{asked} tokens were to merge, and {most} can: one of each {self.sy} x {self.sx} cell is merged into"

    def plan(self, tokens: Tokens) -> Plan:
        """Match what enters the block [B, N, C] with the destinations."""
        plan = torch.ops.tamis.match_destinations(tokens.hidden, self._destinations(tokens), tokens.out, tokens.prefix)
        slot, leader, moved = plan
        return Plan(slot, leader, tokens.out, moved, counts_sizes=False, spare=False)

    def _destinations(self, tokens: Tokens) -> Tensor:
        """[M] int64, ascending: one token of each cell."""
        assert tokens.grid is not None
        rows, columns = tokens.grid
        across = columns // self.sx
        cell = torch.arange((rows // self.sy) * across, device=tokens.hidden.device)
        corner = cell // across * self.sy * columns + cell % across * self.sx + tokens.prefix
        if not self.use_rand:
            return corner
        drawn = hash_scores(cell, self.seed, tokens.layer) % (self.sx * self.sy)
        return (corner + drawn // self.sx * columns + drawn % self.sx).sort().values


def _is_image(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(size) is int and size >= 1 for size in value)
