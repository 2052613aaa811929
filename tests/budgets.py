"""How far a kernel may be from the truth: twice as far as the reference is in the same precision."""

from __future__ import annotations

from typing import Any

import torch


def results(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple | list) else [value]


def in_float64(args: Any) -> list[Any]:
    """The arguments with every float tensor in float64, as the oracle takes them."""
    return [arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]


def assert_within_budget(got: Any, reference: Any, exact: Any) -> None:
    """Shapes and types as the reference's; integers equal; floats at most twice the reference's error from `exact`.

    A reference that happens to be exact would leave no room at all, so a unit in the last place is always allowed.
    """
    for have, ours, truth in zip(results(got), results(reference), results(exact), strict=True):
        assert (have.shape, have.dtype) == (ours.shape, ours.dtype)
        if not have.is_floating_point():
            assert torch.equal(have, ours)
        elif have.numel():
            _assert_close(have.double(), ours.double(), truth.double(), torch.finfo(have.dtype).eps)


def _assert_close(have: torch.Tensor, ours: torch.Tensor, truth: torch.Tensor, unit: float) -> None:
    special = ~truth.isfinite()
    assert torch.equal(have[special].nan_to_num(7.0), truth[special].nan_to_num(7.0))
    have, ours, truth = (x.masked_fill(special, 0.0) for x in (have, ours, truth))
    error, usual, scale = ((x.abs().amax().item()) for x in (have - truth, ours - truth, truth))
    assert error <= 2 * usual + unit * scale, f"error {error:.3g}, the reference's {usual:.3g}, scale {scale:.3g}"
