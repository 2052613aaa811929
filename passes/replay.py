"""`Replay`: a graph run once more, node by node, in which a value may be asked for before its turn."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.traceback import set_current_meta

from ..capture.closure import ancestors
from ..graph import TokenGraph


class Replay(fx.Interpreter):
    """Runs the original graph; rewrites override `run_node`."""

    def __init__(self, graph: TokenGraph) -> None:
        super().__init__(graph.program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # fx would write its own sentence into our errors
        self.graph_ = graph

    def run_all(self, *values: Any) -> list[Any]:
        """Run the whole graph under tracing."""
        return super().run(*values)

    def value_of(self, name: str) -> Any:
        """The value of a node above which nothing is rewritten; it runs now if its turn has not come."""
        wanted = self.graph_.node(name)
        if wanted not in self.env:
            above = ancestors(wanted) | {wanted}
            for n in self.graph_.graph.nodes:
                if n in above and n not in self.env:
                    with set_current_meta(n):
                        self.env[n] = fx.Interpreter.run_node(self, n)
        return self.env[wanted]
