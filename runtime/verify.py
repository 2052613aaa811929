"""How far a result moved from its original: `drift` compares the outputs of one call, `combine` adds calls up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputMismatch
from ..report import Drift
from .inputs import Call, input_nodes, mask_of

RESTORE_HINT = "the result has another shape (restore=False)"


def drift(original: Any, result: Any, mask: Tensor | None = None, token_axes: Mapping[int, int] | None = None) -> Drift:
    """Compare the outputs of one call, in float64.

    A row is a batch entry.  Tokens that `mask` hides are left out of outputs with a token axis: those in `token_axes`
    (flat index -> axis), or when that is None dimension 1 of those of shape [B, N, ...] with three or more.

    Args:
        original: outputs of the original, nested as the model returns them; every tensor has the batch first.
        result: outputs of the result, nested alike.
        mask: [B, N], nonzero for real tokens.
        token_axes: see `token_axes_of`.

    Raises:
        InputMismatch: the two are not nested alike.
    """
    before, spec = _named(original)
    after, other = pytree.tree_flatten(result)
    if len(after) != len(before):
        rule = f"the original's structure {spec}"
        raise InputMismatch(where="outputs", rule=f"must have {rule}", got=other, hint="compare outputs of one model.")
    per_output: dict[str, float] = {}
    cosines, top1, left_out, rows = [1.0], None, {}, 0
    for index, ((name, y0), y1) in enumerate(zip(before, after, strict=True)):
        if not isinstance(y0, Tensor) or not y0.is_floating_point() or y0.ndim == 0:
            continue
        if y0.shape != y1.shape:
            left_out[name] = RESTORE_HINT
            continue
        axis = None if mask is None else _token_axis(index, y0, mask, token_axes)
        if mask is not None and axis is not None:
            y0, y1 = without_padding(y0, mask, axis), without_padding(y1, mask, axis)
        per_output[name], cosine = _compare(y0, y1)
        cosines.append(cosine)
        rows = max(rows, y0.shape[0])
        if _looks_like_logits(name, y0, len(before)):
            top1 = float((y0.argmax(1) == y1.argmax(1)).double().mean())
    return Drift(max(per_output.values(), default=0.0), min(cosines), top1, rows, per_output, left_out)


def _named(outputs: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Each output with its name, and how they are nested."""
    try:
        found, spec = pytree.tree_flatten_with_path(outputs)
    except ValueError:  # a class of outputs (those of diffusers) need not say what its parts are called
        leaves, spec = pytree.tree_flatten(outputs)
        return [(str(index) if len(leaves) > 1 else "output", leaf) for index, leaf in enumerate(leaves)], spec
    return [(pytree.keystr(path).strip("[]'\".") or "output", leaf) for path, leaf in found], spec


def combine(drifts: Sequence[Drift]) -> Drift:
    """The drift over several calls: the worst row, and agreement weighted by rows."""
    rows = sum(d.rows for d in drifts)
    known = [d for d in drifts if d.top1 is not None]
    top1 = (
        sum(d.top1 * d.rows for d in known if d.top1 is not None) / max(1, sum(d.rows for d in known))
        if known
        else None
    )
    outputs = {name: max(d.outputs.get(name, 0.0) for d in drifts) for name in drifts[0].outputs}
    worst = max(d.relative_l2 for d in drifts)
    return Drift(worst, min(d.cosine for d in drifts), top1, rows, outputs, drifts[0].left_out)


def token_axes_of(program: Any, mask_name: str, *, skip_none: bool = False) -> dict[int, int]:
    """Which axis holds the tokens of the input called `mask_name`, by flat index of the outputs that have them.

    skip_none  count only outputs that are not None

    A dynamic length is told apart by its symbol; a static one by its size, as dimension 1 of three or more.
    """
    mask = next(node for node in input_nodes(program) if node.name == mask_name).meta["val"]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found = {}
    names = [name for name in program.graph_signature.user_outputs if name is not None or not skip_none]
    for index, name in enumerate(names):
        shape: Any = getattr(values.get(name), "shape", ())
        dynamic = isinstance(mask.shape[1], torch.SymInt)
        axes = range(1, len(shape)) if dynamic else range(1, 2) if len(shape) >= 3 else ()
        axis = next((axis for axis in axes if str(shape[axis]) == str(mask.shape[1])), None)
        if axis is not None:
            found[index] = axis
    return found


def real_tokens_of(program: Any) -> Callable[[Call, int, Any], Any]:
    """A function that takes padding out of an output: of a call and a flat index (None does not count) and a value."""
    axes: dict[str, dict[int, int]] = {}

    def real(call: Call, place: int, value: Any) -> Any:
        mask = mask_of(program, call)
        if mask is None or not isinstance(value, Tensor):
            return value
        if mask[0] not in axes:
            axes[mask[0]] = token_axes_of(program, mask[0], skip_none=True)
        axis = _token_axis(place, value, mask[1], axes[mask[0]])
        return value if axis is None else without_padding(value, mask[1], axis)

    return real


def without_padding(y: Tensor, mask: Tensor, axis: int) -> Tensor:
    """An output with zeros where `mask` [B, N] hides the tokens along `axis`."""
    shape = [1] * y.ndim
    shape[0], shape[axis] = mask.shape
    return y.where(mask.bool().to(y.device).reshape(shape), 0)


def _compare(y0: Tensor, y1: Tensor) -> tuple[float, float]:
    """Largest relative L2 difference and smallest cosine over rows; of one axis, every number is a row."""
    if not y0.numel():
        return 0.0, 1.0
    a, b = (y.detach().to(y0.device).double().reshape(y0.shape[0], -1) for y in (y0, y1))
    # Equal infinities (a mask written into logits) are no difference, and no part of the norms.
    same = (a == b) & a.isinf()
    a, b = a.where(~same, 0.0), b.where(~same, 0.0)
    difference, norm = (a - b).norm(dim=1), a.norm(dim=1)
    relative = torch.where(difference == 0, torch.zeros_like(norm), difference / norm)
    cosine = torch.where(difference == 0, torch.ones_like(norm), (a * b).sum(1) / (norm * b.norm(dim=1)))
    return _finite_or(relative.max(), math.inf), _finite_or(cosine.nan_to_num(nan=-1.0).min(), -1.0)


def _finite_or(value: Tensor, otherwise: float) -> float:
    number = float(value)
    return number if math.isfinite(number) else otherwise


def _token_axis(index: int, y: Tensor, mask: Tensor, token_axes: Mapping[int, int] | None) -> int | None:
    axis = token_axes.get(index) if token_axes is not None else 1 if y.ndim >= 3 else None
    fits = axis is not None and y.ndim > axis and (y.shape[0], y.shape[axis]) == tuple(mask.shape)
    return axis if fits else None


def _looks_like_logits(name: str, y: Tensor, outputs: int) -> bool:
    return y.ndim == 2 and y.shape[1] > 1 and ("logits" in name or outputs == 1)
