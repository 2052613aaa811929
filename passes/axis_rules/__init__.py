"""Token-axis rules: for each ATen op, what becomes of the token axes of its inputs.

A rule takes a `Call` and returns the value and its `Axes` (None: no token axis is left).  It raises NeedsFullLength
where the op reads tokens in a way that only the full sequence answers; ops without a rule count as such.  Shapes
agreeing is no proof: without a rule nothing passes.
"""

from . import contractions, gathers, indexing, pointwise, reductions, shapes
from .call import RULES, Call

__all__ = ["RULES", "Call", "contractions", "gathers", "indexing", "pointwise", "reductions", "rule_for", "shapes"]


def rule_for(target: object):  # type: ignore[no-untyped-def]
    """The rule of an op, or None."""
    return RULES.get(target) or pointwise.rule_for(target)
