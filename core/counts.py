"""Every rounding rule for token counts, in exact integer arithmetic.

A reduction at one layer sees n tokens (per row: n real tokens), of which the first `prefix` are protected, so
T = n - prefix can leave. How many leave is

    removed(n) = max(0, min over terms (a, b, c) of floor((a*T + b) / c))

which covers every published rule: at most r, at most half, all but ceil(ratio*T), floor(T - ratio*T). The same formula
runs on Python ints, on SymInts and on int64 tensors, so torch, ONNX and the report cannot disagree. Ratios are read as
the decimal the user wrote (0.7 is 7/10), which float arithmetic would round wrongly for some n.
Source: methods cards 1.2, 3.2, 7.2 and their clamps.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Term = tuple[int, int, int]
HALF: Term = (1, 0, 2)
ALL: Term = (1, 0, 1)


@dataclass(frozen=True)
class CountRule:
    """How many of n tokens leave.  `added` extra tokens appear wherever any leave (a fused token: 1).

    Args:
        prefix: leading real tokens that never leave.
        terms: (a, b, c) triples, see the module's formula.
        added: tokens created by the reduction at a row where at least one token leaves.
        of_first: the fraction of the tokens before the first reduction to keep, in place of what the first term says,
            where their number is known (see `resolved`).
        appended: tokens that come in at the end of every row, whether any leaves or not.
    """

    prefix: int
    terms: tuple[Term, ...]
    added: int = 0
    of_first: Fraction | None = None
    appended: int = 0

    def resolved(self, first: Any) -> CountRule:
        """This rule for a stream that had `first` tokens; floor(of_first * T) of them stay if that is a number."""
        if self.of_first is None or not isinstance(first, int):
            return self
        kept = (first - self.prefix) * self.of_first.numerator // self.of_first.denominator
        return CountRule(self.prefix, ((1, -kept, 1), *self.terms[1:]), self.added)

    def removed(self, n: Any) -> Any:
        """Tokens that leave out of n; n is an int, a SymInt or an int64 tensor."""
        candidates = [_term(term, n - self.prefix) if term[0] else term[1] // term[2] for term in self.terms]
        least = candidates[0]
        for other in candidates[1:]:
            least = _minimum(least, other)
        return _maximum(least, 0)

    def out(self, n: Any) -> Any:
        """Tokens after the reduction, the added and the appended ones included."""
        removed = self.removed(n)
        left = n - removed + self.added * _minimum(removed, 1) if self.added else n - removed
        return left + self.appended if self.appended else left

    def flat(self) -> list[int]:
        """The rule as op arguments, without the appended ones: [added, a, b, c, a, b, c, ...]."""
        return [self.added, *(value for term in self.terms for value in term)]

    @staticmethod
    def from_flat(prefix: int, flat: list[int]) -> CountRule:
        """Inverse of `flat`."""
        terms = tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(1, len(flat), 3))
        return CountRule(prefix, terms, flat[0])

    @property
    def is_identity(self) -> bool:
        """True when no row of any length can lose a token or gets one."""
        return not self.appended and any(a == 0 and b <= 0 for a, b, _ in self.terms)


def _term(term: Term, free: Any) -> Any:
    """floor((a*T + b) / c) without steps that change nothing: on tensors each would be a node."""
    a, b, c = term
    value = free if a == 1 else a * free
    value = value + b if b else value
    return value if c == 1 else value // c


def at_most(r: int) -> Term:
    """Term: remove r tokens."""
    return (0, r, 1)


def keep_at_least(ratio: float) -> Term:
    """Term: keep ceil(ratio * T), the pruning convention (EViT 7.2)."""
    kept = exact(ratio)
    return (kept.denominator - kept.numerator, 0, kept.denominator)


def keep_at_most(ratio: Fraction) -> Term:
    """Term: keep floor(ratio * T), DynamicViT's convention (10.1)."""
    return (ratio.denominator - ratio.numerator, ratio.denominator - 1, ratio.denominator)


def exact(ratio: float) -> Fraction:
    """The decimal fraction that was written: exact(0.7) == 7/10."""
    return Fraction(str(ratio)).limit_denominator(10**6)


def _minimum(a: Any, b: Any) -> Any:
    return _select(a, b, "minimum", "sym_min", min)


def _maximum(a: Any, b: Any) -> Any:
    return _select(a, b, "maximum", "sym_max", max)


def _select(a: Any, b: Any, tensor_name: str, sym_name: str, plain: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return plain(a, b)
    import torch  # only tensors and SymInts need it, and they have imported it already

    tensors = [x for x in (a, b) if isinstance(x, torch.Tensor)]
    if not tensors:
        return getattr(torch, sym_name)(a, b)
    if tensor_name == "minimum":
        return tensors[0].clamp(max=b if a is tensors[0] else a) if len(tensors) == 1 else torch.minimum(a, b)
    return tensors[0].clamp(min=b if a is tensors[0] else a) if len(tensors) == 1 else torch.maximum(a, b)
