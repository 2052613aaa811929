"""Errors about recipes and plug-ins; the rules of `errors` hold."""

from __future__ import annotations

from .errors import TamisError


class PlainProgram(TamisError):
    """A .pt2 file that torch.export wrote, where one of tamis was asked for."""

    template = (
        "{path}: is an exported program that tamis did not make: it holds no recipe.\n"
        "  hint: tamis.compile(path, passes=...) rewrites it, torch.export.load reads it as it is."
    )
    exit_code = 2


class NotAPass(TamisError):
    """Something else than a pass was registered."""

    template = (
        "{name}: {got} is not a pass.\n"
        "  hint: derive it from tamis.Pass, or from tamis.passes.TokenReduction for a method that removes tokens."
    )
    exit_code = 2


class PassNameTaken(TamisError):
    """Two passes of one name."""

    template = (
        "a pass called {name!r} is known already ({taken_by}, from {origin}), so {got} cannot have the name.\n"
        "  hint: register it under another name."
    )
    exit_code = 2


class PluginMissing(TamisError):
    """A file named with --plugin is not there."""

    template = "{path}: no such file.\n  hint: --plugin takes a Python file that registers passes."
    exit_code = 2


class PluginFailed(TamisError):
    """A file named with --plugin raises, or registers nothing."""

    template = (
        "{path}: cannot be loaded as a plug-in: {reason}.\n"
        "  hint: it is a Python file in which @tamis.register('name') stands over each pass."
    )
    exit_code = 2


class RecipeInvalid(TamisError):
    """A file holds no recipe, or a damaged one."""

    template = "{path}: not a tamis recipe: {reason}.\n  hint: a recipe is YAML with a list under 'passes'."
    exit_code = 2


class WrongSourceModel(TamisError):
    """A recipe is applied to another model than its own."""

    template = (
        "{path}: the recipe was made for another model{model}: the hash of its {part} is {expected}, that of {name} is "
        "{got}{made}.\n"
        "  hint: --allow-other-model (in Python: recipe.for_any_model()) applies it all the same."
    )
    exit_code = 2


class PassNotInstalled(TamisError):
    """A recipe uses a pass that is not here."""

    template = (
        "{path}: the recipe uses the pass {name!r} of {origin}, which is not here.\n"
        "  hint: install it, or name its file with --plugin (in Python: import the module that registers it); what a "
        "recipe names is never run by itself."
    )
    exit_code = 2


class PatternsUnreadable(TamisError):
    """What should say which pattern each head has does not."""

    template = (
        "{path}: does not hold patterns of heads: {reason}.\n"
        "  hint: one mapping per layer, from the head to its pattern, two numbers and a score, as MInference writes "
        "it; --calibrate finds patterns for a model."
    )
    exit_code = 2


class PassesExclude(TamisError):
    """Two passes of one recipe that each rewrite an original."""

    template = (
        "{second}: cannot run on what {first} made of the model; each of them needs the captured original.\n"
        "  hint: use one of the two; passes that reduce tokens compose with each other, so do those around sub-layers "
        "and those that make attention sparse."
    )
    exit_code = 2


class TooShortToCalibrate(TamisError):
    """Prompts of which every pattern reads all."""

    template = (
        "calibrate: the longest prompt has {tokens} tokens; patterns begin to differ from dense attention at {least}.\n"
        "  hint: calibrate on prompts as long as those that the model is for."
    )
    exit_code = 2


class NoPatternFound(TamisError):
    """Calibration leaves every head dense."""

    template = (
        "calibrate: no head reads {least} of its attention within {budget} of its cost; the best reads {best}.\n"
        "  hint: a larger budget, a smaller least (--min-recall), longer prompts, or other patterns."
    )
    exit_code = 3
