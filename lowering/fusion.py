"""`fuse`: chains of nodes that Inductor cannot fuse, because an op of ours is in them, become one op each.

For GPU targets only, before ops are replaced by their kernels.  A fusion is one file `fusion_NAME.py` with a `name` and
a function `apply` that changes a graph of ATen and tamis nodes in place and says for every place it looked at what
happened; FUSIONS is the order in which they run.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import fx

from ..graph import module_path
from ..op import Op
from .splice import PROVENANCE, fake_mode_of, without_guards

FUSIONS: tuple[str, ...] = ("fusion_match", "fusion_merge", "fusion_attention")


@dataclass(frozen=True)
class Fired:
    """What a fusion did at one place.

    fusion  its name
    node    the node it looked at, by its name before the fusion;  module  path of the module in the user's model
    fired   whether the graph was changed
    what    the chain that became one op, such as "add + merge_tokens + layer_norm"; "" where none did
    why     what of the longest chain is not in it, and the reason; "" when nothing is missing
    """

    fusion: str
    node: str
    module: str
    fired: bool
    what: str
    why: str = ""

    @staticmethod
    def at(node: fx.Node, fusion: str, chain: Sequence[str], missing: Sequence[str] = ()) -> Fired:
        """At a node that is still in the graph; an empty chain means that nothing was fused."""
        return Fired(fusion, node.name, module_path(node), bool(chain), " + ".join(chain), "; ".join(missing))

    def __str__(self) -> str:
        found = self.what if self.fired else "nothing"
        return f"{self.fusion} at {self.module or 'top level'}: {found}{self.why and f' ({self.why})'}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Fusion(Protocol):
    """What a module `fusion_NAME` has."""

    name: str

    def apply(self, graph: fx.Graph) -> list[Fired]:
        """Change the graph in place; one answer for each place where the fusion's op is."""


def fuse(graph: fx.Graph, names: Sequence[str] = FUSIONS) -> list[Fired]:
    """Apply the fusions to a graph, in place, and say what each did."""
    fired = []
    for name in names:
        fired += fusion_named(name).apply(graph)
        graph.eliminate_dead_code()  # the next one counts who reads a value
    return fired


def fusion_named(name: str) -> Fusion:
    """The fusion of a module's name."""
    return importlib.import_module(f".{name}", __package__)  # type: ignore[return-value]


def insert_op(op: Op, args: tuple[Any, ...], at: fx.Node) -> list[fx.Node]:
    """A call of the op before `at`, whose provenance it gets, with values by the op's shape rule.

    -> its results: the node itself, or its `getitem`s where there are several
    """
    graph, mode = at.graph, fake_mode_of(at.graph)
    given = fx.map_arg(args, lambda node: node.meta["val"])
    with mode, without_guards(mode):
        value = op.fake(*given)
    provenance = {key: at.meta[key] for key in PROVENANCE if key in at.meta}
    with graph.inserting_before(at):
        node = graph.call_function(op.call, args)
        node.meta = {**provenance, "val": value}
        if not isinstance(value, tuple):
            return [node]
        results = [graph.call_function(operator.getitem, (node, i)) for i in range(len(value))]
    for result, one in zip(results, value, strict=True):
        result.meta = {**provenance, "val": one}
    return results
