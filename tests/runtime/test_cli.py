"""`optimize-model`: what is answered before any work, and how fast."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from command import run

from tamis import __version__
from tamis.runtime import cli

PROMISED = 0.5  # seconds of the processor: machines that run tests run other things too


def children_seconds() -> float:
    """Processor time of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["missing/vit.pt2", "--pass", "tome:r=1"], 2)])
def test_quick_answers(argv: list[str], code: int, tmp_path: Path) -> None:
    """Best of five in a fresh process, without torch."""
    probe = "import sys; from tamis.runtime.cli import main; code = main(sys.argv[1:]); "
    probe += "sys.exit(99 if 'torch' in sys.modules else code)"
    best = float("inf")
    for _ in range(5):
        start = children_seconds()
        done = subprocess.run([sys.executable, "-c", probe, *argv], cwd=tmp_path, capture_output=True, text=True)
        best = min(best, children_seconds() - start)
        assert done.returncode == code, done.stderr
    assert best < PROMISED


def test_python_m_tamis(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tamis", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"optimize-model {__version__}\n"


def test_help_documents_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for text in (
        "0  done",
        "1  failed",
        "2  wrong usage",
        "3  a pass changed",
        "4  the drift is over",
        "5  --bench found",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "error: no model was given.\n  hint: optimize-model INPUT --pass NAME:ARGS, or --help.\n"),
        (["a", "-m", "b"], "error: the model is given twice, as INPUT and with --model.\n"),
        (["timm:a"], "error: no passes were given.\n  hint: --pass tome:r=13, or --check"),
        (["a", "--check", "--report", "r.html"], "error: --report r.html: only JSON is written.\n"),
        (["a", "--check", "-q", "-v"], "error: --quiet and --verbose exclude each other.\n"),
        (["a", "--check", "-o", "x.onnx"], "error: --check and --output exclude each other.\n  hint: --check makes no"),
        (["a", "--check", "--bench"], "error: --check and --bench exclude each other.\n"),
        (["a", "--check", "--max-drift", "0"], "error: --check and --max-drift exclude each other.\n"),
        (["a", "-o", ""], "error: --output is empty.\n  hint: -o model.onnx, or -o . for this directory.\n"),
        (["a", "--native"], "error: --native makes a .pt2 file, and none is to be written.\n  hint: -o model.pt2\n"),
        (
            ["a", "--ort-contrib", "-o", "x.pt2"],
            "error: --ort-contrib is for ONNX, and x.pt2 is none.\n  hint: -o model.onnx, or leave it out.\n",
        ),
        (["a", "--inline", "--native", "-o", "x.pt2"], "error: --inline is for ONNX, and x.pt2 is none.\n"),
        (["a", "--frobnicate"], "error: unrecognized arguments: --frobnicate.\n"),
        (["a", "--max-drift", "-1"], "error: argument --max-drift: must be 0 or more, got -1.\n"),
        (["a", "--max_drift", "nan"], "error: argument --max-drift: must be 0 or more, got nan.\n"),
        (["a", "--max-drift", "x"], "error: argument --max-drift: must be a number, got x.\n"),
        (["a", "--budget", "x"], "error: argument --budget: must be a number, got x.\n"),
        (["a", "--mode", "fast"], "error: argument --mode: invalid choice: 'fast'"),
        (["a.py:f", "--pass", "tome:r=1", "-o", "x.bin"], "error: x.bin: cannot tell from the name what to write.\n"),
        (["a.pt2", "--pass", "tome:r=1"], "error: a.pt2: no such file or directory.\n"),
        (["a.pt2", "--config", "c.yaml"], "error: c.yaml: no such file or directory.\n"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_checked_before_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factory does not even run: running it would fail with another error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("raise RuntimeError('work has started')\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "make-tamis.onnx").write_text("old")
    ask = ("net.py:make", "--pass", "tome:r=1")
    cases = {
        (): "make-tamis.onnx: exists already and was left alone",
        ("-o", "file/x.onnx"): "file/x.onnx: cannot be written",
        ("-o", "file/out/"): "is a file",
        ("-o", "missing/x.onnx"): "missing/x.onnx: cannot be written (the directory missing does not exist)",
        ("-o", "missing/out/"): "the directory missing does not exist",
        ("-o", "x.onnx", "--report", "missing/r.json"): "missing/r.json: cannot be written",
        ("-o", "x.onnx", "--verify", "data.npz"): "data.npz: no such file or directory",
    }
    before = sorted(p.name for p in tmp_path.iterdir())
    for more, text in cases.items():
        code, _, err = run(capsys, *ask, *more)
        assert (code, text in err) == (2, True), err
        assert err.splitlines()[-1].startswith("FAILED | runtime 0.")
        assert err.splitlines()[-1].endswith(f"| optimize-model {' '.join([*ask, *more])}")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    code, _, err = run(capsys, *ask, "--overwrite", "-q")
    assert "work has started" in err
    assert "FAILED |" not in err


def test_recipes_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [tome:r=1]\n")
    code, _, err = run(capsys, "--config", str(recipe))
    assert (code, "no model was given, and" in err) == (2, True)
    recipe.write_text("passes: [tome:r=1]\noptions: {colour: red}\n")
    code, _, err = run(capsys, "x", "-c", str(recipe))
    assert (code, "unknown option 'colour' (known: target" in err) == (2, True)


def test_bugs_are_told_from_mistakes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> int:
        raise KeyError("surprise")

    monkeypatch.setattr(cli, "_run", fail)
    code, _, err = run(capsys, "x", "--check")
    assert code == 1
    assert err.startswith("error: KeyError: 'surprise'\n  hint: this is a bug in tamis or its environment; --debug")
    assert "Traceback" not in err
    code, _, err = run(capsys, "x", "--check", "--debug")
    assert "Traceback" in err


def test_interruption(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert run(capsys, "x", "--check") == (130, "", "interrupted; nothing was written\n")


def test_list_passes(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    code, out, err = run(capsys, "--list-passes")
    assert code == 0
    assert "evit  (reduction)\n    Keep " in out
    assert '    seed = 0   another draw of grouping "random".\n' in out
    assert err.startswith("PASSED | runtime")
    code, out, _ = run(capsys, "--list_passes", "--json")
    passes = {one["name"]: one for one in json.loads(out)}
    assert passes["tome"]["parameters"].items() >= {"r": "none", "layers": "none", "prop_attn": "true"}.items()
    assert (passes["tome"]["origin"], passes["tome"]["family"]) == ("tamis", "reduction")
    for name in ("pool", "clca"):  # their own parameters say how many tokens stay
        assert not {"r", "keep_ratio"} & {*passes[name]["parameters"], *passes[name]["explained"]}
    unexplained = {name: set(one["parameters"]) - set(one["explained"]) for name, one in passes.items()}
    assert not any(missing for name, missing in unexplained.items() if passes[name]["origin"] == "tamis")
    assert passes["tomesd"]["explained"]["sy"] == "columns and rows of a cell."
    assert (passes["scale"]["origin"], passes["scale"]["parameters"]) == ("module toys", {"by": "1.1"})
