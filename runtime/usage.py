"""Which options of the command go together.  Nothing here imports torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from ..errors import WrongUsage
from .files import kind_of

WRITES = ("output", "report", "draw")  # what names a file of the result
PROVES = ("verify", "max_drift", "bench")


def check_usage(options: Namespace) -> None:
    """Raise WrongUsage for options that contradict each other or would have no effect; one name for the model."""
    for problem, hint in _problems(options):
        raise WrongUsage(problem=problem, hint=hint)
    options.input = options.input or options.model
    asks = options.list_passes or options.show_recipe
    if not (asks or options.input or options.config):
        raise WrongUsage(problem="no model was given", hint="optimize-model INPUT --pass NAME:ARGS, or --help.")
    given = options.passes or options.config or options.calibrate
    if not (asks or options.check or given or options.allow_noop):
        from ..capture.paths import check_exists

        check_exists(options.input)  # a wrong path is the more likely mistake
        raise WrongUsage(problem="no passes were given", hint="--pass tome:r=13, or --check to see which would apply.")


def _problems(options: Namespace) -> Iterator[tuple[str, str]]:
    """What is wrong, and what to do instead."""
    if options.input and options.model:
        yield "the model is given twice, as INPUT and with --model", "give it once."
    if options.report and not options.report.endswith(".json"):
        yield f"--report {options.report}: only JSON is written", "end the name in .json."
    if options.draw and not options.draw.endswith(".png"):
        yield f"--draw {options.draw}: only PNG is drawn", "end the name in .png."
    if options.quiet and options.verbose:
        yield "--quiet and --verbose exclude each other", "give one of them."
    if options.allow_other_model and not options.config:
        yield "--allow-other-model without a recipe", "name one with --config."
    yield from _of_the_file(options)
    yield from _of_calibration(options)
    for name in (*WRITES, *PROVES) if options.check else ():
        value = getattr(options, name)
        if value is not None and value is not False:  # 0 is a budget
            yield f"--check and {_option(name)} exclude each other", "--check makes no result: leave it out to get one."


def _of_the_file(options: Namespace) -> Iterator[tuple[str, str]]:
    if options.output == "":
        yield "--output is empty", "-o model.onnx, or -o . for this directory."
    kind = kind_of(options.output) if options.output else "onnx"
    if options.native and kind != "pt2":
        yield "--native makes a .pt2 file, and none is to be written", "-o model.pt2"
    for name in ("inline", "ort_contrib") if kind == "pt2" else ():
        if getattr(options, name):
            yield f"{_option(name)} is for ONNX, and {options.output} is none", "-o model.onnx, or leave it out."


def _of_calibration(options: Namespace) -> Iterator[tuple[str, str]]:
    if options.calibrate and options.config:
        yield "--calibrate and --config exclude each other", "a recipe has its patterns."
    if options.calibrate and options.check:
        yield "--calibrate and --check exclude each other", "--check writes no recipe."
    for name in ("budget", "min_recall"):
        if getattr(options, name) is not None and not options.calibrate:
            yield f"{_option(name)} without --calibrate", "--calibrate DATA finds patterns within it."


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
