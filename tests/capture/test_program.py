"""`rebuild` and `copied`: a program from a changed graph, everything else shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tamis.capture.program import copied, rebuild

ATEN = torch.ops.aten


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.first(x))
        return {"logits": self.second(hidden), "hidden": hidden, "none": None}


@pytest.fixture
def program() -> ExportedProgram:
    return torch.export.export(TwoLayers().eval(), (torch.ones(3, 4),), dynamic_shapes=({0: Dim("batch")},))


def test_a_copy_computes_the_same_and_shares_the_weights(program: ExportedProgram) -> None:
    graph_module = copied(program)
    new = rebuild(program, graph_module)
    assert [n.name for n in new.graph.nodes] == [n.name for n in program.graph.nodes]
    assert all(new.state_dict[key] is value for key, value in program.state_dict.items())
    assert new.range_constraints == program.range_constraints
    for batch in (1, 2, 5):
        x = torch.arange(batch * 4.0).reshape(batch, 4)
        torch.testing.assert_close(new.module()(x), program.module()(x), rtol=0, atol=0)


def test_names_of_builtins_are_kept() -> None:
    program = torch.export.export(nn.Linear(4, 2).eval(), (torch.ones(3, 4),))
    assert "input" in program.graph_signature.user_inputs
    new = rebuild(program, copied(program))
    torch.testing.assert_close(new.module()(torch.ones(3, 4)), program.module()(torch.ones(3, 4)), rtol=0, atol=0)


def test_nodes_of_a_copy_are_its_own(program: ExportedProgram) -> None:
    before = [(n.name, n.target, str(n.args), set(n.meta)) for n in program.graph.nodes]
    for node in copied(program).graph.nodes:
        node.meta["mark"] = True
        if node.target is ATEN.relu.default:
            node.target = ATEN.neg.default
    assert [(n.name, n.target, str(n.args), set(n.meta)) for n in program.graph.nodes] == before


def test_the_output_specs_follow_the_graph(program: ExportedProgram) -> None:
    graph_module = copied(program)
    output = graph_module.graph.output_node()
    logits, hidden = output.args[0][:2]
    with graph_module.graph.inserting_before(output):
        doubled = graph_module.graph.call_function(ATEN.mul.Scalar, (logits, 2.0))
    doubled.meta["val"] = logits.meta["val"]
    output.args = ((doubled, hidden, None),)
    new = rebuild(program, graph_module)
    assert new.graph_signature.user_outputs == (doubled.name, hidden.name, None)
    x = torch.ones(2, 4)
    torch.testing.assert_close(new.module()(x)["logits"], 2 * program.module()(x)["logits"], rtol=0, atol=0)
    assert program.graph_signature.user_outputs[0] == logits.name


def test_outputs_can_be_added_with_their_structure(program: ExportedProgram) -> None:
    graph_module = copied(program)
    output = graph_module.graph.output_node()
    size = next(n for n in graph_module.graph.nodes if n.target is ATEN.relu.default)
    output.args = ((*output.args[0], size),)
    with pytest.raises(ValueError, match="1 outputs were added: out_spec must say how"):
        rebuild(program, graph_module)
    out_spec = pytree.tree_structure(({"logits": 0, "hidden": 0, "none": 0}, 0))
    result, extra = rebuild(program, graph_module, out_spec=out_spec).module()(torch.ones(2, 4))
    assert set(result) == {"logits", "hidden", "none"}
    torch.testing.assert_close(extra, result["hidden"], rtol=0, atol=0)


def test_outputs_cannot_be_removed(program: ExportedProgram) -> None:
    graph_module = copied(program)
    output = graph_module.graph.output_node()
    output.args = (output.args[0][:1],)
    with pytest.raises(ValueError, match="the graph has 1 outputs, the program 3"):
        rebuild(program, graph_module)


def test_placeholders_must_keep_their_names(program: ExportedProgram) -> None:
    graph_module = copied(program)
    next(iter(graph_module.graph.nodes))._rename("renamed")
    with pytest.raises(ValueError, match="placeholders must keep their names and order: got renamed"):
        rebuild(program, graph_module)


def test_a_rebuilt_program_can_be_saved(program: ExportedProgram, tmp_path: Any) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(rebuild(program, copied(program)), path)
    x = torch.ones(1, 4)
    torch.testing.assert_close(torch.export.load(path).module()(x), program.module()(x), rtol=0, atol=0)
