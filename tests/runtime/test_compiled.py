"""`CompiledModel` around the toy: calls, weights, moves, files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from toys import toy_call, toy_compiled, toy_graph

import tamis
from tamis.errors import BadParameter, CorruptModel, InputMismatch, OriginalMissing, OutputExists, OutputNotWritable
from tamis.recipe_errors import PlainProgram
from tamis.report import Report
from tamis.runtime.compiled import CompiledModel


def test_any_call_of_the_original_works(compiled: CompiledModel) -> None:
    _, kwargs = toy_call(batch=3, length=5)
    expected = toy_graph(1.1).program.module()(**kwargs)["logits"]
    for outputs in (compiled(**kwargs), compiled(*kwargs.values()), compiled(kwargs)):
        torch.testing.assert_close(outputs["logits"], expected)
    with pytest.raises(InputMismatch, match="has no such input, got an argument 'pixel_values'"):
        compiled(**kwargs, pixel_values=torch.ones(1))


def test_drift_leaves_padding_out(compiled: CompiledModel) -> None:
    # The toy's tokens differ only where the mask hides them; its logits by the factor 1.1 everywhere.
    assert compiled.report.drift is not None
    assert compiled.report.drift.outputs == {"logits": pytest.approx(0.1), "tokens": 0.0}
    assert compiled.report.drift.top1 == 1.0
    drift = compiled.verify(**toy_call(batch=4)[1])
    assert drift.rows == 4
    assert drift.relative_l2 == pytest.approx(0.1)


def test_verifying_can_be_left_out() -> None:
    from tamis.runtime.api import Options, Prepared, build

    pipeline = Options().checked("scale")
    assert build(Prepared(toy_graph(), toy_call()), pipeline, Options(), verify=False).report.drift is None


def test_a_failed_comparison_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CompiledModel) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(CompiledModel, "verify", lambda self, *args, **kwargs: fail(self))
    report = toy_compiled().report
    assert report.drift is None
    assert report.notes == ("not compared with the original: RuntimeError: no memory",)


def test_weights_are_the_original_s(compiled: CompiledModel) -> None:
    assert compiled.original is not None
    state = compiled.original.program.state_dict
    assert list(compiled.state_dict()) == list(state) == ["embed.weight", "head.weight", "head.bias"]
    assert [name for name, _ in compiled.named_parameters()] == list(state)
    _, kwargs = toy_call()
    compiled.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert compiled(**kwargs)["logits"].abs().max() == 0
    assert compiled.verify().relative_l2 == 0  # the original got them too
    parent = torch.nn.Sequential(compiled)
    assert list(parent.state_dict()) == [f"0.{name}" for name in state]


def test_modes_only_set_the_flag(compiled: CompiledModel) -> None:
    assert not compiled.training
    assert torch.nn.Sequential(compiled).train()[0] is compiled
    assert compiled.training
    assert not compiled.eval().training


def test_moves(compiled: CompiledModel) -> None:
    assert compiled.to("cpu") is compiled
    assert compiled.float() is compiled
    with pytest.raises(InputMismatch) as caught:
        compiled.half()
    assert str(caught.value) == (
        "to: the compiled model keeps the dtype it was captured in, torch.float32, got torch.float16.\n"
        "  hint: convert the original model, then compile it."
    )
    before = compiled.original
    compiled.to("meta")
    assert compiled.device.type == "meta"
    assert before is not None
    assert {tensor.device.type for tensor in before.program.state_dict.values()} == {"cpu"}


def test_benchmark_says_it_in_one_line(compiled: CompiledModel) -> None:
    found = compiled.benchmark(repeats=3)
    assert found.rounds == 3
    assert found.low <= found.speedup <= found.high
    assert "\n" not in str(found)
    assert "at input_ids i64[2, 8], attention_mask i64[2, 8], cpu x" in str(found)


def test_saved_and_loaded(compiled: CompiledModel, tmp_path: Path) -> None:
    path = tmp_path / "toy.pt2"
    assert compiled.save(path) == str(path)
    with pytest.raises(OutputExists, match=r"hint: overwrite=True \(--overwrite\) replaces it"):
        compiled.save(path)
    compiled.save(path, overwrite=True)
    loaded = tamis.load(path)
    _, kwargs = toy_call(batch=5, length=7)
    assert torch.equal(loaded(**kwargs)["logits"], compiled(**kwargs)["logits"])
    assert loaded.recipe == compiled.recipe
    assert loaded.report == compiled.report
    assert list(loaded.state_dict()) == list(compiled.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["toy.pt2"]


def test_a_loaded_model_has_no_original(compiled: CompiledModel, tmp_path: Path) -> None:
    loaded = tamis.load(compiled.save(tmp_path / "toy.pt2"))
    with pytest.raises(OriginalMissing, match="verify: a model loaded from a file has no original"):
        loaded.verify()
    with pytest.raises(OriginalMissing, match="benchmark"):
        loaded.benchmark()
    assert loaded.with_original(compiled.original).verify().relative_l2 == pytest.approx(0.1)


def test_other_files_are_refused(compiled: CompiledModel, tmp_path: Path) -> None:
    plain = tmp_path / "plain.pt2"
    torch.export.save(toy_graph().program, plain)
    with pytest.raises(PlainProgram, match=r"(?s)tamis did not make: it holds no recipe.*hint: tamis\.compile\(path"):
        tamis.load(plain)
    (tmp_path / "cut.pt2").write_bytes(Path(compiled.save(tmp_path / "toy.pt2")).read_bytes()[:2000])
    with pytest.raises(CorruptModel, match=r"cut\.pt2: cannot be read"):
        tamis.load(tmp_path / "cut.pt2")


def test_nothing_is_left_of_a_failed_save(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: object, path: Path, **kwargs: object) -> None:
        Path(path).write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(tamis.errors.ExportFailed, match=r"could not be written as a torch\.export program: disk full"):
        compiled.save(tmp_path / "toy.pt2")
    assert list(tmp_path.iterdir()) == []


def test_exported(compiled: CompiledModel, tmp_path: Path) -> None:
    import onnx

    path = compiled.export(tmp_path / "toy.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["tamis.recipe"]) == compiled.recipe.to_dict()
    with pytest.raises(OutputExists):
        compiled.export(path)
    with pytest.raises(OutputNotWritable, match=r"toy\.onnx is a file"):
        compiled.export(Path(path) / "x.onnx")


def test_nothing_is_left_of_an_export_that_disagrees(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tamis.lowering import callables

    wrong = toy_graph(1.3)
    monkeypatch.setattr(callables, "lower", lambda program, target, mode=None: wrong.program.module())
    with pytest.raises(tamis.errors.BackendMismatch) as caught:
        compiled.export(tmp_path / "toy.onnx")
    assert str(caught.value).startswith(
        f"{tmp_path}/toy.onnx: ONNX Runtime and torch disagree: output logits differs by"
    )
    assert "(3, 8)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    compiled.export(tmp_path / "toy.onnx", check=False)
    assert [p.name for p in tmp_path.iterdir()] == ["toy.onnx"]


def test_what_is_checked_before_work_starts() -> None:
    with pytest.raises(BadParameter) as caught:
        tamis.compile(None, passes="scale", mode="fast")
    assert str(caught.value).startswith(
        "compile: mode must be one of default, reduce-overhead, max-autotune, got 'fast'."
    )
    with pytest.raises(tamis.errors.UnknownTarget, match="unknown target 'tpu'"):
        tamis.compile(None, passes="scale", target="tpu")
    with pytest.raises(BadParameter, match="passes must be given, got none"):
        tamis.compile(None, passes=[])


def test_noop() -> None:
    with pytest.raises(tamis.errors.NothingChanged) as caught:
        toy_compiled(by=1)
    assert "1 is the identity" in str(caught.value)
    report = toy_compiled(by=1, allow_noop=True).report
    assert not report.changed
    assert report.drift is not None
    assert report.drift.relative_l2 == 0
    assert "skipped: scale:by=1 at layer the model: 1 is the identity" in str(report)


def test_reports_survive_json(compiled: CompiledModel) -> None:
    report = compiled.report.with_changes(benchmarks=(compiled.benchmark(repeats=1),))
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_recipe_inside(compiled: CompiledModel, tmp_path: Path) -> None:
    with zipfile.ZipFile(compiled.save(tmp_path / "toy.pt2")) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("extra/tamis.json")]
        assert json.loads(archive.read(member))["recipe"]["passes"] == ["scale"]


def test_inductor_mode() -> None:
    fast = toy_compiled(mode="default")
    _, kwargs = toy_call(batch=3)
    torch.testing.assert_close(fast(**kwargs)["logits"], toy_compiled()(**kwargs)["logits"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((), "x is missing"),
        ((1.0,), "x is a float, not a tensor"),
        ((torch.randn(2, 3, 64, 64).double(),), r"x is torch.float64 \[2, 3, 64, 64\], not torch.float32"),
        ((torch.randn(3, 64, 64),), r"x is torch.float32 \[3, 64, 64\], not torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(wrong, said) -> None:
    images = torch.randn(2, 3, 64, 64)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    fast = tamis.compile(model, (images,), passes="tome:r=2", verify=False)
    with pytest.raises(InputMismatch, match=said):
        fast(*wrong)
