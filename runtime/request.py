"""What the command was asked to do: options and recipe in one, and the checks that need no torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..call_errors import UnreadableData
from ..errors import ModelNotFound, WrongUsage
from ..recipe_errors import PluginMissing
from ..target import Target
from .files import Output, check_file
from .options import DEFAULTS
from .recipe import Recipe

FOR_ONNX = {"inline": False, "ort_contrib": False}  # of how an ONNX file is written
ASKED = {**DEFAULTS, **FOR_ONNX}  # what a recipe's options are over


@dataclass(frozen=True)
class Request:
    """One run of the command, complete."""

    model: str
    passes: tuple[str, ...]  # those given; () leaves them to the recipe
    output: Output
    options: dict[str, Any]  # the keys of ASKED
    recipe: Recipe | None
    config: str
    plugins: tuple[Path, ...]
    any_model: bool
    check: bool
    calibrate: str | None
    budget: float
    least: float
    overwrite: bool
    verify: str | None
    max_drift: float | None
    bench: bool
    native: bool
    report: Path | None
    draw: Path | None
    json: bool
    quiet: bool
    verbose: int

    @staticmethod
    def of(given: Namespace) -> Request:
        """Merge the arguments with the recipe: what was given on the command line wins."""
        recipe = Recipe.read(given.config) if given.config else None
        model = given.input or _model_of(recipe, given.config)
        recorded = recipe.options if recipe else {}
        options = {name: recorded.get(name, default) for name, default in ASKED.items()}
        options |= {name: getattr(given, name) for name in ASKED if getattr(given, name) is not None}
        return Request(
            model=model,
            passes=tuple(given.passes or ()),
            output=Output.of(given.output, model),
            options=options,
            recipe=recipe,
            config=given.config or "",
            plugins=tuple(map(Path, given.plugin or ())),
            any_model=given.allow_other_model,
            check=given.check,
            calibrate=given.calibrate,
            budget=0.25 if given.budget is None else given.budget,
            least=0.9 if given.min_recall is None else given.min_recall,
            overwrite=given.overwrite,
            verify=given.verify,
            max_drift=given.max_drift,
            bench=given.bench,
            native=given.native,
            report=Path(given.report) if given.report else None,
            draw=Path(given.draw) if given.draw else None,
            json=given.json,
            quiet=given.quiet,
            verbose=given.verbose,
        )

    def check_paths(self) -> None:
        """Refuse a missing model, missing data and outputs in the way, before any work."""
        from ..capture.paths import check_exists

        check_plugins(self.plugins)
        check_exists(self.model)
        for option, data in (("--verify", self.verify), ("--calibrate", self.calibrate)):
            if data and Path(data).is_dir():
                raise UnreadableData(path=data, reason="it is a directory")
            if data and not Path(data).is_file():
                hint = f"{option} takes a .npz file with one array per input, or a .npy file."
                raise ModelNotFound(path=data, hint=hint)
        if not self.check:
            self.output.check(self.overwrite)
            self._check_target()
            for path in filter(None, (self.report, self.draw)):
                check_file(path, self.overwrite)

    def _check_target(self) -> None:
        """Kernels for a named architecture are files beside the model, so they need a directory."""
        arch = None if self.options["target"] == "auto" else Target.parse(self.options["target"]).arch
        if arch and self.output.kind != "directory":
            problem = f"--target {self.options['target']} writes kernels, and {self.output.path} is one file"
            raise WrongUsage(problem=problem, hint="name a directory: -o out/")


def check_plugins(paths: Iterable[Path]) -> None:
    """Raise PluginMissing for a file that is not there."""
    for path in paths:
        if not path.is_file():
            raise PluginMissing(path=path)


def _model_of(recipe: Recipe | None, config: str) -> str:
    """The model that a recipe names, which is where it was when the recipe was made."""
    from ..capture.paths import check_exists

    if recipe is None or recipe.model is None:
        raise WrongUsage(problem=f"no model was given, and {config} names none", hint="give INPUT.")
    try:
        check_exists(recipe.model)
    except ModelNotFound as error:
        hint = f"{config} names it; say with INPUT where the model is now."
        raise ModelNotFound(path=recipe.model, hint=hint) from error
    return recipe.model
