"""`export_module`: dynamic dimensions, inputs in every form, and errors that name the user's line."""

from __future__ import annotations

import logging
import time
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from zoo import FAMILIES

from tamis.capture.export import export_module
from tamis.errors import CaptureFailed, DataDependentControlFlow, ExampleInputsMissing, TrainingMode


class Fn(nn.Module):
    """A module around a function."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn
        self.eval()

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


def sizes(program: ExportedProgram) -> list[list[str]]:
    """For every user input, "?" for a dynamic dimension and the size of a static one."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    return [["?" if not str(size).isdigit() else str(size) for size in v.shape] for v in values]


@pytest.mark.parametrize("name", ["vit_mean", "bert", "hf_vit"])
@pytest.mark.parametrize("example", [1, 2])
def test_every_batch_and_length_runs(name: str, example: int) -> None:
    family = FAMILIES[name]
    model = family.shared()
    program = export_module(model, *family.inputs(example))
    for batch in (1, 2, 5):
        args, kwargs = family.inputs(batch, length=11)
        with torch.no_grad():
            expected = model(*args, **kwargs)
        torch.testing.assert_close(program.module()(*args, **kwargs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    family = FAMILIES["vit_mean"]
    program = export_module(family.shared(dtype), *family.inputs(1, dtype=dtype))
    result = program.module()(*family.inputs(3, dtype=dtype)[0])
    assert (result.dtype, result.shape[0]) == (dtype, 3)
    assert bool(result.isfinite().all())


def test_length_one_is_dynamic_too() -> None:
    family = FAMILIES["bert"]
    program = export_module(family.shared(), *family.inputs(1, length=1, padding=None))
    assert sizes(program) == [["?", "?"], ["?", "?"]]
    args, kwargs = family.inputs(4, length=17)
    assert program.module()(*args, **kwargs).last_hidden_state.shape[:2] == (4, 17)


def test_inputs_in_every_form() -> None:
    class Keyword(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + 2 * b

    model, a, b = Keyword().eval(), torch.ones(1, 3), torch.full((1, 3), 2.0)
    calls: list[tuple[Any, dict[str, Tensor]]] = [
        ((a, b), {}),
        ([a, b], {}),
        ((a,), {"b": b}),
        ((), {"b": b, "a": a}),
        ({"a": a, "b": b}, {}),
        ((UserDict({"a": a, "b": b}),), {}),
    ]
    for args, kwargs in calls:
        program = export_module(model, args, kwargs)
        assert sizes(program) == [["?", "3"], ["?", "3"]]
        assert program.graph_signature.user_inputs in (("a", "b"), ("b", "a"))
    single = export_module(Fn(lambda x: x + 1), a)
    torch.testing.assert_close(single.module()(torch.zeros(4, 3)), torch.ones(4, 3))


def test_nested_inputs() -> None:
    model = Fn(lambda x: x["a"][0].sum(1) + x["b"].sum(1))
    program = export_module(model, ({"a": [torch.ones(1, 3)], "b": torch.ones(1, 4)},))
    assert sizes(program) == [["?", "3"], ["?", "4"]]
    torch.testing.assert_close(
        program.module()({"a": [torch.ones(5, 3)], "b": torch.ones(5, 4)}), torch.full((5,), 7.0)
    )


def test_other_batch_sizes_and_constants_stay_as_they_are() -> None:
    model = Fn(lambda x, table, scale: (x + table[0]) * scale)
    program = export_module(model, (torch.ones(3, 4), torch.ones(2, 4), 2.0))
    shapes = [list(n.meta["val"].shape) for n in program.graph.nodes if n.name in ("args_0", "args_1")]
    assert str(shapes[0][0]).startswith("s")
    assert shapes[1] == [2, 4]
    torch.testing.assert_close(program.module()(torch.ones(1, 4), torch.ones(2, 4), 2.0), torch.full((1, 4), 4.0))


def test_a_graph_module_is_a_model(caplog: pytest.LogCaptureFixture) -> None:
    graph_module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval())
    assert sizes(export_module(graph_module, torch.ones(1, 4))) == [["?", "4"]]
    again = export_module(graph_module, torch.ones(2, 4)).module()
    assert sizes(export_module(again, torch.ones(2, 4))) == [["?", "4"]]
    assert not [r for r in caplog.records if r.name == "tamis"]


def test_ties_that_export_finds_are_kept() -> None:
    def fours(ids: Tensor) -> Tensor:
        return ids * (2 if ids.shape[1] % 4 == 0 else 3)

    program = export_module(Fn(fours), torch.ones(1, 8, dtype=torch.int64))
    assert sizes(program) == [["?", "?"]]
    assert program.module()(torch.ones(3, 12, dtype=torch.int64)).shape == (3, 12)


def test_a_static_length_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Fn(lambda ids: ids.view(ids.shape[0], 8) + 1)
    with caplog.at_level(logging.WARNING, "tamis"):
        program = export_module(model, torch.ones(1, 8, dtype=torch.int64), name="fixed")
    assert sizes(program) == [["?", "8"]]
    assert program.module()(torch.ones(1, 8, dtype=torch.int64)).shape == (1, 8)
    assert [r.getMessage() for r in caplog.records] == [
        "fixed: the sequence dimension (dimension 1 of args_0) is static at 8: the model does not work at other sizes"
    ]


def test_given_shapes_are_passed_on() -> None:
    program = export_module(Fn(lambda x: x + 1), torch.ones(1, 8), dynamic_shapes=(({1: Dim("width")},),))
    assert sizes(program) == [["1", "?"]]


def test_shapes_in_the_other_forms_of_torch_export_are_passed_on() -> None:
    x, model = torch.ones(1, 8), Fn(lambda x: x + 1)
    by_tensor, by_example = torch.export.ShapesCollection(), torch.export.AdditionalInputs()
    by_tensor[x] = {1: Dim("width")}
    by_example.add((torch.ones(1, 9),))
    assert sizes(export_module(model, x, dynamic_shapes=by_tensor)) == [["1", "?"]]
    assert sizes(export_module(model, x, dynamic_shapes=by_example)) == [["1", "?"]]


@pytest.mark.filterwarnings("ignore")
def test_a_traced_module_is_refused() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(CaptureFailed, match="hint: give the module itself, not what"):
        export_module(torch.jit.trace(nn.Linear(8, 8).eval(), x), x)


def test_ranges_start_at_one() -> None:
    model = Fn(lambda ids: ids.view(ids.shape[0], 8) + 1)  # not the first attempt: its dims are inferred ones
    program = export_module(model, torch.ones(3, 8, dtype=torch.int64))
    assert all(r.lower <= 1 for r in program.range_constraints.values())


def test_caches_are_left_out_and_the_config_restored() -> None:
    model = FAMILIES["bert"].shared()
    model.config.use_cache = True
    names = export_module(model, *FAMILIES["bert"].inputs(2)).graph_signature.user_inputs
    assert names == ("input_ids", "attention_mask")
    assert model.config.use_cache is True


def test_training_mode() -> None:
    with pytest.raises(TrainingMode, match=r"^net: the model is in training mode.*\n  hint: call model.eval\(\) first"):
        export_module(nn.Linear(2, 2), torch.ones(1, 2), name="net")
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    model[0].train()  # computes the same
    export_module(model, torch.ones(1, 2))
    model[1].train()
    with pytest.raises(TrainingMode, match=r"^net \(submodule 1\): the model is in training mode"):
        export_module(model, torch.ones(1, 2), name="net")


def test_missing_inputs() -> None:
    with pytest.raises(ExampleInputsMissing, match="net: example inputs are needed"):
        export_module(nn.Linear(2, 2).eval(), name="net")


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:  # the line
        return x
    return -x


def test_data_dependent_control_flow(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataDependentControlFlow) as caught:
        export_module(Fn(branch), torch.ones(1, 3), name="net")
    line = branch.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        "net: its control flow depends on the data in its tensors, which no graph can hold: "
        f"a branch or a size needs a value at {__file__}:{line} (if x.sum() > 0:  # the line).\n"
        "  hint: use torch.where, or torch.cond, or move the decision out of the model."
    )
    out, err = capfd.readouterr()
    assert "arg0_1" not in out + err, "torch's dump of the graph is kept away"


def test_other_failures_give_the_line() -> None:
    with pytest.raises(CaptureFailed) as caught:
        export_module(Fn(lambda x: x @ x), torch.ones(2, 3), name="net")
    text = str(caught.value)
    assert text.startswith("net: torch.export cannot capture it: a and b must have same reduction dim")
    assert f" at {__file__}:" in text
    assert text.endswith("hint: check that model(*args, **kwargs) itself runs on these example inputs.")


@pytest.mark.full
def test_it_costs_little_more_than_export() -> None:
    family = FAMILIES["vit_mean"]
    model, (images,) = family.shared(), family.inputs(2)[0]
    ours, theirs = [], []
    for _ in range(5):
        start = time.process_time()
        export_module(model, images)
        middle = time.process_time()
        torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},), strict=False)
        ours.append(middle - start)
        theirs.append(time.process_time() - middle)
    assert sorted(ours)[2] < 1.2 * sorted(theirs)[2]
