"""What the command was asked to do: options and recipe in one, and the checks that need no torch."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WrongUsage
from .files import Output, check_file
from .recipe import Recipe

DEFAULTS = {"target": "auto", "mode": None, "restore": True, "token_map": False, "allow_noop": False, "inline": False}


@dataclass(frozen=True)
class Request:
    """One run of the command, complete."""

    model: str
    passes: tuple[str, ...]
    output: Output
    options: dict[str, Any]  # the keys of DEFAULTS
    recipe: Recipe | None
    config: str
    check: bool
    overwrite: bool
    verify: str | None
    max_drift: float | None
    bench: bool
    report: Path | None
    json: bool
    quiet: bool
    verbose: int

    @staticmethod
    def of(given: Namespace) -> Request:
        """Merge the arguments with the recipe: what was given on the command line wins."""
        recipe = Recipe.read(given.config) if given.config else None
        model = given.input or (recipe.model if recipe else None)
        if model is None:
            raise WrongUsage(problem=f"no model was given, and {given.config} names none", hint="give INPUT.")
        recorded = recipe.options if recipe else {}
        options = {name: recorded.get(name, default) for name, default in DEFAULTS.items()}
        options |= {name: getattr(given, name) for name in DEFAULTS if getattr(given, name) is not None}
        return Request(
            model=model,
            passes=tuple(given.passes or (recipe.passes if recipe else ())),
            output=Output.of(given.output, model),
            options=options,
            recipe=recipe,
            config=given.config or "",
            check=given.check,
            overwrite=given.overwrite,
            verify=given.verify,
            max_drift=given.max_drift,
            bench=given.bench,
            report=Path(given.report) if given.report else None,
            json=given.json,
            quiet=given.quiet,
            verbose=given.verbose,
        )

    def check_paths(self) -> None:
        """Refuse a missing model, missing data and outputs in the way, before any work."""
        from ..capture.paths import check_exists
        from ..errors import ModelNotFound

        check_exists(self.model)
        if self.verify and not Path(self.verify).is_file():
            hint = "--verify takes a .npz file with one array per input, or a .npy file."
            raise ModelNotFound(path=self.verify, hint=hint)
        if not self.check:
            self.output.check(self.overwrite)
            if self.report:
                check_file(self.report, self.overwrite)
