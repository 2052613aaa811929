from __future__ import annotations

import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tamis.errors import (
    BackendCannotRun,
    BackendMismatch,
    ExportFailed,
    MissingDependency,
    OutputExists,
    OutputNotWritable,
)
from tamis.lowering.onnx import export_onnx
from tamis.lowering.onnx_check import check_onnx


def calls(path):
    return [node.op_type for node in onnx.load(path).graph.node if node.domain == "tamis"]


def shapes(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_ops_become_functions_and_names_stay(make_program, make_tokens, tmp_path):
    program = make_program(length=True, dynamic=True)
    path = export_onnx(program, tmp_path / "toy.onnx", metadata={"tamis.recipe": "passes: []"})
    model = onnx.load(path)
    assert calls(path) == ["ToyTake", "ToyTake"]
    assert [(f.domain, f.name) for f in model.functions] == [("tamis", "ToyTake")]
    assert {o.domain: o.version for o in model.functions[0].opset_import}[""] == 18
    assert {p.key: p.value for p in model.metadata_props} == {"tamis.recipe": "passes: []"}
    assert shapes(model.graph.input) == {"tokens": ["batch", "sequence", 8]}
    assert shapes(model.graph.output) == {"last_hidden_state": ["batch", "tokens_2", 8], "pooled": ["batch", 8]}
    inputs = [(make_tokens(batch, length),) for batch, length in [(1, 12), (2, 12), (5, 31)]]
    assert check_onnx(path, program, inputs) < 1e-5


@pytest.mark.parametrize("weighted", [True, False])
def test_inlined_file_has_standard_operators_only(make_program, make_tokens, tmp_path, weighted):
    program = make_program(weighted=weighted)
    path = export_onnx(program, tmp_path / "toy.onnx", inline=True)
    model = onnx.load(path)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert [o.domain for o in model.opset_import] == [""]
    assert check_onnx(path, program, [((make_tokens(3),), {})]) < 1e-5


def test_functions_follow_the_opset_of_the_model(make_program, make_tokens, tmp_path):
    program = make_program()
    path = export_onnx(program, tmp_path / "toy.onnx", opset=20)
    model = onnx.load(path)
    assert {o.domain: o.version for o in model.functions[0].opset_import}[""] == 20
    assert check_onnx(path, program, [(make_tokens(3),)]) < 1e-5


class Reversed(nn.Module):
    """Tokens in an order that the exporter computes but for its last step, a sort."""

    def forward(self, tokens):
        return tokens[:, torch.arange(5).flip(0).sort(stable=True).indices]


@pytest.mark.parametrize("inline", [False, True])
def test_what_exporters_say_of_their_work_is_not_passed_on(tmp_path, caplog, inline):
    tokens = torch.randn(2, 5, 3)
    program = torch.export.export(Reversed(), (tokens,))
    path = export_onnx(program, tmp_path / "reversed.onnx", inline=inline)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert check_onnx(path, program, [(tokens,)]) == 0


def test_given_names_win_over_values_that_have_them(make_program, make_tokens, tmp_path):
    program = make_program()
    names = {"input_names": ["gelu"], "output_names": ["linear", "linears.0.bias"], "dimensions": {}}
    path = export_onnx(program, tmp_path / "toy.onnx", **names)
    model = onnx.load(path)
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["gelu", "linear", "linears.0.bias"]
    assert check_onnx(path, program, [(make_tokens(3),)]) < 1e-5


def test_no_path_of_the_exporting_machine_is_in_the_file(make_program, tmp_path):
    path = export_onnx(make_program(), tmp_path / "toy.onnx")
    assert os.path.dirname(__file__).encode() not in path.read_bytes()


def test_large_weights_go_beside_the_file(make_program, make_tokens, tmp_path):
    program = make_program()
    path = export_onnx(program, tmp_path / "toy.onnx", external_over=100)
    assert sorted(os.listdir(tmp_path)) == ["toy.onnx", "toy.onnx.data"]
    assert check_onnx(path, program, [(make_tokens(3),)]) < 1e-5
    with pytest.raises(OutputExists):
        export_onnx(program, path, external_over=100)
    export_onnx(program, path, overwrite=True)
    assert os.listdir(tmp_path) == ["toy.onnx"]
    assert check_onnx(path, program, [(make_tokens(3),)]) < 1e-5


def test_an_existing_file_is_left_alone(make_program, tmp_path):
    path = tmp_path / "toy.onnx"
    path.write_text("mine")
    with pytest.raises(OutputExists, match="exists already"):
        export_onnx(make_program(), path)
    assert path.read_text() == "mine"


def test_a_failing_check_leaves_what_was_there(make_program, tmp_path):
    path = tmp_path / "toy.onnx"
    path.write_text("mine")

    def refuse(draft):
        assert draft.exists()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        export_onnx(make_program(), path, overwrite=True, check=refuse)
    assert os.listdir(tmp_path) == ["toy.onnx"]
    assert path.read_text() == "mine"


def test_unwritable_places_are_refused(make_program, tmp_path):
    for path, reason in [(tmp_path / "none" / "toy.onnx", "there is no directory"), (tmp_path, "it is a directory")]:
        with pytest.raises(OutputNotWritable, match=reason):
            export_onnx(make_program(), path, overwrite=True)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(make_program, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tamis.lowering.onnx_file.save_streamed", full)
    with pytest.raises(OutputNotWritable, match="No space left on device"):
        export_onnx(make_program(), tmp_path / "toy.onnx")
    assert os.listdir(tmp_path) == []


class MeanScatter(nn.Module):
    def forward(self, x):
        index = torch.zeros(x.shape, dtype=torch.int64)
        return x.scatter_reduce(1, index, x, reduce="mean")


class NoOnnx(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x)


@pytest.mark.parametrize(
    ("model", "reason"), [(MeanScatter(), "scatter_reduce.*'mean'"), (NoOnnx(), "No ONNX function found")]
)
def test_what_onnx_cannot_say_fails_by_name(model, reason, tmp_path):
    program = torch.export.export(model, (torch.ones(3, 3),))
    with pytest.raises(ExportFailed, match=reason):
        export_onnx(program, tmp_path / "bad.onnx")
    assert os.listdir(tmp_path) == []


def test_nothing_is_printed(make_program, tmp_path, capsys):
    export_onnx(make_program(), tmp_path / "toy.onnx")
    assert capsys.readouterr().out == ""


def test_a_mismatch_is_an_error(make_program, make_tokens, tmp_path):
    program = make_program()
    path = export_onnx(program, tmp_path / "toy.onnx")

    def other(x):
        result = program.module()(x)
        return {**result, "pooled": result["pooled"] * 1.001}

    with pytest.raises(BackendMismatch, match=r"output pooled differs by 0.000999.*at \(3, 12, 8\)"):
        check_onnx(path, other, [(make_tokens(3),)])
    assert check_onnx(path, other, [(make_tokens(3),)], budget=2e-3) == pytest.approx(1e-3, rel=1e-2)


def test_not_a_number_is_a_mismatch(make_program, make_tokens, tmp_path):
    program = make_program()
    path = export_onnx(program, tmp_path / "toy.onnx")
    with pytest.raises(BackendMismatch, match="differs by nan"):
        check_onnx(path, lambda x: program.module()(x * np.nan), [(make_tokens(3),)])


def test_files_onnx_runtime_cannot_read_and_its_absence(tmp_path, monkeypatch):
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x0a\xff")
    with pytest.raises(BackendCannotRun, match="cannot run it"):
        check_onnx(tmp_path / "cut.onnx", abs, [])
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match="onnxruntime"):
        check_onnx(tmp_path / "cut.onnx", abs, [])


class Half(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(8, 8, dtype=dtype)

    def forward(self, x):
        return torch.ops.tamis.toy_take(self.linear(x), None, 3)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_or_says_why_not(dtype, tmp_path):
    x = torch.ones(2, 5, 8, dtype=dtype)
    program = torch.export.export(Half(dtype).eval(), (x,))
    path = export_onnx(program, tmp_path / "half.onnx")
    if dtype == torch.float16:
        assert check_onnx(path, program, [(x,)], budget=1e-2) < 1e-2
    else:
        with pytest.raises(BackendCannotRun, match="float16 or float32"):
            check_onnx(path, program, [(x,)], budget=1e-2)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("tool", ["onnxslim", "onnxsim"])
def test_simplifiers_keep_the_file_right(tool, inline, make_program, make_tokens, tmp_path):
    program = make_program(length=True, dynamic=True)
    path = export_onnx(program, tmp_path / "toy.onnx", inline=inline)
    if tool == "onnxslim":
        simpler = pytest.importorskip("onnxslim").slim(str(path))
    else:
        simpler = pytest.importorskip("onnxsim").simplify(onnx.load(path))[0]
    onnx.save(simpler, tmp_path / "simpler.onnx")
    onnx.checker.check_model(str(tmp_path / "simpler.onnx"), full_check=True)
    assert check_onnx(tmp_path / "simpler.onnx", program, [(make_tokens(3, 19),)]) < 1e-5
    assert [f.name for f in simpler.functions] == ([] if inline else ["ToyTake"])


class Sorted(nn.Module):
    def forward(self, x):
        rising, where = torch.sort(x, dim=1, stable=True)
        falling, back = torch.sort(x, dim=-1, stable=True, descending=True)
        return rising, where, falling, back


def test_a_stable_sort_keeps_the_order_of_equals(tmp_path):
    x = torch.randint(0, 3, (2, 7, 5), generator=torch.Generator().manual_seed(0)).float()
    program = torch.export.export(Sorted(), (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    path = export_onnx(program, tmp_path / "sorted.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for got, expected in zip(session.run(None, {"x": x.numpy()}), Sorted()(x), strict=True):
        assert np.array_equal(got, expected.numpy())
