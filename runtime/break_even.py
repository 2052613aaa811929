"""From how many tokens on a result is faster than its original: measured, and where the original runs below that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..error_text import brief
from ..errors import BadParameter
from ..graph import TokenGraph
from ..report import Benchmark
from .inputs import Call, at_length, input_nodes
from .ledger import stream_length, stream_size
from .recall import check_fits

if TYPE_CHECKING:
    from .compiled import CompiledModel

SHORTEST = 16  # tokens from which on lengths are tried
ALWAYS = "the result was faster at every length"


@dataclass(frozen=True)
class BreakEven:
    """Where a result begins to pay.

    tokens    calls of fewer run the original: the smallest length from which on the result was faster, one more than
              the longest where it never was; 0 where it always was
    measured  what was timed, by length
    """

    tokens: int
    measured: dict[int, Benchmark] = field(default_factory=dict)

    def __str__(self) -> str:
        timed = ", ".join(f"{tokens} tokens {one.speedup:.2f}x" for tokens, one in self.measured.items())
        where = {f"{one.device}, {one.mode}" for one in self.measured.values()}
        return below_text(self.tokens, f"measured on {' and '.join(sorted(where))}: {timed}")


def below_text(tokens: int, found: str = "as was asked for") -> str:
    """What the report says of a number of tokens, and how it was found; "" for none that nobody looked for."""
    if tokens:
        return f"calls of fewer than {tokens} tokens run the original ({found}); a file holds the result alone"
    return "" if found == "as was asked for" else f"{ALWAYS} ({found})"


def find_break_even(
    model: CompiledModel, *args: Any, lengths: Sequence[int] | None = None, repeats: int = 5, **kwargs: Any
) -> BreakEven:
    """Time original and result at several lengths, and let the original run below the one from which the result pays.

    Sets the model's guard, the `dense_below` of its recipe, and a line of its report.

    Args:
        model: with its original, and a dynamic length.
        args: inputs whose rows are cut (or their last token repeated) to each length; the example's when none.
        kwargs: inputs by keyword.
        lengths: what is timed; the inputs' length and its halves, down to 16, when None.
        repeats: rounds of each timing.

    Raises:
        BadParameter: the length is static or unknown, a length to time is none, or there is nothing to time.
        OriginalMissing: the model was loaded from a file.
    """
    _check(model, lengths, repeats)
    original, call = model._original("find_break_even"), model._call(args, kwargs)
    check_fits("find_break_even", original, call)
    size = stream_size(original)
    if not isinstance(size, torch.SymInt):
        hint = "give an attention mask or dynamic_shapes, so that the length is dynamic."
        raise BadParameter(where="find_break_even", name="model", rule="of dynamic length", got=f"{size}", hint=hint)
    measured: dict[int, Benchmark] = {}
    for tokens in sorted(set(_halves(stream_length(original, call) or 0) if lengths is None else lengths)):
        resized = at_length(original.program, call, size, tokens) if tokens >= 1 else None
        if resized is None:
            hint = "a number of tokens, 1 or more."
            raise BadParameter(where="find_break_even", name="lengths", rule="possible", got=tokens, hint=hint)
        measured[tokens] = model.benchmark(*resized[0], repeats=repeats, **resized[1])
    found = BreakEven(_first_that_pays(measured), measured)
    options = {name: value for name, value in model.recipe.options.items() if name != "dense_below"}
    model.recipe = replace(model.recipe, options=options | ({"dense_below": found.tokens} if found.tokens else {}))
    before = ("calls of fewer than ", ALWAYS)
    notes = (note for note in model.report.notes if not note.startswith(before))
    model.report = model.report.with_changes(notes=(*notes, str(found)))
    model.with_original(original)
    return found


def _check(model: Any, lengths: Any, repeats: Any) -> None:
    """Raise BadParameter for a model that has no original, and for lengths or rounds that are none."""
    from .compiled import CompiledModel

    if not isinstance(model, CompiledModel):
        hint = "find_break_even(tamis.compile(model, ..., passes=...))."
        rule, got = "what tamis.compile returned", brief(model)
        raise BadParameter(where="find_break_even", name="model", rule=rule, got=got, hint=hint)

    def counts(one: Any) -> bool:
        return isinstance(one, int) and not isinstance(one, bool) and one >= 1

    listed = isinstance(lengths, Sequence) and not isinstance(lengths, str) and len(lengths) > 0
    rules = {
        "lengths": ("a list of numbers of tokens", lengths, lengths is None or (listed and all(map(counts, lengths)))),
        "repeats": ("1 or more", repeats, counts(repeats)),
    }
    for name, (rule, got, holds) in rules.items():
        if not holds:
            hint = "leave it out for the default."
            raise BadParameter(where="find_break_even", name=name, rule=rule, got=brief(got), hint=hint)


def _first_that_pays(measured: dict[int, Benchmark]) -> int:
    slow = [tokens for tokens, one in measured.items() if one.speedup < 1]
    if not slow:
        return 0
    return min((tokens for tokens in measured if tokens > slow[-1]), default=slow[-1] + 1)


def _halves(tokens: int) -> list[int]:
    found = [tokens]
    while found[-1] // 2 >= SHORTEST:
        found.append(found[-1] // 2)
    return found


def tokens_in(graph: TokenGraph) -> Callable[[Call], int | None]:
    """How many tokens a call has, padding included, as a function that only looks at a shape; None: it cannot tell."""
    size = stream_size(graph)
    if not isinstance(size, torch.SymInt):
        return lambda call: size
    places = [
        (place, axis)
        for place, node in enumerate(input_nodes(graph.program))
        for axis, one in enumerate(getattr(node.meta.get("val"), "shape", ()))
        if isinstance(one, torch.SymInt) and one.node.expr == size.node.expr
    ]

    def tokens(call: Call) -> int | None:
        leaves = pytree.tree_leaves(call, is_leaf=lambda value: value is None)
        found = (leaves[place].shape[axis] for place, axis in places if isinstance(leaves[place], Tensor))
        return next(found, None)

    return tokens
