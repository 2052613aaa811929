"""A picture of where tokens went: the image of a row, once for each reduction, with what was dropped and merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..drawing_errors import CannotDraw
from ..errors import MissingDependency
from .files import whole
from .inputs import Call, input_nodes
from .journey import Stage, journey

if TYPE_CHECKING:
    from .compiled import CompiledModel

COLUMNS, INCHES, DOTS = 4, 2.4, 110
DIMMED = 0.82  # of a dropped patch is paper
TINTED = 0.75  # of a merged patch is the mean colour of its group
INSET = 0.06  # of a patch, between its edge and its outline
DROPPED = "Pale: dropped."
MERGED = "Outlined: merged; patches of one colour are one token, side by side or apart (far apart colours repeat)."
KEPT = "As it was: a token of its own."
HUES = 0.2, 0.4  # turns of the colour circle to the group led by the patch below, and by that beside
VALUES = 0.95, 0.55  # so that of groups whose first patches are at most two apart, hue or brightness differs clearly


def draw(model: CompiledModel, path: Path, call: Call, row: int, *, overwrite: bool) -> None:
    """Write the picture; see `CompiledModel.draw`."""
    if path.suffix != ".png":
        raise CannotDraw(where=path, reason="only .png files are drawn", hint="end the name in .png.")
    figure = _figure_class()
    image = _image(model, call, row)
    stages = journey(model.graph.program, call, model.report)
    if not stages:
        _refuse(model, "the program reduces no tokens", "compile it with a pass.")
    grid = _grid(model, stages[0].source.shape[1], image)
    panels = [_shown(image, grid, None), *(_shown(image, grid, _patches(model, one, row)) for one in stages)]
    titles = [f"{grid[0] * grid[1]} patches of {image.shape[0] // grid[0]} x {image.shape[1] // grid[1]} pixels"]
    titles += map(_title, stages)
    with whole(path, overwrite) as temporary:
        page = _page(
            figure, panels, titles, model.report.headline(), _key([_patches(model, one, row) for one in stages])
        )
        page.savefig(temporary, format="png", dpi=DOTS, metadata={"Software": None})


def _figure_class() -> Any:
    """Matplotlib's Figure, which needs no display and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(what="drawing", package="matplotlib", install="'tamis[draw]'") from error
    return Figure


