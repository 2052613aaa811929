"""`canonicalise`: the same results with less in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from zoo import FAMILIES

from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module
from tamis.graph import op_name


class Fn(nn.Module):
    """A module around a function."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn
        self.eval()

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


def ops(program: ExportedProgram) -> list[str]:
    return [op_name(n) for n in program.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)]


def canonical(fn: Any, *args: Tensor) -> ExportedProgram:
    """Canonical form of a function; checked at batches 1 and 3 against the function itself."""
    program = canonicalise(export_module(Fn(fn), args))
    for batch in (1, 3):
        values = [a[:1].repeat(batch, *[1] * (a.ndim - 1)) for a in args]
        torch.testing.assert_close(program.module()(*values), fn(*values))
    return program


@pytest.mark.parametrize("name", ["vit_mean", "dinov2_reg4", "deit_distilled", "hf_vit", "bert"])
def test_the_zoo_computes_the_same(name: str) -> None:
    family = FAMILIES[name]
    program = export_module(family.shared(), *family.inputs(1))
    before = [str(n) for n in program.graph.nodes]
    result = canonicalise(program)
    assert [str(n) for n in program.graph.nodes] == before, "never in place"
    assert all(result.state_dict[key] is value for key, value in program.state_dict.items())
    assert not {"dropout", "_assert_tensor_metadata", "contiguous", "view"} & set(ops(result))
    for batch in (1, 5):
        args, kwargs = family.inputs(batch)
        torch.testing.assert_close(result.module()(*args, **kwargs), program.module()(*args, **kwargs))


def test_kept_nodes_keep_names_and_traces() -> None:
    program = export_module(FAMILIES["vit_mean"].shared(), *FAMILIES["vit_mean"].inputs(2))
    old = {n.name: n for n in program.graph.nodes}
    for node in canonicalise(program).graph.nodes:
        assert node.name in old
        assert node.meta.get("stack_trace") == old[node.name].meta.get("stack_trace")


def test_canonical_form_is_a_fixed_point() -> None:
    once = canonicalise(export_module(FAMILIES["bert"].shared(), *FAMILIES["bert"].inputs(2)))
    twice = canonicalise(once)
    assert [n.format_node() for n in twice.graph.nodes] == [n.format_node() for n in once.graph.nodes]


def test_what_does_nothing_is_gone() -> None:
    def idle(x: Tensor) -> Tensor:
        x = torch.dropout(x, 0.5, train=False)
        x = torch.feature_dropout(x, 0.5, train=False)
        x = x.to(torch.float32).contiguous().clone().detach()
        x = x[:].expand(-1, -1, -1)[:, : x.shape[1]]
        return torch.relu(x)

    assert ops(canonical(idle, torch.randn(2, 3, 4))) == ["relu"]


def test_native_dropout_is_gone() -> None:
    def dropout(x: Tensor) -> Tensor:
        return torch.relu(torch.native_dropout(x, 0.5, False)[0])

    assert ops(canonical(dropout, torch.randn(2, 4))) == ["relu"]


def test_what_does_something_stays() -> None:
    def busy(x: Tensor) -> Tensor:
        y = x.to(torch.float64)[:, 1:].transpose(1, 2)
        return y[:, :, ::2] + torch.zeros(4, 1, dtype=torch.float64).expand(4, y.shape[2])[:, :1]

    kept = ops(canonical(busy, torch.randn(2, 4, 4)))
    assert kept.count("slice") == 3
    assert "to" in kept
    assert kept.count("expand") == 1


def test_dropout_in_training_stays() -> None:
    program = torch.export.export(nn.Dropout(0.5).train(), (torch.ones(2, 4),))
    assert ops(canonicalise(program)) == ["dropout"]


def test_views_of_transposed_values_become_reshapes() -> None:
    def heads(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().view(x.shape[0], -1)

    assert ops(canonical(heads, torch.randn(2, 3, 4))) == ["transpose", "reshape"]


def test_values_are_not_changed_in_place() -> None:
    def in_place(x: Tensor) -> Tensor:
        y = x.clone()
        y += 1
        return x * y.mul_(3).relu_()

    program = canonical(in_place, torch.randn(2, 3))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == [
        "aten.add.Tensor",
        "aten.mul.Tensor",
        "aten.relu.default",
        "aten.mul.Tensor",
    ]


def test_gradient_modes_are_inlined() -> None:
    def modes(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = x * 2
            with torch.enable_grad():
                z = y + 1
        return torch.relu(y), z - y

    with torch.enable_grad():
        program = torch.export.export(Fn(modes), (torch.ones(2, 3),), dynamic_shapes=(({0: Dim("batch")},),))
    assert any("set_grad" in str(n.target) for n in program.graph.nodes)
    result = canonicalise(program)
    assert sorted(ops(result)) == ["add", "mul", "relu", "sub"]
    torch.testing.assert_close(result.module()(torch.ones(1, 3)), modes(torch.ones(1, 3)))


def test_autocast_switched_off_is_inlined() -> None:
    def rotary(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = x.float() * 2
        return y + x

    assert sorted(ops(canonical(rotary, torch.randn(2, 3)))) == ["add", "mul"]


def test_an_output_that_was_removed_is_patched() -> None:
    def outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(x)
        return torch.dropout(y, 0.1, train=False), y, torch.dropout(x, 0.1, train=False)

    program = canonical(outputs, torch.randn(2, 3))
    assert program.graph_signature.user_outputs == ("relu", "relu", "args_0")


def test_the_result_can_be_saved(tmp_path: Any) -> None:
    program = canonicalise(export_module(FAMILIES["hf_vit"].shared(), *FAMILIES["hf_vit"].inputs(2)))
    path = tmp_path / "canonical.pt2"
    torch.export.save(program, path)
    _, kwargs = FAMILIES["hf_vit"].inputs(1)
    loaded = torch.export.load(path).module()(**kwargs)
    torch.testing.assert_close(loaded.last_hidden_state, program.module()(**kwargs).last_hidden_state)
