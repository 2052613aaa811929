"""Scores that look random and are the same everywhere: a keyed permutation of the integers below 2^31 - 1.

Three rounds of x <- (x + key)^5 mod p, p = 2^31 - 1, as in the cipher MiMC.  5 does not divide p - 1, so x^5 permutes
the field: tokens of one row never tie.  Only *, +, % and & on int64 with products below 2^62, so torch and ONNX Runtime
agree to the bit, which no random generator would give.  Not for cryptography.
Source: the counter-based draw of methods card 8.2; ours is keyed by (seed, layer), not by the sample, so that a row's
result does not depend on its place in the batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

PRIME = 2**31 - 1
_ROUNDS = (0, 1134348657, 745910581)  # constants with no meaning that break the symmetry of equal rounds


def hash_scores(ranks: Tensor, seed: int, layer: int, row: Tensor | None = None) -> Tensor:
    """ranks int64 of any shape in [0, 2^31 - 1) -> int64 of the same shape in [0, 2^31 - 1), all different.

    row  int64 that broadcasts to `ranks`: another draw for each of its values

    Seeds that are equal modulo 2^31 - 1 give the same scores.  No errors; exact.
    """
    key = _permute(_permute(seed % PRIME, 1) + layer, 2)
    return _permute(_opaque(ranks), key if row is None else _permute(_opaque(row), key))


def _opaque(x: Tensor) -> Tensor:
    """The same numbers, as every bit of PRIME is set.

    Inductor follows + * % from an arange on as formulas, and takes minutes to simplify fifteen nested remainders of
    squares; behind an `&` they are numbers like others.
    """
    return x & PRIME


def _permute(x: Any, key: Any) -> Any:
    for constant in _ROUNDS:
        x = (x + (key + constant) % PRIME) % PRIME
        square = x * x % PRIME
        x = square * square % PRIME * x % PRIME
    return x