def _image(model: CompiledModel, call: Call, row: int) -> Tensor:
    """One row of the image input, [H, W, 3] between 0 and 1."""
    from torch.utils import _pytree as pytree

    found = [
        value
        for _, value in zip(input_nodes(model.graph.program), pytree.tree_leaves(call), strict=False)
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point() and value.shape[1] in (1, 3)
    ]
    if len(found) != 1:
        reason = f"{len(found) or 'none'} of its inputs {'is an image' if len(found) < 2 else 'are images'}"
        _refuse(model, f"{reason} [batch, 1 or 3, height, width]", "pictures are for models of one image.")
    if isinstance(row, bool) or not isinstance(row, int) or not -found[0].shape[0] <= row < found[0].shape[0]:
        _refuse(model, f"there is no row {row} among {found[0].shape[0]}", "rows count from 0.")
    image = found[0][row].detach().float().cpu()
    low, high = (torch.quantile(image.flatten(), share) for share in (0.005, 0.995))
    image = ((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)  # undoes whatever the model's normalisation is
    return image.expand(3, -1, -1).permute(1, 2, 0)


def _grid(model: CompiledModel, tokens: int, image: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches; for a loaded program, which does not say, those of the image's shape."""
    patches = tokens - model.report.prefix
    if model.original is not None:
        grid = model.original.grid
    else:
        rows = round(math.sqrt(patches * image.shape[0] / image.shape[1]))
        grid = (rows, patches // max(rows, 1))
    if grid is None or grid[0] * grid[1] != patches or image.shape[0] % grid[0] or image.shape[1] % grid[1]:
        _refuse(model, f"its {patches} tokens are no grid of patches of the image", "only plain grids can be drawn.")
    return grid


def _refuse(model: CompiledModel, reason: str, hint: str) -> NoReturn:
    raise CannotDraw(where=model.report.name, reason=reason, hint=hint)


def _patches(model: CompiledModel, stage: Stage, row: int) -> list[int]:
    """Slot of every patch in raster order."""
    slots: list[int] = stage.source[row, model.report.prefix :].tolist()
    return slots


def _title(stage: Stage) -> str:
    where = "" if stage.layer is None else f"layer {stage.layer}: "
    return f"{where}{stage.before} to {stage.tokens} tokens{' inside' if stage.inside else ''}"


def _shown(image: Tensor, grid: tuple[int, int], slots: list[int] | None) -> dict[str, Any]:
    """What a panel shows: the picture, and lines around groups with their colours."""
    if slots is None:
        return {"picture": image.numpy(), "grid": grid, "lines": [], "colours": []}
    groups: dict[int, list[int]] = {}
    for place, slot in enumerate(slots):
        groups.setdefault(slot, []).append(place)
    cells = image.unflatten(1, (grid[1], -1)).unflatten(0, (grid[0], -1)).permute(0, 2, 1, 3, 4).flatten(0, 1).clone()
    for slot, members in groups.items():
        if slot == -1:
            cells[members] = (1 - DIMMED) * cells[members].mean(-1, keepdim=True) + DIMMED
        elif len(members) > 1:
            mean = cells[members].mean((0, 1, 2))
            cells[members] = (1 - TINTED) * cells[members] + TINTED * mean
    picture = cells.unflatten(0, grid).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    first = {slot: members[0] for slot, members in groups.items() if slot >= 0 and len(members) > 1}
    lines, colours = _outlines(slots, grid, first)
    return {"picture": picture.numpy(), "grid": grid, "lines": lines, "colours": colours}


def _outlines(slots: list[int], grid: tuple[int, int], first: dict[int, int]) -> tuple[list[Any], list[Any]]:
    """Lines in patches, ((column, row), (column, row)), along the edges of merged groups, and the colour of each.

    A line lies a little inside of its patch, so that both groups at an edge show theirs.  The colour goes by the first
    patch of a group, `first`, so that a group keeps it from panel to panel.
    """
    lines, colours = [], []
    for place, slot in enumerate(slots):
        if slot not in first:
            continue
        r, c = divmod(place, grid[1])

        def same(row: int, column: int, slot: int = slot) -> bool:
            inside = 0 <= row < grid[0] and 0 <= column < grid[1]
            return inside and slots[row * grid[1] + column] == slot

        up, down, left, right = same(r - 1, c), same(r + 1, c), same(r, c - 1), same(r, c + 1)
        x = (c - INSET if left else c + INSET, c + 1 + INSET if right else c + 1 - INSET)
        y = (r - INSET if up else r + INSET, r + 1 + INSET if down else r + 1 - INSET)
        edges = [] if up else [((x[0], y[0]), (x[1], y[0]))]
        edges += [] if down else [((x[0], y[1]), (x[1], y[1]))]
        edges += [] if left else [((x[0], y[0]), (x[0], y[1]))]
        edges += [] if right else [((x[1], y[0]), (x[1], y[1]))]
        lines += edges
        colours += [_colour(*divmod(first[slot], grid[1]))] * len(edges)
    return lines, colours


def _colour(row: int, column: int) -> tuple[float, float, float]:
    """Of the group whose first patch is there: ten colours, which repeat five patches on."""
    from colorsys import hsv_to_rgb

    return hsv_to_rgb((row * HUES[0] + column * HUES[1]) % 1, 0.9, VALUES[(row + column) % 2])


def _key(panels: list[list[int]]) -> str:
    """What the picture's marks mean, those that it has, from the slots of the patches in each panel."""
    dropped = any(-1 in slots for slots in panels)
    merged = any(len(set(kept)) < len(kept) for slots in panels for kept in [[slot for slot in slots if slot >= 0]])
    return "   ".join([DROPPED] * dropped + [MERGED] * merged + [KEPT])


def _page(figure: Any, panels: list[dict[str, Any]], titles: list[str], headline: str, key: str) -> Any:
    from matplotlib.collections import LineCollection

    rows_of, columns_of = panels[0]["picture"].shape[:2]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = INCHES * rows_of / columns_of + 0.2
    page = figure(figsize=(columns * INCHES, rows * height + 0.5))
    page.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02, hspace=0.01, wspace=0.01)
    page.suptitle(headline, fontsize=9)
    page.supxlabel(key, fontsize=8)
    for axis in (axes := list(page.subplots(rows, columns, squeeze=False).flat)):
        axis.set_axis_off()
    for axis, panel, title in zip(axes, panels, titles, strict=False):
        grid = panel["grid"]
        axis.imshow(panel["picture"], extent=(0, grid[1], grid[0], 0), interpolation="nearest")
        axis.add_collection(LineCollection(panel["lines"], colors=panel["colours"], linewidths=1.1), autolim=False)
        axis.set_title(title, fontsize=8)
    return page
