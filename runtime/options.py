"""How a result is made: passes and options, given or from a recipe, checked before any work.  No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..error_text import brief
from ..errors import BadParameter, TargetMissing, UnknownPass
from ..parameters import KINDS
from ..recipe_errors import PassNotInstalled
from ..registry import origin_of
from ..rewrite import Pipeline
from ..target import Target
from ..weights import TrainedPass
from .recipe import Recipe

MODES = ("default", "reduce-overhead", "max-autotune")
FLAGS = ("restore", "token_map", "allow_noop")
HINTS = {
    **dict.fromkeys(FLAGS, "see help(tamis.compile)."),
    "mode": "as in torch.compile; None (no --mode) runs eagerly.",
    "dense_below": "tamis.find_break_even measures it.",
}


@dataclass(frozen=True)
class Options:
    """How a result is made, apart from its passes."""

    target: str | Target = "auto"
    mode: str | None = None
    restore: bool = True
    token_map: bool = False
    allow_noop: bool = False
    dense_below: int = 0

    def over(self, recipe: Recipe | None) -> Options:
        """These options; those that have their default value become the recipe's."""
        if recipe is None:
            return self
        recorded = {name: value for name, value in recipe.options.items() if name in DEFAULTS}
        return replace(self, **{**recorded, **self.changed()})

    def checked(self, passes: Any, recipe: Recipe | None = None, path: str = "") -> Pipeline:
        """Read the passes (the recipe's when None) and check everything that can be checked before work starts."""
        if str(self.target) != "auto":
            _require_device(Target.parse(self.target))
        self._check_values({} if recipe is None else recipe.options, path or "recipe")
        pipeline = _parsed(passes, recipe, path)
        if not pipeline.passes and not self.allow_noop:
            raise BadParameter(
                where="compile", name="passes", rule="given", got="none", hint='for example "tome:r=13".'
            )
        self.check_token_map(pipeline)
        return pipeline

    def _check_values(self, recorded: dict[str, Any], path: str) -> None:
        """Raise BadParameter for a value that is none; it names who gave it, the call or the recipe."""
        flags = {name: (KINDS[bool], isinstance(getattr(self, name), bool)) for name in FLAGS}
        rules = {
            "mode": (f"one of {', '.join(MODES)}", self.mode is None or self.mode in MODES),
            **flags,
            "dense_below": ("a number of tokens, 0 or more", type(self.dense_below) is int and self.dense_below >= 0),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                value = getattr(self, name)
                where = path if name in recorded and recorded[name] is value else "compile"
                raise BadParameter(where=where, name=name, rule=rule, got=brief(value), hint=HINTS[name])

    def check_token_map(self, pipeline: Pipeline) -> None:
        """Raise BadParameter for a map of tokens of which none goes anywhere."""
        if self.token_map and pipeline.passes and all(one.family == "sparse" for one in pipeline.passes):
            rule, hint = "left out with sparse attention", "every token stays where it is."
            raise BadParameter(where="compile", name="token_map", rule=rule, got="True", hint=hint)

    def check_never_slower(self, wanted: bool) -> None:
        """Raise BadParameter where original and result do not return the same things."""
        if (wanted or self.dense_below) and (self.token_map or not self.restore):
            got = "token_map=True" if self.token_map else "restore=False"
            raise BadParameter(
                where="compile",
                name="never_slower" if wanted else "dense_below",
                rule="used where the original returns what the result does",
                got=got,
                hint="leave one of the two out.",
            )

    def changed(self) -> dict[str, Any]:
        """Those that differ from the default, for the recipe."""
        values = {**vars(self), "target": str(self.target)}
        return {name: value for name, value in values.items() if value != DEFAULTS[name]}


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Options)}


def _parsed(passes: Any, recipe: Recipe | None, path: str) -> Pipeline:
    """Passes from what was given, else from the recipe, which may need plug-ins that are not here."""
    if passes is not None or recipe is None:
        return Pipeline.parse(passes if passes is not None else ())
    try:
        pipeline = Pipeline.parse(recipe.passes)
    except UnknownPass as error:
        origin = recipe.plugins.get(error.name)
        if origin is None:
            raise
        raise PassNotInstalled(path=path, name=error.name, origin=origin) from error
    recipe.check_weights(weights_of(pipeline), path)
    return pipeline


def plugins_of(pipeline: Pipeline) -> dict[str, str]:
    """Where passes that are not tamis's own come from, by name."""
    origins = {one.name: origin_of(type(one)) for one in pipeline.passes}
    return {name: origin for name, origin in origins.items() if origin != "tamis"}


def weights_of(pipeline: Pipeline) -> dict[str, str]:
    """Digests of the trained tensors of a pipeline, by path."""
    trained = [one.weights for one in pipeline.passes if isinstance(one, TrainedPass) and one.weights]
    return {str(weights): weights.digest for weights in trained}


def _require_device(target: Target) -> None:
    import torch

    # a named architecture need not be here: kernels are compiled for it all the same
    if target.device != "cpu" and target.arch is None and not torch.cuda.is_available():
        raise TargetMissing(target=target)
