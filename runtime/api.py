"""`tamis.compile` and `tamis.load`, and the steps between a model and a `CompiledModel` that the command shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExampleInputsMissing, TamisError
from ..graph import TokenGraph
from ..parameters import check_flags, path_text
from ..recipe_errors import WrongSourceModel
from ..report import Report, outcome_dict
from ..rewrite import Pipeline, Result
from ..target import Target
from .compiled import CompiledModel
from .inputs import Call, describe, example_call
from .options import Options, plugins_of, weights_of
from .recipe import Recipe, versions

if TYPE_CHECKING:
    from .native import NativeModel
    from .onnx_model import OnnxModel

Step = Callable[[str], None]  # told what starts now


def compile(
    model: Any,
    args: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    passes: Any = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    target: str | Target = "auto",
    dynamic_shapes: Any = "auto",
    mode: str | None = None,
    restore: bool = True,
    token_map: bool = False,
    allow_noop: bool = False,
    verify: bool = True,
    never_slower: bool = False,
    dense_below: int = 0,
) -> CompiledModel:
    """Rewrite a model so that it computes less, and make it callable.

    The result shares the model's weights; the model itself is not changed.

    Args:
        model: an `nn.Module` in eval mode, an `fx.GraphModule`, an `ExportedProgram`, or text: the path of a `.pt2` or
            `.onnx` file, `timm:NAME`, `hf:DIR_OR_ID`, `file.py:function`.
        args: example inputs, positional (a tuple, or one tensor); batch 1 is as good as any.
        kwargs: example inputs by keyword.
        passes: pass objects, or text: `"tome:r=13 + evit:keep_ratio=0.7"`, or a list of either.
        recipe: passes and options of an earlier run: a `Recipe`, a recipe.yaml, or an `.onnx` or `.pt2` file that tamis
            made.  What is given here wins.  Another model than the recipe's is refused (see `Recipe.for_any_model`).
        target: "auto" (the device the weights are on), "cpu", "cuda", "cuda:sm_90", "rocm:gfx942".
        dynamic_shapes: "auto" (batch, and length where the model allows) or as in `torch.export.export`.
        mode: None runs eagerly; "default", "reduce-overhead" and "max-autotune" go through Inductor.
        restore: outputs with a token axis get their full length back.
        token_map: also return, for every original token, the slot it ended in: int64 [B, N], -1 for dropped ones; the
            model then returns (outputs, token_map).
        allow_noop: accept passes that change nothing.
        never_slower: run the original at sizes where the result is not faster: each size is timed when it first comes,
            or known from others (see `CompiledModel.guard`).  Neither token_map nor restore=False go with it.
        dense_below: calls of fewer tokens, padding included, run the original; `tamis.find_break_even` measures from
            how many on the result is faster.  A file holds the result alone, and the number in its recipe.
        verify: run original and result once on the example inputs and put the drift into the report; never raises.

    Raises:
        TamisError: the subclass says what is wrong (see `tamis.errors`); NothingChanged when a pass changed nothing.
    """
    check_flags("compile", verify=verify, never_slower=never_slower)
    recipe, path = Recipe.given(recipe)
    options = Options(target, mode, restore, token_map, allow_noop, dense_below).over(recipe)
    pipeline = options.checked(passes, recipe, path)
    options.check_never_slower(never_slower)
    prepared = prepare(model, args, kwargs, dynamic_shapes, any_model=not pipeline.passes)
    prepared = held_to(recipe, path, prepared, pipeline)
    source = model if isinstance(model, str) else None
    return build(prepared, pipeline, options, verify=verify, never_slower=never_slower, source=source)


def load(
    path: str | os.PathLike[str], *, trusted: bool = False, device: str = "auto"
) -> CompiledModel | NativeModel | OnnxModel:
    """Load what `CompiledModel` saved or exported.  Nothing is unpickled; unless trusted, no code from the file runs.

    The original is not in the file, so `verify` and `benchmark` need it: `load(path).with_original(compiled.original)`.

    Args:
        path: a `.pt2` file, or an `.onnx` file, which ONNX Runtime runs (see `OnnxModel`).
        trusted: allow native code: a package (`save(native=True)`), which runs when it is loaded and comes back as a
            `NativeModel`, or kernels beside the file (`write_kernels`).

        device: where an `.onnx` file runs: "auto" is a GPU where ONNX Runtime and torch both have one; "cpu", "cuda".

    Raises:
        MissingDependency, TargetMissing, BackendCannotRun: see `OnnxModel`.
        ModelNotFound, CorruptModel, PickleRefused, UnsafeProgram, UntrustedNativeCode: see `capture.safe_pt2`.
        PlainProgram: it was not saved by tamis.
    """
    from ..capture.paths import check_exists
    from .package import load_package

    path = path_text("load", path)
    if path.endswith(".onnx"):
        from .onnx_model import OnnxModel

        check_exists(path)
        return OnnxModel(path, device)
    return load_package(path, trusted=trusted)


@dataclass(frozen=True)
class Prepared:
    """A captured model, its example call, and what its source said of it (see `capture.sources.Source`)."""

    graph: TokenGraph
    call: Call
    directory: Path | None = None
    note: str = ""


def prepare(
    model: Any,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
    step: Step = lambda text: None,
    *,
    any_model: bool = False,
) -> Prepared:
    """Load and capture a model; raises what these do, and ExampleInputsMissing.

    any_model  accept one without tokens to reduce
    """
    from ..capture import capture
    from ..capture.sources import resolve

    args = args if isinstance(args, tuple | list | Mapping) else (args,)
    source = resolve(model, args, kwargs)
    step(f"capturing {source.name}")
    graph = capture(source, dynamic_shapes=dynamic_shapes, name=source.name, any_model=any_model)
    call = example_call(graph.program, source.args, source.kwargs)
    if call is None:
        hint = "pass them as args=(tensor, ...), or save the program with its example inputs."
        raise ExampleInputsMissing(model=graph.name, hint=hint)
    return Prepared(graph, call, source.directory, source.note)


def held_to(
    recipe: Recipe | None, path: str, prepared: Prepared, pipeline: Pipeline, *, any_model: bool = False
) -> Prepared:
    """The model, with notes on what differs from the recipe's run; raises WrongSourceModel unless `any_model`."""
    if recipe is None:
        return prepared
    notes = [prepared.note] if prepared.note else []
    try:
        recipe.check_source(prepared.graph, path)
    except WrongSourceModel as error:
        if not any_model:
            raise
        notes.append(f"{path} was made for another model{error.model}")
    for name, origin in plugins_of(pipeline).items():
        if recipe.plugins.get(name, origin) != origin:
            notes.append(f"{path} was made with {name} of {recipe.plugins[name]}; here it comes from {origin}")
    return replace(prepared, note="; ".join(notes))


