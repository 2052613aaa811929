"""The inputs of a program: their names, binding a call to them, other sizes for checks, and how they read as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from ..error_text import kind_of
from ..errors import InputMismatch
from ..graph import shape_text
from ..shape_names import named_shape

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Parameters of a program's forward: the first ones positional, the rest by keyword, as the example call had them.

    A positional parameter that is a nested value (a dict, a list) has no name of its own in the program: None.
    `fixed` holds those that are no tensors (a number, a flag): the program is for these values, which may be left out.
    """

    positional: tuple[str | None, ...]
    keyword: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(program: ExportedProgram) -> Inputs:
        """Read from the program's input spec and placeholders."""
        args_spec, kwargs_spec = program.call_spec.in_spec.children()
        leaves = iter(input_nodes(program))
        positional: list[str | None] = []
        for child in args_spec.children():
            names = [next(leaves).name for _ in range(child.num_leaves)]
            positional.append(names[0] if child.is_leaf() else None)
        arguments = (spec.arg for spec in program.graph_signature.input_specs)
        constants = (one for one in arguments if isinstance(one, ConstantArgument) and one.value is not None)
        fixed = {one.name: one.value for one in constants}
        return Inputs(tuple(positional), tuple(kwargs_spec.context or ()), fixed)

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return [name for name in self.positional if name is not None] + list(self.keyword)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call as the program wants it, however the caller split it into positional and keyword arguments.

        A single dict given for keywords is spread, as tokenizers' results are meant.  Arguments the program does not
        have are refused unless they are None; missing ones are the fixed value, or None.

        Raises:
            InputMismatch: too many, unknown or doubly given arguments.
        """
        kwargs = dict(kwargs)
        values: Any = args[0] if len(args) == 1 else None
        if not self.positional and isinstance(values, Mapping):
            args, kwargs = (), {**values, **kwargs}
        order = [*self.positional, *self.keyword]
        if len(args) > len(order):
            takes = f"takes {len(order)} input{'s' * (len(order) != 1)}"
            self._refuse(f"{len(args)} positional arguments", takes)
        given: dict[int, Any] = dict(enumerate(args))
        for name, value in kwargs.items():
            place = order.index(name) if name in order else None
            if place is None and value is not None:
                self._refuse(f"an argument {name!r}", "has no such input")
            if place is not None and place in given:
                self._refuse(f"{name!r} twice", "takes each input once")
            if place is not None:
                given[place] = value
        ordered = [self.fixed.get(order[i] or "") if given.get(i) is None else given[i] for i in range(len(order))]
        count = len(self.positional)
        return tuple(ordered[:count]), dict(zip(self.keyword, ordered[count:], strict=True))

    def _refuse(self, got: str, rule: str) -> None:
        names = ", ".join(name or "a nested value" for name in (*self.positional, *self.keyword)) or "none"
        raise InputMismatch(
            where="forward", rule=f"the compiled model {rule}", got=got, hint=f"its inputs are {names}."
        )


def input_nodes(program: ExportedProgram) -> list[Any]:
    """Placeholders of the user's inputs, in flat order; inputs that are None or a number have one too."""
    lifted = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name != "USER_INPUT"}
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in lifted]


def graph_inputs(program: ExportedProgram, call: Call) -> list[Any]:
    """Values of all placeholders of the program's graph: weights and constants, and what the call gives."""
    given = iter(pytree.tree_leaves(call))
    held = {**program.constants, **program.state_dict}
    specs = program.graph_signature.input_specs
    return [next(given) if spec.kind.name == "USER_INPUT" else held[spec.target or ""] for spec in specs]


def misfit(program: ExportedProgram, call: Call) -> str:
    """What of a call does not fit the program's inputs, in words; "" when number, types, dimensions and sizes do."""
    given = pytree.tree_leaves(call, is_leaf=lambda value: value is None)
    sizes: dict[Any, tuple[str, int]] = {}  # of each symbol: where it was first seen
    for node, value in zip(input_nodes(program), given, strict=False):
        wanted = node.meta.get("val")
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor):
            return f"{node.name} is {'missing' if value is None else f'{kind_of(value)}, not a tensor'}"
        if value.dtype != wanted.dtype or value.dim() != wanted.dim():
            return (
                f"{node.name} is {value.dtype} {list(value.shape)}, not {wanted.dtype} {named_shape(wanted, program)}"
            )
        for size, actual in zip(wanted.shape, value.shape, strict=True):
            symbol = getattr(getattr(size, "node", None), "expr", size)
            first, expected = sizes.setdefault(symbol, (node.name, size if isinstance(size, int) else actual))
            if getattr(symbol, "is_symbol", True) and actual != expected:
                beside = "" if isinstance(size, int) else f", of which {first} has {expected}"
                return f"{node.name} is {list(value.shape)}, not {named_shape(wanted, program)}{beside}"
    return ""


def example_call(program: ExportedProgram, args: Any = (), kwargs: Any = None) -> Call | None:
    """The call given, or the program's own example inputs; None when there are neither."""
    if args or kwargs:
        args = args if isinstance(args, tuple | list) else (args,)
        return Inputs.of(program).bind(tuple(args), kwargs or {})
    return program.example_inputs


def describe(program: ExportedProgram, call: Call) -> dict[str, str]:
    """Name of every flat tensor input -> `f32[2, 3, 224, 224]`."""
    leaves = pytree.tree_leaves(call)
    nodes = input_nodes(program)
    return {n.name: shape_text(x) for n, x in zip(nodes, leaves, strict=False) if isinstance(x, Tensor)}


