"""The command from a model to its artifacts: every option and every exit code, on toys; one real model at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command import run
from toys import toy_call, toy_graph

import tamis
from tamis.report import Benchmark
from tamis.runtime.compiled import CompiledModel

pytestmark = pytest.mark.usefixtures("workplace")


def made(workplace: Path) -> list[str]:
    """Files beside the model."""
    return sorted(p.name for p in workplace.iterdir() if p.name != "toy.pt2")


def arrays(**changes: Any) -> dict[str, Any]:
    """The toy's inputs as arrays: 40 rows, which are two calls."""
    ids = np.arange(40 * 8).reshape(40, 8) % 64
    return {"input_ids": ids, "attention_mask": np.ones((40, 8), dtype=np.int32), **changes}


def test_onnx_by_default(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    code, out, err = run(capsys, "toy.pt2", "--pass", "scale:by=1.01", "--report", "r.json")
    assert code == 0, err
    assert made(workplace) == ["r.json", "toy-tamis.onnx"]
    assert out.startswith("toy: scale:by=1.01")
    assert "drift: relative L2 0.01, cosine 1.000000, top-1 agreement 100.0% (2 rows)" in out
    assert out.splitlines()[-1] == "wrote toy-tamis.onnx"
    lines = err.splitlines()
    assert lines[0].endswith("s] loading toy.pt2")
    assert lines[-1].startswith("PASSED | runtime ")
    assert lines[-1].endswith(" s | optimize-model toy.pt2 --pass scale:by=1.01 --report r.json")
    report = json.loads(Path("r.json").read_text())
    assert report["artifacts"] == [
        {"path": "toy-tamis.onnx", "kind": "onnx", "checked": "ONNX Runtime agrees with torch at other sizes"}
    ]


def test_json_and_pt2(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    code, out, err = run(
        capsys, "-m", "toy.pt2", "--pass", "scale", "--pass", "scale:by=1.2", "-o", "x.pt2", "--json", "-q"
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["passes"] == ["scale", "scale:by=1.2"]
    assert result["recipe"]["model"] == "toy.pt2"
    loaded = tamis.load("x.pt2")
    assert loaded.recipe.to_dict() == result["recipe"]
    _, kwargs = toy_call()
    torch.testing.assert_close(loaded(**kwargs)["logits"], toy_graph(1.2).program.module()(**kwargs)["logits"])


def test_directories_hold_all_one_needs(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    (workplace / "tokenizer.json").write_text("{}")
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "out/", "--inline", "--ort-contrib", "--no-restore")
    assert code == 0, err
    assert made(workplace / "out") == ["model.onnx", "recipe.yaml", "report.json", "tokenizer.json"]
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert recipe["options"] == {"restore": False, "inline": True, "ort_contrib": True}
    (note,) = json.loads(Path("out/report.json").read_text())["notes"]
    assert note.startswith("the ONNX file has standard operators alone")
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "out")
    assert (code, "out/model.onnx: exists already" in err) == (2, True)


def test_exit_3_nothing_changed(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    code, out, err = run(capsys, "toy.pt2", "--pass", "scale:by=1", "-o", "x.pt2")
    assert (code, out) == (3, "")
    assert "error: scale:by=1: asked for, but nothing in the model changed.\n  1 is the identity\n" in err
    assert made(workplace) == []
    code, out, _ = run(capsys, "toy.pt2", "--pass", "scale:by=1", "-o", "x.pt2", "--allow-noop")
    assert code == 0
    assert "skipped: scale:by=1" in out


def test_exit_4_drift(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    code, out, err = run(capsys, "toy.pt2", "--pass", "scale", "--max-drift", "0.05", "-o", "x.pt2")
    assert (code, out) == (4, "")
    assert (
        "error: toy with scale: output drift 0.1 is over the budget 0.05 (largest relative L2 difference of any row)."
        in err
    )
    assert err.splitlines()[-1].startswith("FAILED | ")
    assert made(workplace) == []
    assert run(capsys, "toy.pt2", "--pass", "scale", "--max-drift", "0.2", "-o", "x.pt2")[0] == 0


def test_a_budget_that_cannot_be_checked_is_missed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    def fail(self: CompiledModel, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(CompiledModel, "verify", fail)
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "--max-drift", "9", "-o", "x.pt2")
    assert (code, "output drift inf is over the budget 9" in err) == (4, True)
    assert made(workplace) == []


def timed(speedup: float, mode: str) -> Benchmark:
    """A made-up timing."""
    return Benchmark(speedup, speedup, speedup, 1.0, 1 / speedup, 7, "ids i64[2, 8]", "cpu x1", mode)


def test_exit_5_slower_but_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    for speedup, expected in ((0.5, 5), (2.0, 0)):
        monkeypatch.setattr(CompiledModel, "benchmark", lambda self, by=speedup: timed(by, "eager"))
        code, out, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--bench", "--overwrite")
        assert code == expected
        assert f"speed: {speedup:.2f}x {'SLOWER' if expected else 'faster'}" in out
        assert ("the result runs at 0.50x of the original's speed at ids i64[2, 8]" in err) == bool(expected)
        assert made(workplace) == ["x.pt2"]


@pytest.mark.parametrize(("torch_speed", "onnx_speed", "expected"), [(0.5, 2.0, 0), (2.0, 0.5, 5)])
def test_an_onnx_artifact_is_timed_itself(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workplace: Path,
    torch_speed: float,
    onnx_speed: float,
    expected: int,
) -> None:
    """Both are reported; what was written decides the exit code."""
    found: list[Path] = []

    def time_onnx(self: CompiledModel, path: Path) -> Benchmark:
        found.append(path)
        assert path.is_file()
        return timed(onnx_speed, "ONNX Runtime")

    monkeypatch.setattr(CompiledModel, "benchmark", lambda self: timed(torch_speed, "eager"))
    monkeypatch.setattr(CompiledModel, "benchmark_onnx", time_onnx)
    code, out, _ = run(capsys, "toy.pt2", "--pass", "scale", "-o", "out/", "--bench", "--json")
    assert code == expected
    assert [(one["mode"], one["speedup"]) for one in json.loads(out)["benchmarks"]] == [
        ("eager", torch_speed),
        ("ONNX Runtime", onnx_speed),
    ]
    report = json.loads(Path("out/report.json").read_text())
    assert [one["mode"] for one in report["benchmarks"]] == ["eager", "ONNX Runtime"]


def test_verify_on_data(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    np.savez("data.npz", **arrays())
    code, out, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--verify", "data.npz", "--json")
    assert code == 0, err
    drift = json.loads(out)["drift"]
    assert drift["rows"] == 40
    assert drift["relative_l2"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"extra": np.ones((40, 8))},
            "needs one array per input (input_ids, attention_mask), got input_ids, attention_mask, extra",
        ),
        ({"input_ids": np.ones((40, 8), dtype=np.float32)}, "input_ids must be torch.int64, got dtype float32"),
        ({"input_ids": np.ones((40,), dtype=np.int64)}, "input_ids must have 2 dimensions like [2, 8], got [40]"),
        ({"input_ids": np.ones((39, 8), dtype=np.int64)}, "all arrays must have the same number of rows, got [39, 40]"),
        ({"input_ids": np.array([["a"]])}, "input_ids must hold numbers, got dtype <U1"),
    ],
)
def test_data_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], workplace: Path, changes: dict[str, Any], text: str
) -> None:
    np.savez("data.npz", **arrays(**changes))
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--verify", "data.npz")
    assert (code, f"error: data.npz: {text}" in err) == (2, True), err
    assert made(workplace) == ["data.npz"]


