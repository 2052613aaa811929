"""Which dimensions of the example inputs are batch and sequence, and how `torch.export` is told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Axes:
    """Names of dynamic dimensions: per flat input (args, then kwargs), {dimension: name}.

    Found ones are "batch" and "sequence"; a model's file may have names of its own.
    """

    leaves: tuple[dict[int, str], ...]

    @property
    def names(self) -> set[str]:
        """All names."""
        return {name for leaf in self.leaves for name in leaf.values()}

    @property
    def has_sequence(self) -> bool:
        """Whether any input has a dynamic dimension that is not the first one of an input."""
        return self.leading().keys() != self.names

    def named(self) -> dict[str, Any]:
        """One symbol per name."""
        return {name: Dim(name) for name in self.names}

    def inferred(self) -> dict[str, Any]:
        """Export finds out which dimensions are tied."""
        return dict.fromkeys(self.names, Dim.AUTO)

    def leading(self) -> dict[str, Any]:
        """One symbol per name of a first dimension."""
        return {name: Dim(name) for leaf in self.leaves for axis, name in leaf.items() if axis == 0}

    def shapes(self, model: nn.Module, args: Any, kwargs: Any, dims: dict[str, Any]) -> Any:
        """The `dynamic_shapes` of torch.export with these dims; names without a dim are static."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        leaves = [
            {axis: dims[name] for axis, name in names.items() if name in dims} or None
            for _, names in zip(flat, self.leaves, strict=True)
        ]
        args_shapes, kwargs_shapes = pytree.tree_unflatten(leaves, spec)
        return dict(inspect.signature(model.forward).bind(*args_shapes, **kwargs_shapes).arguments)

    def fixed(self, error: Exception, shapes: Any) -> Any:
        """`shapes` with the fixes that a constraint violation suggests.

        None when there are none, or when one of them makes a dimension static: inferred dims find more then.
        """
        from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes as refine

        head, found, fixes = str(error).partition("Suggested fixes:")
        if not found:
            return None
        fixes = fixes.strip("\n").split("\n\n")[0]  # advice follows, which `refine` would try to read
        try:
            refined = refine(f"{head}{found}\n{fixes}\n", shapes)
        except Exception:  # the text is not an interface: whatever it holds, the next attempt is open
            return None
        is_static = any(isinstance(leaf, int) for leaf in pytree.tree_leaves(refined))
        return None if is_static or refined == shapes else refined

    def static_in(self, program: ExportedProgram) -> Iterator[tuple[str, int]]:
        """Names and sizes of dimensions that the program fixed although they were asked to be dynamic."""
        names = set(program.graph_signature.user_inputs)
        inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
        seen: set[str] = set()
        for node, axes in zip(inputs, self.leaves, strict=False):
            for axis, name in axes.items():
                size = node.meta["val"].shape[axis]
                if _is_fixed(size) and name not in seen:
                    seen.add(name)
                    yield f"the {name} dimension (dimension {axis} of {node.name})", int(size)


def find_axes(args: Any, kwargs: Any) -> Axes:
    """Batch and sequence dimensions of example inputs, by size and dtype (see `export_module`)."""
    flat = pytree.tree_leaves((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor) and x.ndim]
    batch = tensors[0].shape[0] if tensors else None
    lengths = [x.shape[1] for x in tensors if _is_tokens(x)]
    length = lengths[0] if lengths else None

    def names(x: Any) -> dict[int, str]:
        if not isinstance(x, Tensor) or not x.ndim:
            return {}
        found = {0: "batch"} if x.shape[0] == batch else {}
        return {**found, 1: "sequence"} if _is_tokens(x) and x.shape[1] == length else found

    return Axes(tuple(names(x) for x in flat))


def widened(args: Any, kwargs: Any, axes: Axes) -> tuple[Any, Any]:
    """The example inputs with dynamic dimensions of size 1 repeated to 2."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    wide = [
        x.repeat([2 if axis in names and x.shape[axis] == 1 else 1 for axis in range(x.ndim)]) if names else x
        for x, names in zip(flat, axes.leaves, strict=True)
    ]
    return pytree.tree_unflatten(wide, spec)


def _is_fixed(size: int | torch.SymInt) -> bool:
    return not isinstance(size, torch.SymInt) or bool(size.node.expr.is_number)


def _is_tokens(x: Tensor) -> bool:
    return x.ndim == 2 and not (x.is_floating_point() or x.is_complex()) and x.dtype != torch.uint8
