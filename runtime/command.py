"""The work of `optimize-model`: capture, rewrite, prove, write; and the two questions that write nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DriftTooLarge, NoAttention, NoTokenStream, SlowerThanOriginal, UnknownAttention
from ..onnx_errors import OpaqueInTheWay
from ..plugins import load_plugin
from ..report import Benchmark
from ..rewrite import Pipeline
from .api import Prepared, build, held_to, prepare
from .break_even import find_break_even
from .compiled import CompiledModel
from .files import copy_companions, stem_of, whole_directory, write_text
from .inputs import Call
from .options import DEFAULTS, Options
from .progress import Progress
from .request import FOR_ONNX, Request

if TYPE_CHECKING:
    from .calibrate import Calibration

NOTHING_TO_REDUCE = (NoAttention, UnknownAttention, NoTokenStream, OpaqueInTheWay)


def show_passes(plugins: Iterable[Path], as_json: bool) -> int:
    """`--list-passes`, those of the named plug-in files included."""
    from .check import list_passes
    from .render import print_passes

    with _logging():
        for path in plugins:
            load_plugin(path)
        passes = list_passes()
    if as_json:
        print(json.dumps(passes, indent=2))
    else:
        print_passes(passes)
    return 0


def run(request: Request) -> int:
    """Do what was asked; returns the exit code, or raises a TamisError, which has one."""
    for path in request.plugins:
        load_plugin(path)
    if request.check:
        with _at_work(request) as step:
            found = _check(request, step)
        _print_check(found, request.json)
        return 0
    with _at_work(request) as step:
        compiled = _optimize(request, step)
    _print_report(compiled, request.json)
    # the last one is of the artifact itself where that is an ONNX file
    benchmark = compiled.report.benchmarks[-1] if compiled.report.benchmarks else None
    if benchmark is not None and benchmark.speedup < 1:
        hint = "the result was kept; try more tokens removed, larger batches or longer inputs, or another mode."
        shapes, speedup = benchmark.shapes, benchmark.speedup
        raise SlowerThanOriginal(where=compiled.report.name, speedup=speedup, shapes=shapes, hint=hint)
    return 0


def _check(request: Request, step: Progress) -> dict[str, Any]:
    from .check import check_model, refused_model

    passes = Pipeline.parse(request.passes).passes
    step(f"loading {request.model}")
    try:
        prepared = prepare(request.model, step=step)
    except NOTHING_TO_REDUCE as error:  # an answer to the question, not a failure
        return refused_model(stem_of(request.model), error)
    return check_model(prepared.graph, prepared.call, step, passes)


def _optimize(request: Request, step: Progress) -> CompiledModel:
    asked = request.options
    looks = asked["dense_below"] == "auto"
    options = Options(**{name: asked[name] for name in DEFAULTS} | ({"dense_below": 0} if looks else {}))
    options.check_never_slower(looks)
    recipe = request.recipe
    may_be_none = replace(options, allow_noop=options.allow_noop or request.calibrate is not None)
    pipeline = may_be_none.checked(list(request.passes) or None, recipe, request.config)
    step(f"loading {request.model}")
    prepared = prepare(request.model, step=step, any_model=not (pipeline.passes or request.calibrate))
    prepared = held_to(recipe, request.config, prepared, pipeline, any_model=request.any_model)
    found = _calibrated(prepared, pipeline, request, step)
    pipeline = pipeline if found is None else Pipeline(found.passes)
    options.check_token_map(pipeline)
    compiled = build(prepared, pipeline, options, verify=request.verify is None, source=request.model, step=step)
    compiled.recipe = replace(compiled.recipe, options={**compiled.recipe.options, **_said(asked, FOR_ONNX)})
    if found is not None:
        notes = (*compiled.report.notes, found.headline(), *found.lines())
        compiled.report = compiled.report.with_changes(notes=notes, calibration=found.to_dict())
    if request.verify:
        step(f"comparing with the original on {request.verify}")
        compiled.report = compiled.report.with_changes(drift=_drift(compiled, request.verify))
    _hold_to_budget(compiled, request)
    if looks:
        step("timing it against the original at several lengths")
        find_break_even(compiled)
    if request.bench:
        step("timing it against the original")
        _note_benchmark(compiled, compiled.benchmark())
    _write(compiled, request, prepared.directory, step)
    return compiled


def _said(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The options of these names that are on."""
    return {name: True for name in names if options[name]}


def _calibrated(prepared: Prepared, pipeline: Pipeline, request: Request, step: Progress) -> Calibration | None:
    """The patterns found for each head, among the passes given, when that was asked for."""
    if request.calibrate is None:
        return None
    from .calibrate import search
    from .data import calls_of

    step(f"calibrating on {request.calibrate}")
    calls = list(calls_of(prepared.graph.program, prepared.call, request.calibrate, rows=1))
    patterns = pipeline.passes or None
    return search(prepared.graph, calls, patterns, budget=request.budget, least=request.least, share=None)


