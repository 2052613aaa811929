"""Who is measured: every method with a knob, the same with a shared choice, and a pattern searched for each head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from tamis.attention_index import SHARES
from tamis.passes.sparse import SparseAttention
from tamis.registry import origin_of, registered_passes

from .budgets import CONTROL, knob_of, methods, settled
from .subject import Subject

Entry = Callable[[Subject, float, int], Sequence[SparseAttention]]  # passes at a density, for prompts of so many tokens


def entries() -> dict[str, Entry]:
    """By name: `method`, `method:share=WHO` where that is not the method's own, and passes that stand for a search."""
    turned = [cls for cls in methods() if knob_of(cls)]
    found: dict[str, Entry] = {cls.name: partial(_turned, cls) for cls in turned}
    found |= {name: _searched for name in searches()}
    for cls in turned:
        found |= {f"{cls.name}:share={share}": partial(_turned, cls, share=share) for share in other_shares(cls)}
    return found


def searches() -> list[str]:
    """Tamis's sparse attention passes that stand for others, one for each head: what calibration finds."""
    known = registered_passes().items()
    some = [(name, cls) for name, cls in known if cls.family == SparseAttention.family and origin_of(cls) == "tamis"]
    return [name for name, cls in some if not issubclass(cls, SparseAttention)]


def other_shares(cls: type[SparseAttention]) -> list[str]:
    """Who else could share a method's choice; nobody where it has none, and for the control, which does not choose."""
    own = {one.name: one.default for one in fields(cls)}
    return [share for share in SHARES if "share" in own and cls.name != CONTROL and share != own["share"]]


def said(name: str, passes: Sequence[SparseAttention]) -> dict[str, Any]:
    """What a cell says of its passes: the pass, or of several how many heads each has."""
    if len(passes) == 1 and passes[0].heads is None:
        return {"pass": str(passes[0])}
    many = {str(replace(one, heads=None)): sum(map(len, one.heads.values())) for one in passes}
    kinds: Counter[str] = Counter()
    for one in passes:
        kinds[one.name] += many[str(replace(one, heads=None))]
    heads = ", ".join(f"{kind} at {count} heads" for kind, count in sorted(kinds.items()))
    return {"pass": f"{name}: {heads}", "patterns": many}


def _turned(cls: type[SparseAttention], subject: Subject, density: float, length: int, **fixed: Any) -> Sequence[Any]:
    def run(method: SparseAttention) -> float:
        return subject.density([method], length)

    return [settled(cls, density, subject.samples(length), run, **fixed)]


def _searched(subject: Subject, density: float, length: int) -> Sequence[SparseAttention]:
    """Within a budget of the density: what choosing takes counts in it, so less may be read."""
    return subject.searched(density, length)