def mask_of(program: ExportedProgram, call: Call) -> tuple[str, Tensor] | None:
    """The attention mask among the inputs, [B, N] with nonzero for real tokens, and its name; None without one."""
    for node, leaf in zip(input_nodes(program), pytree.tree_leaves(call), strict=False):
        if "attention_mask" in node.name and isinstance(leaf, Tensor) and leaf.ndim == 2:
            return node.name, leaf
    return None


def symbols_of(program: ExportedProgram, call: Call) -> dict[Any, int]:
    """Value of each shape symbol of the inputs in this call."""
    values: dict[Any, int] = {}
    for node, leaf in zip(input_nodes(program), pytree.tree_leaves(call), strict=False):
        for size, actual in zip(getattr(node.meta.get("val"), "shape", ()), getattr(leaf, "shape", ()), strict=False):
            expression = getattr(getattr(size, "node", None), "expr", None)
            if expression is not None and expression.is_symbol:
                values[expression] = int(actual)
    return values


def size_at(size: Any, symbols: dict[Any, int]) -> int | None:
    """A size as a number once the symbols have values; None when it depends on others."""
    if isinstance(size, int):
        return size
    value = size.node.expr.subs(symbols)
    return int(value) if value.is_number else None


def other_sizes(program: ExportedProgram, call: Call) -> list[Call]:
    """The call at other sizes: another batch, and where the program has a dynamic length, another length as well.

    Rows are repeated cyclically; lengths are cut (not grown: repeated tokens would tie in every similarity), from the
    start, or from the end where the start would leave a row of a mask without a token.
    """
    symbols = symbols_of(program, call)
    batch = {s for node in input_nodes(program) for s in _symbols_at(node, slice(0, 1))}
    lengths = {s for node in input_nodes(program) for s in _symbols_at(node, slice(1, None))} - batch
    ranges = program.range_constraints
    grown = {s: _within(ranges.get(s), value + 1, value - 1) for s, value in symbols.items() if s in batch}
    calls = [_resized(program, call, grown)] if batch else []
    if lengths:
        shorter = {
            s: _within(ranges.get(s), max(1, value * 3 // 4), value + 1) for s, value in symbols.items() if s in lengths
        }
        calls.append(_resized(program, call, {**grown, **shorter}))
    return [resized for resized in calls if resized is not None]


def at_length(program: ExportedProgram, call: Call, length: Any, tokens: int) -> Call | None:
    """The call cut, or its last token repeated, to `tokens` tokens; length: the symbol.  None where it cannot be."""
    return _resized(program, call, {length.node.expr: tokens})


def _symbols_at(node: Any, dims: slice) -> set[Any]:
    sizes = list(getattr(node.meta.get("val"), "shape", ()))[dims]
    return set().union(*(size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt)))


def _within(allowed: Any, first: int, second: int) -> int:
    if allowed is None or allowed.lower <= first <= allowed.upper:
        return first
    return second


def _resized(program: ExportedProgram, call: Call, sizes: dict[Any, int]) -> Call | None:
    symbols = {**symbols_of(program, call), **sizes}
    for cut in (_from_start, _from_end):
        leaves, spec = pytree.tree_flatten(call)
        for i, node in enumerate(input_nodes(program)):
            if isinstance(leaves[i], Tensor):
                leaves[i] = _resized_leaf(leaves[i], node.meta["val"], symbols, cut)
            if leaves[i] is None and node.meta.get("val") is not None:
                return None
        resized: Call = pytree.tree_unflatten(leaves, spec)
        mask = mask_of(program, resized)
        if mask is None or bool(mask[1].bool().any(1).all()):
            return resized
    return None


def _resized_leaf(x: Tensor, value: Any, symbols: dict[Any, int], cut: Callable[[int, int], Tensor]) -> Tensor:
    for axis, size in enumerate(value.shape):
        wanted = size_at(size, symbols)
        if wanted is not None and wanted != x.shape[axis]:
            index = torch.arange(wanted) % x.shape[axis] if axis == 0 else cut(x.shape[axis], wanted)
            x = x.index_select(axis, index.to(x.device))
    return x


def _from_start(old: int, new: int) -> Tensor:
    return torch.arange(new).clamp(max=old - 1)


def _from_end(old: int, new: int) -> Tensor:
    return (torch.arange(new) + old - new).clamp(min=0)


def called(module: Any, call: Any, name: str, *, own: bool = False) -> Any:
    """Call a program; sizes that its guards refuse are the caller's mistake, and said so.

    own  it is the user's own model: whatever it raises is because of the inputs
    """
    try:
        return module(*call[0], **call[1])
    except Exception as error:
        rule = str(error).partition("Guard failed: ")[2] if isinstance(error, AssertionError) else ""
        if rule:
            hint = (
                "only batch and sequence length may differ from the example inputs, and length up to the model's limit."
            )
            fields = {"rule": f"inputs must satisfy {rule}", "got": "other sizes", "hint": hint}
        elif own:
            text = (str(error).splitlines() or [""])[0].rstrip(".")
            hint = "check token ids against the vocabulary, and sizes and dtypes against what the model takes."
            got = f"{type(error).__name__}: {text}"
            fields = {"rule": "the original model must run on these inputs", "got": got, "hint": hint}
        else:
            raise
        raise InputMismatch(where=name, **fields) from error
