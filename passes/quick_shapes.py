"""`quick_shapes`: shape rules for the ops that most of a transformer consists of, while a graph is executed again.

With a symbolic size torch finds the shape of a matrix product or a normalisation by executing its decomposition on fake
tensors, and the strides of a view by splitting and joining axes one after the other: more than half the time of a
rewrite.  The rules here say the same at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._prims_common import is_contiguous_or_false, make_contiguous_strides_for
from torch._subclasses import fake_impls

aten = torch.ops.aten


@contextmanager
def quick_shapes() -> Iterator[None]:
    """Use the rules inside; fake modes of all threads see them, and get what torch would say, only sooner."""
    rules: dict[Any, Callable[..., Any]] = fake_impls.get_fast_op_impls()
    added = {op: rule for op, rule in RULES.items() if op not in rules}
    rules.update(added)
    try:
        yield
    finally:
        for op in added:
            del rules[op]


def _mm(mode: Any, a: Tensor, b: Tensor) -> Tensor:
    torch._check(a.dim() == 2 and b.dim() == 2, lambda: f"expected matrices, got {a.dim()}D and {b.dim()}D")
    torch._check(
        a.shape[1] == b.shape[0],
        lambda: f"mat1 and mat2 shapes cannot be multiplied ({_shown(a)} and {_shown(b)})",
    )
    _check_dtypes(a, b)
    with mode:
        return a.new_empty((a.shape[0], b.shape[1]))


def _addmm(mode: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    _check_dtypes(a, bias)
    result = _mm(mode, a, b)
    pairs = zip(bias.shape[::-1], (b.shape[1], a.shape[0]), strict=False)  # a vector has no rows
    torch._check(
        bias.dim() <= 2 and all(size in (1, other) for size, other in pairs),
        lambda: f"a bias of shape {_shown(bias)} does not fit a product of shape {_shown(result)}",
    )
    return result


def _layer_norm(
    mode: Any, x: Tensor, shape: Sequence[Any], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.dim() - len(shape)
    for sizes in (x.shape[kept:], *(one.shape for one in (weight, bias) if one is not None)):
        torch._check(tuple(sizes) == tuple(shape), lambda: f"layer_norm: input, weight or bias is not of {shape}")
    with mode:
        moments = (*x.shape[:kept], *(1 for _ in shape))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, rstd = (x.new_empty(moments, dtype=wide) for _ in range(2))
        return x.new_empty(x.shape), mean, rstd


def _gelu(mode: Any, x: Tensor, *, approximate: str = "none") -> Tensor:
    if not is_contiguous_or_false(x):
        with mode:
            return decomposition_table[aten.gelu.default](x, approximate=approximate)
    torch._check(x.dtype.is_floating_point, lambda: f"GELU is not for {x.dtype}")
    with mode:
        return x.new_empty(x.shape)


def _view(mode: Any, x: Tensor, sizes: Sequence[Any]) -> Tensor:
    """Entries that lie in order, in another shape; other views are left to torch."""
    sizes_are_known = all(isinstance(size, torch.SymInt) or size > 0 for size in sizes)
    if not (x.dim() and sizes and sizes_are_known and is_contiguous_or_false(x)):
        return fake_impls.op_implementations_dict[aten.view.default](mode, aten.view.default, x, sizes)
    before, after = _different(x.shape, sizes)
    torch._check(
        math.prod(before) == math.prod(after),
        lambda: f"a tensor of shape {_shown(x)} has no view of sizes {list(sizes)}",
    )
    with mode:
        return torch.as_strided(x, sizes, make_contiguous_strides_for(tuple(sizes)), x.storage_offset())


def _different(before: Sequence[Any], after: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The sizes of both without those that both have: products of symbols take long to multiply and compare."""
    rest = list(after)
    only = []
    for size in before:
        place = next((i for i, other in enumerate(rest) if _expression(size) == _expression(other)), None)
        if place is None:
            only.append(size)
        else:
            del rest[place]
    return only, rest


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _check_dtypes(a: Tensor, b: Tensor) -> None:
    torch._check(a.dtype == b.dtype, lambda: f"expected the same dtype, got {a.dtype} and {b.dtype}")


def _shown(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.native_layer_norm.default: _layer_norm,
    aten.gelu.default: _gelu,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}
