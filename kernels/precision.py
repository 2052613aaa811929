"""The number type ops compute in: float32 for every input but float64, which stays float64 (the tests' oracle).

Source: methods 0.4, rules 4 and 5: cosines near 1 and token sizes have no resolution in half types.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