def test_data_that_the_original_cannot_run(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    np.savez("data.npz", **arrays(input_ids=np.full((40, 8), 64)))  # the toy knows 64 tokens, 0 to 63
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--verify", "data.npz")
    assert code == 2
    assert "error: toy: the original model must run on these inputs, got IndexError: index out of range" in err
    assert "hint: check token ids against the vocabulary" in err
    assert made(workplace) == ["data.npz"]


def test_examples_that_the_original_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    """They are no reason to call the export broken."""
    program = toy_graph().program
    _, kwargs = program.example_inputs
    program.example_inputs = ((), {**kwargs, "input_ids": kwargs["input_ids"] + 64})
    torch.export.save(program, "toy.pt2")
    code, out, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.onnx")
    assert code == 2
    assert "error: toy: the original model must run on these inputs, got IndexError: index out of range" in err
    code, out, _ = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2")
    assert (code, "note: not compared with the original: toy: the original model must run on" in out) == (0, True)


def test_data_that_is_cut_short(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    np.savez("data.npz", **arrays())
    Path("data.npz").write_bytes(Path("data.npz").read_bytes()[:-40])
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--verify", "data.npz")
    assert (code, "data.npz: cannot be read as NumPy arrays: File is not a zip file" in err) == (2, True), err
    assert "hint: write it with numpy.savez" in err


def test_data_that_is_no_array_file(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    Path("data.npy").write_text("some text")
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--verify", "data.npy")
    assert (code, "data.npy: cannot be read as NumPy arrays: it is no .npz or .npy file" in err) == (2, True), err
    Path("data").mkdir()
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--verify", "data")
    assert (code, "data: cannot be read as NumPy arrays: it is a directory" in err) == (2, True), err


def test_data_that_needs_pickle(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    np.save("data.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--verify", "data.npy")
    assert (code, "data.npy: cannot be read as NumPy arrays: Object arrays cannot be loaded" in err) == (2, True), err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("tomme:r=3", "error: unknown pass 'tomme'; did you mean tome or tomesd?"),
        ("tome:keep_ratio=1.3", "error: tome: keep_ratio must be in (0, 1], got 1.3"),
        ("tome:ratio=0.3", "write keep_ratio=0.7"),
        ("tome:13", "cannot read the pass 'tome:13': '13' is not key=value"),
        ("tome:r=1,r=2", "cannot read the pass 'tome:r=1,r=2': r is given twice"),
    ],
)
def test_wrong_passes(capsys: pytest.CaptureFixture[str], workplace: Path, text: str, error: str) -> None:
    code, out, err = run(capsys, "toy.pt2", "--pass", text, "-o", "x.onnx")
    assert (code, out) == (2, "")
    assert error in err
    assert made(workplace) == []


def test_exit_1_a_pass_fails(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale + fail", "-o", "x.onnx")
    assert code == 1
    assert "error: RuntimeError: a bug\n  passes before: scale\n" in err
    assert made(workplace) == []


def test_wrong_target(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--target", "tpu")
    assert (code, "unknown target 'tpu'" in err) == (2, True)


def test_mode_and_token_map_reach_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    # The toy pass ignores token_map, so there is nothing to compare: only the plumbing is looked at.
    code, out, err = run(
        capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--json", "--target", "cpu", "--token-map"
    )
    assert code == 0, err
    assert json.loads(out)["recipe"]["options"] == {"target": "cpu", "token_map": True}


def test_check_writes_nothing(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    code, out, err = run(capsys, "toy.pt2", "--check")
    assert code == 0, err
    assert made(workplace) == []
    assert "input input_ids: i64[2, 8]" in out
    code, out, _ = run(capsys, "toy.pt2", "--check", "--json")
    found = {one["name"]: one for one in json.loads(out)["passes"]}
    assert {**found["scale"], "places": None} == {
        "name": "scale",
        "applies": True,
        "tried": "scale",
        "layers": "None",
        "reason": "",
        "places": None,
    }
    assert found["fail"]["reason"] == "toys have no attention"
    assert found["tome"]["tried"] == "tome:r=1"
    assert not found["tome"]["applies"]


def test_stdout_carries_the_result_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    def chatty(*args: Any, **kwargs: Any) -> Any:
        print("a library says something")
        return toy_graph()

    monkeypatch.setattr(tamis.capture, "capture", chatty)
    code, out, err = run(capsys, "toy.pt2", "--pass", "scale", "-o", "x.pt2", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "toy"
    assert "a library says something" in err
