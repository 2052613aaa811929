"""`Known`: a value that is known while the model is captured, such as a size; it leaves no trace in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import SymBool, SymFloat, SymInt, Tensor

SMALL = 4096  # entries; larger values are tensors
Array = np.ndarray[Any, Any]

NUMPY = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}
NUMPY |= {
    dtype: np.dtype(str(dtype).removeprefix("torch."))
    for dtype in (
        torch.bool,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
}
_TORCH = {array: dtype for dtype, array in NUMPY.items()}


@dataclass(frozen=True, eq=False)
class Known:
    """An array of numbers, some of which may be symbolic sizes (then numpy's dtype is object).

    data   the numbers
    dtype  what they are as a tensor
    """

    data: Array
    dtype: torch.dtype

    @staticmethod
    def of(data: Any, dtype: torch.dtype | None = None) -> Known:
        """From an array, a number or a list; arrays of objects without symbols become arrays of numbers."""
        array = np.asarray(data)
        if array.dtype == object and not any(isinstance(x, SymInt | SymFloat | SymBool) for x in array.flat):
            array = array.astype(NUMPY[dtype or torch.int64])
        dtype = dtype or _TORCH.get(array.dtype, torch.int64)
        return Known(array if array.dtype == object else array.astype(NUMPY[dtype], copy=False), dtype)

    @property
    def is_symbolic(self) -> bool:
        """Whether some of its numbers are symbols."""
        return self.data.dtype == object

    def number(self) -> Any:
        """The one number in it, as Python's or a symbol."""
        assert self.data.size == 1
        return self.data.reshape(-1)[0] if self.is_symbolic else self.data.reshape(-1)[0].item()

    def numbers(self) -> list[Any]:
        """All numbers in order, as Python's or symbols."""
        return list(self.data.reshape(-1)) if self.is_symbolic else self.data.reshape(-1).tolist()

    def tensor(self) -> Tensor:
        """As a tensor; symbols become nodes of the graph that is being traced."""
        if not self.is_symbolic:
            # bfloat16 has no form in lists but floats, which hold it exactly
            return torch.tensor(self.data.tolist(), dtype=self.dtype).reshape(self.data.shape)
        scalars = [torch.scalar_tensor(x, dtype=self.dtype) for x in self.numbers()]
        return (
            scalars[0].reshape(self.data.shape) if len(scalars) == 1 else torch.stack(scalars).reshape(self.data.shape)
        )


def small(tensor: Tensor) -> Known | None:
    """A tensor of the file as a known value, if it is a number, or a short list of integers or truth values."""
    listed = tensor.ndim <= 1 and tensor.numel() <= 64 and not (tensor.is_floating_point() or tensor.is_complex())
    if tensor.dtype not in NUMPY or not (listed or tensor.numel() == 1):
        return None
    return known(tensor)


def known(tensor: Tensor) -> Known:
    """A real tensor's values."""
    if tensor.dtype == torch.bfloat16:
        return Known(tensor.float().numpy().astype(ml_dtypes.bfloat16), torch.bfloat16)
    return Known(tensor.detach().cpu().numpy().copy(), tensor.dtype)


def foldable(tensor: Tensor) -> bool:
    """Whether a computed constant is small enough, and of a type, to be a known value."""
    return tensor.numel() <= SMALL and tensor.dtype in NUMPY
