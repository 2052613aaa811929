"""Tables of positions in a model: where a longer sequence than they have rows for would read beyond their end.

On the CPU that is an IndexError without a word of tokens, on a GPU an assertion that ends the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..call_errors import PositionsExceeded
from ..capture.partial_run import values_of
from .inputs import Call, input_nodes


@dataclass(frozen=True)
class Table:
    """A table of weights, `name` [rows, C], that is read at the rows which the node `index` says."""

    name: str
    rows: int
    index: str


class Tables:
    """The tables of a program whose index is computed, not given, and grows with the number of tokens."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.tables = list(_tables(program))
        self._read: dict[Table, Callable[[Any], Any] | None] = {}

    def check(self, call: Call, where: str) -> None:
        """Compare what a call asks for with the tables that have fewer rows than it has tokens; others cost nothing.

        Raises:
            PositionsExceeded: it asks for a row that is not there.
        """
        leaves = pytree.tree_leaves(call, is_leaf=lambda value: value is None)
        tokens = max((x.shape[1] for x in leaves if isinstance(x, Tensor) and x.ndim == 2), default=0)
        for table in self.tables:
            if tokens <= table.rows:
                continue
            if table not in self._read:
                self._read[table] = self._reader(table)
            read = self._read[table]
            row = -1 if read is None else _largest(read, leaves)
            if row >= table.rows:
                raise PositionsExceeded(where=where, tokens=tokens, row=row, table=table.name, last=table.rows - 1)

    def _reader(self, table: Table) -> Callable[[Any], Any] | None:
        """What computes the index; None where one token too many, all of them real, asks for no row too many."""
        read = values_of(self.program, [table.index])
        values = [node.meta.get("val") for node in input_nodes(self.program)]
        try:
            return read if _largest(read, [_example(value, table.rows + 1) for value in values]) >= table.rows else None
        except (RuntimeError, IndexError):  # it cannot be that long, which the program itself will say
            return None


def _largest(read: Callable[[Any], Any], leaves: list[Any]) -> int:
    with torch.no_grad():
        (index,) = read(leaves)
    return int(index.max()) if index.numel() else -1


def _example(value: Any, tokens: int) -> Any:
    """An input of one row of tokens, all of them real."""
    if not isinstance(value, Tensor):
        return value
    sizes = [size if isinstance(size, int) else (tokens if axis else 1) for axis, size in enumerate(value.shape)]
    return torch.ones(sizes, dtype=value.dtype, device=value.device)


def _tables(program: ExportedProgram) -> Iterator[Table]:
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    given = set(input_nodes(program))
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            weight, index = node.args[:2]
            if weight.name in weights and isinstance(index, fx.Node) and index not in given:
                yield Table(weights[weight.name], int(weight.meta["val"].shape[0]), index.name)