def _drift(compiled: CompiledModel, path: str) -> Any:
    from .verify import combine

    return combine([compiled.verify(*args, **kwargs) for args, kwargs in _calls(compiled, path)])


def _calls(compiled: CompiledModel, path: str) -> Iterator[Call]:
    """The rows of a data file as calls of the original."""
    from .data import calls_of

    assert compiled.original is not None
    return calls_of(compiled.original.program, compiled.example_call, path)


def _hold_to_budget(compiled: CompiledModel, request: Request) -> None:
    if request.max_drift is None:
        return
    drift = compiled.report.drift
    # No comparison is no proof: a budget that could not be checked is missed.
    found = float("inf") if drift is None or not drift.outputs else drift.relative_l2
    if not found <= request.max_drift:
        where = f"{compiled.report.name} with {' + '.join(compiled.report.passes)}"
        raise DriftTooLarge(where=where, drift=found, budget=request.max_drift)


def _write(compiled: CompiledModel, request: Request, directory: Any, step: Progress) -> None:
    output, overwrite = request.output, request.overwrite
    step(f"writing {output.path}")
    if output.kind == "pt2":
        compiled.save(output.path, native=request.native, overwrite=overwrite)
        _note_artifact(compiled, {"path": str(output.path), "kind": output.kind})
    elif output.kind == "onnx":
        _export(compiled, output.path, request, step)
    else:
        with whole_directory(output.path) as content:
            _export(compiled, content / "model.onnx", request, step)
            if compiled.target.arch:
                _compile_kernels(compiled, content, step)
            compiled.recipe.write(content / "recipe.yaml")
            (content / "report.json").write_text(compiled.report.to_json(), encoding="utf-8")
            copy_companions(directory, content)
    if request.draw:
        step(f"drawing {request.draw}")
        _draw(compiled, request.draw, request)
    if request.report:
        write_text(Path(request.report), compiled.report.to_json() + "\n", overwrite)


def _draw(compiled: CompiledModel, path: Path, request: Request) -> None:
    """Draw the first row of the data to verify on, or of the example where there is none."""
    args, kwargs = compiled.example_call if request.verify is None else next(_calls(compiled, request.verify))
    compiled.draw(path, *args, overwrite=request.overwrite, **kwargs)
    _note_artifact(compiled, {"path": str(path), "kind": "png"})


def _compile_kernels(compiled: CompiledModel, content: Path, step: Progress) -> None:
    """The program and the kernels it runs with on the target."""
    step(f"compiling kernels for {compiled.target}")
    compiled.save(content / "model.pt2")
    found = compiled.write_kernels(content)
    compiled.report = compiled.report.with_changes(notes=(*compiled.report.notes, found.headline()))


def _export(compiled: CompiledModel, path: Path, request: Request, step: Progress) -> None:
    """Write an ONNX file, which is checked on the way, and time it if that was asked for."""
    compiled.export(path, **_said(request.options, FOR_ONNX), overwrite=request.overwrite)
    checked = "ONNX Runtime agrees with torch at other sizes"
    _note_artifact(compiled, {"path": str(request.output.path), "kind": request.output.kind, "checked": checked})
    if request.bench:
        step("timing the ONNX file against the original's")
        _note_benchmark(compiled, compiled.benchmark_onnx(path, **_said(request.options, ["ort_contrib"])))


def _note_benchmark(compiled: CompiledModel, benchmark: Benchmark) -> None:
    compiled.report = compiled.report.with_changes(benchmarks=(*compiled.report.benchmarks, benchmark))


def _note_artifact(compiled: CompiledModel, artifact: dict[str, Any]) -> None:
    compiled.report = compiled.report.with_changes(artifacts=(*compiled.report.artifacts, artifact))


def _print_check(check: dict[str, Any], as_json: bool) -> None:
    from .render import print_check

    if as_json:
        print(json.dumps(check, indent=2, default=str))
    else:
        print_check(check)


def _print_report(compiled: CompiledModel, as_json: bool) -> None:
    from .render import print_report

    if as_json:
        print(json.dumps({**compiled.report.to_dict(), "recipe": compiled.recipe.to_dict()}, indent=2))
    else:
        print_report(compiled.report)


@contextlib.contextmanager
def _at_work(request: Request) -> Iterator[Progress]:
    with _stdout_for_the_result(), _logging(request.quiet, request.verbose), Progress(8, quiet=request.quiet) as step:
        yield step


@contextlib.contextmanager
def _stdout_for_the_result() -> Iterator[None]:
    """What libraries print while they work goes to stderr: stdout carries the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _logging(quiet: bool = False, verbose: int = 0) -> Iterator[None]:
    """Warnings of ours always, of others with -v; -v shows our progress, -vv debugging."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    log = logging.getLogger("tamis")
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
