"""A graph as text, and what changed between two of them."""

from __future__ import annotations

import torch
from torch import nn
from zoo import FAMILIES

from tamis.capture import capture
from tamis.graph import TokenGraph
from tamis.rewrite import Pipeline


class Small(nn.Module):
    """Two ops and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


def test_text_has_a_line_per_node_with_shapes_and_without_parameters() -> None:
    program = torch.export.export(Small(), (torch.zeros(2, 4, dtype=torch.float32),))
    assert TokenGraph(program).text().splitlines() == [
        "%x = input : f32[2, 4]",
        "%linear = linear(%x, @layer.weight, @layer.bias) : f32[2, 3]",
        "%relu = relu(%linear) : f32[2, 3]",
        "return %relu",
    ]


def test_a_diff_shows_what_a_pass_put_in_and_nothing_before_it() -> None:
    family = FAMILIES["vit_small"]
    graph = capture(family.shared(), *family.inputs(2))
    assert graph.diff(graph) == ""
    last = len(graph.layers) - 1
    lines = Pipeline.parse(f"tome:r=5,layers=[{last}]").run(graph).graph.diff(graph).splitlines()
    assert {line[0] for line in lines} == {"+", "-"}
    added = [line for line in lines if "tamis." in line]
    assert [line.split(" = ")[1].split("(")[0] for line in added] == ["tamis.bipartite_match", "tamis.merge_tokens"]
    assert not any("blocks.0.mlp" in line for line in lines)
    assert any(line.startswith("-") and f"blocks.{last}.mlp.fc1" in line for line in lines)
