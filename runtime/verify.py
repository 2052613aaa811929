"""How far a result moved from its original: `drift` compares the outputs of one call, `combine` adds calls up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputMismatch
from ..report import Drift

RESTORE_HINT = "the result has another shape (restore=False)"


def drift(original: Any, result: Any, mask: Tensor | None = None, token_outputs: frozenset[int] | None = None) -> Drift:
    """Compare the outputs of one call, in float64.

    A row is a batch entry.  Tokens that `mask` hides are left out of outputs with a token axis: those in
    `token_outputs` (flat indices), or when that is None those of shape [B, N, ...] with three or more dimensions.

    Args:
        original: outputs of the original, nested as the model returns them; every tensor has the batch first.
        result: outputs of the result, nested alike.
        mask: [B, N], nonzero for real tokens.
        token_outputs: flat indices of outputs whose dimension 1 is the token axis.

    Raises:
        InputMismatch: the two are not nested alike.
    """
    before, spec = pytree.tree_flatten_with_path(original)
    after, other = pytree.tree_flatten(result)
    if len(after) != len(before):
        rule = f"the original's structure {spec}"
        raise InputMismatch(where="outputs", rule=f"must have {rule}", got=other, hint="compare outputs of one model.")
    per_output: dict[str, float] = {}
    cosines, top1, left_out, rows = [1.0], None, {}, 0
    for index, ((path, y0), y1) in enumerate(zip(before, after, strict=True)):
        name = pytree.keystr(path).strip("[]'\".") or "output"
        if not isinstance(y0, Tensor) or not y0.is_floating_point() or y0.ndim == 0:
            continue
        if y0.shape != y1.shape:
            left_out[name] = RESTORE_HINT
            continue
        keep = mask if mask is not None and _has_tokens(index, y0, mask, token_outputs) else None
        per_output[name], cosine = _compare(y0, y1, keep)
        cosines.append(cosine)
        rows = max(rows, y0.shape[0])
        if _looks_like_logits(name, y0, len(before)):
            top1 = float((y0.argmax(1) == y1.argmax(1)).double().mean())
    return Drift(max(per_output.values(), default=0.0), min(cosines), top1, rows, per_output, left_out)


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


def token_outputs_of(program: Any, mask_name: str) -> frozenset[int]:
    """Flat indices of the program's user outputs whose dimension 1 is the token axis of the input called `mask_name`.

    A dynamic length is told apart by its symbol; a static one by its size, in outputs of three or more dimensions.
    """
    from .inputs import input_nodes

    mask = next(node for node in input_nodes(program) if node.name == mask_name).meta["val"]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found = []
    for index, name in enumerate(program.graph_signature.user_outputs):
        shape: Any = getattr(values.get(name), "shape", ())
        if len(shape) < 2 or str(shape[1]) != str(mask.shape[1]):
            continue
        if len(shape) >= 3 or isinstance(mask.shape[1], torch.SymInt):
            found.append(index)
    return frozenset(found)


def _compare(y0: Tensor, y1: Tensor, keep: Tensor | None) -> tuple[float, float]:
    """Largest relative L2 difference and smallest cosine over rows."""
    a, b = y0.detach().double(), y1.detach().to(y0.device).double()
    if keep is not None:
        real = keep.bool().to(a.device).reshape(*keep.shape, *[1] * (a.ndim - 2))
        a, b = a.where(real, 0.0), b.where(real, 0.0)
    a, b = a.flatten(1), b.flatten(1)
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


def _has_tokens(index: int, y: Tensor, mask: Tensor, token_outputs: frozenset[int] | None) -> bool:
    if y.ndim < 2 or tuple(y.shape[:2]) != tuple(mask.shape):
        return False
    return y.ndim >= 3 if token_outputs is None else index in token_outputs


def _looks_like_logits(name: str, y: Tensor, outputs: int) -> bool:
    return y.ndim == 2 and y.shape[1] > 1 and ("logits" in name or outputs == 1)
