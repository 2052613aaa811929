"""Invariants catch a rewrite that breaks a promise."""

import pytest
import torch
from torch import nn
from torch.export import export

from tamis.errors import BrokenInvariant
from tamis.graph import TokenGraph
from tamis.spec import check_invariants


class Head(nn.Module):
    """A linear layer and a scatter on demand."""

    def __init__(self, channels: int = 3, mean: bool = False) -> None:
        super().__init__()
        self.layer, self.mean = nn.Linear(4, channels), mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mean:
            x = x.scatter_reduce(0, torch.zeros(2, 4, dtype=torch.int64), x, "mean")
        return self.layer(x)


def _graph(model: nn.Module) -> TokenGraph:
    return TokenGraph(export(model.eval(), (torch.zeros(2, 4),)))


def test_a_graph_equals_itself() -> None:
    graph = _graph(Head())
    check_invariants(graph, graph, "nothing", restore=True)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (Head(channels=5), "output 0 was f32[2, 3] and is f32[2, 5]"),
        (nn.Sequential(nn.Linear(4, 3)), "inputs changed"),
        (Head(mean=True), "is a scatter with mean"),
        (Head().double(), "output 0 was f32[2, 3] and is f64[2, 3]"),
    ],
)
def test_a_broken_promise_is_named(after: nn.Module, reason: str) -> None:
    example = torch.zeros(2, 4, dtype=next(after.parameters()).dtype)
    with pytest.raises(BrokenInvariant) as error:
        check_invariants(_graph(Head()), TokenGraph(export(after.eval(), (example,))), "a pass", restore=True)
    assert str(error.value).startswith("after a pass: ")
    assert reason in str(error.value)


def test_shapes_may_differ_when_outputs_stay_short() -> None:
    check_invariants(_graph(Head()), _graph(Head(channels=5)), "a pass", restore=False)


def test_a_node_without_metadata_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    graph, bare = _graph(model), _graph(model)
    node = next(n for n in bare.graph.nodes if n.op == "call_function")
    del node.meta["val"]
    with pytest.raises(BrokenInvariant, match=f"node {node.name} has no shape"):
        check_invariants(graph, bare, "a pass", restore=True)