def build(
    prepared: Prepared,
    pipeline: Pipeline,
    options: Options,
    *,
    verify: bool = True,
    never_slower: bool = False,
    source: str | None = None,
    step: Step = lambda text: None,
) -> CompiledModel:
    """Rewrite a captured model, lower it, and report on it."""
    from ..capture.identity import weights_hash
    from .reach import notes_on_reach

    graph, call = prepared.graph, prepared.call
    step(f"rewriting: {pipeline}")
    result = pipeline.run(
        graph,
        allow_noop=options.allow_noop,
        restore=options.restore,
        token_map=options.token_map,
        symbolic_counts=options.mode is not None,
    )
    reach = notes_on_reach(graph, pipeline.passes, result.outcomes, call, allow_noop=options.allow_noop)
    target = _target(options.target, graph)
    if target.device != "cpu":
        from ..lowering.twins import require_kernels

        require_kernels(result.graph.graph)
    recipe = Recipe(
        passes=tuple(map(str, pipeline.passes)),
        model=source,
        options=options.changed(),
        plugins=plugins_of(pipeline),
        weights=weights_of(pipeline),
        versions=versions(),
        source_hash=graph.source_hash,
        weights_hash=weights_hash(graph.program),
    )
    step("lowering")
    compiled = CompiledModel(
        graph=result.graph,
        original=graph,
        call=call,
        recipe=recipe,
        report=_report(prepared, result, recipe, reach),
        target=target,
        mode=options.mode,
        token_map=options.token_map,
        never_slower=never_slower,
    )
    step("counting tokens and FLOPs")
    report = _measured(compiled.report, graph, result.graph, call)
    if verify:
        step("comparing with the original")
        report = _verified(report, compiled)
    compiled.report = report
    return compiled


def _report(prepared: Prepared, result: Result, recipe: Recipe, reach: list[str]) -> Report:
    from .break_even import below_text
    from .ledger import ledger

    graph, call = prepared.graph, prepared.call
    told = {outcome.site for outcome in result.outcomes}
    skipped = [site for site in graph.sites if site.role != "stream" and site.node not in told]
    return Report(
        name=graph.name,
        passes=recipe.passes,
        outcomes=tuple(map(outcome_dict, result.outcomes)),
        layers=ledger(graph, result.outcomes, call),
        inputs=describe(graph.program, call),
        prefix=graph.prefix,
        skipped_sites=tuple(
            {"index": s.index, "node": s.node, "role": s.role, "reason": s.reason or f"its role is {s.role}"}
            for s in skipped
        ),
        notes=tuple(filter(None, (prepared.note, *reach, below_text(recipe.options.get("dense_below", 0))))),
        versions=recipe.versions,
    )


def _measured(report: Report, graph: TokenGraph, result: TokenGraph, call: Call) -> Report:
    """FLOPs and measured tokens.  They inform; a result that cannot be counted is still a result."""
    from ..lowering.flops import count_flops
    from .ledger import flops_per_layer, with_measured

    try:
        before, after = count_flops(graph.program, call), count_flops(result.program, call)
        layers_before = flops_per_layer(graph, graph.program, before.by_node)
        layers_after = flops_per_layer(graph, result.program, after.by_node)
        rows = with_measured(report.layers, graph, result.program, call)
    except Exception as error:
        return report.with_changes(notes=(*report.notes, f"FLOPs were not counted: {first_line(error)}"))
    rows = tuple(
        replace(row, flops_before=layers_before.get(row.layer), flops_after=layers_after.get(row.layer)) for row in rows
    )
    uncounted = sorted({*before.uncounted, *after.uncounted})
    notes = (f"ops without a FLOP formula count nothing: {', '.join(uncounted)}",) if uncounted else ()
    return report.with_changes(
        flops_before=before.total, flops_after=after.total, layers=rows, notes=(*report.notes, *notes)
    )


def _verified(report: Report, compiled: CompiledModel) -> Report:
    args, kwargs = compiled.example_call
    try:
        return report.with_changes(drift=compiled.verify(*args, **kwargs))
    except Exception as error:
        return report.with_changes(notes=(*report.notes, f"not compared with the original: {first_line(error)}"))


def _target(target: str | Target, graph: TokenGraph) -> Target:
    """The target; "auto" is the device the weights are on, because that is where the result will be called."""
    if str(target) != "auto":
        return Target.parse(target)
    from ..lowering.callables import is_on_gpu

    return Target("cuda" if is_on_gpu(graph.program) else "cpu")


def first_line(error: Exception) -> str:
    """The first line of an error's text, with its class unless it is ours."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, TamisError) else f"{type(error).__name__}: {text}".rstrip(": ")
