"""`Pass`, what it reports (`Outcome`), the text form of passes, and the pipeline that runs them."""

from __future__ import annotations

import ast
import dataclasses
import re
from abc import ABCMeta, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .error_text import brief
from .errors import BadParameter, BadPassText, NothingChanged, UnknownParameter
from .graph import TokenGraph
from .parameters import advice, check_kinds, check_sizes, shown
from .recipe_errors import PassesExclude
from .registry import find_pass
from .spec import check_invariants


@dataclass(frozen=True)
class Outcome:
    """What a pass did at one place: applied, or skipped with the reason.

    layer, site  indices in the graph (None: the whole model)
    before, after  token counts, numbers or symbol names; None where no token leaves, and the reason says what was done
    rule         the CountRule in force, with which a report predicts counts that depend on the input's length
    inside       of what the counts hold, when the stream keeps its length: "self-attention"; "" where it does not
    """

    pass_name: str
    layer: int | None
    site: str
    applied: bool
    reason: str = ""
    before: Any = None
    after: Any = None
    rule: Any = None
    inside: str = ""

    def __str__(self) -> str:
        where = f" inside {self.inside}" if self.inside else ""
        what = f"{self.before} -> {self.after} tokens{where}" if self.applied else f"skipped: {self.reason}"
        note = f" ({self.reason})" if self.applied and self.reason else ""
        if self.applied and self.before is None:
            what, note = self.reason, ""
        return f"{self.pass_name} at layer {self.layer}: {what}{note}"


@dataclass(frozen=True)
class Options:
    """What holds for a whole pipeline.

    restore    outputs with a token axis get their full length back
    token_map  the program returns (outputs, token_map): for every original token the slot it is in at the end, -1 if
               it was dropped; int64 [B, N]
    symbolic_counts  token counts enter the graph as symbols even where they are known, so that Inductor generates one
               kernel for all layers
    """

    restore: bool = True
    token_map: bool = False
    symbolic_counts: bool = False


@dataclass(frozen=True)
class Result:
    """A rewritten graph and the outcome at every candidate place."""

    graph: TokenGraph
    outcomes: tuple[Outcome, ...]

    @property
    def changed(self) -> bool:
        """Derived, never claimed: true when any place was changed."""
        return any(outcome.applied for outcome in self.outcomes)


class PassType(ABCMeta):
    """The type of pass classes: a parameter that a pass does not have is answered with the right one, in every door."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a pass; raises UnknownParameter, BadParameter."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        for parameter, value in kwargs.items():
            if parameter not in known:
                where = getattr(cls, "name", "") or cls.__name__
                raise UnknownParameter(where=where, name=parameter, **advice(parameter, value, known))
        made = super().__call__(*args, **kwargs)
        check_sizes(made)
        return made


@dataclass(frozen=True)
class Pass(metaclass=PassType):
    """A rewrite.  Subclasses are frozen dataclasses; their fields are their parameters in Python, text and YAML.

    name    kebab-case, set by `register`
    family  neighbours in a pipeline that share one run as one rewrite
    origin  where it comes from, "" for tamis and the running program; see `registry.origin_of`
    takes_original  whether it runs on captured graphs alone, not on what another family made of one
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = "other"
    origin: ClassVar[str] = ""
    takes_original: ClassVar[bool] = False

    @abstractmethod
    def apply(self, graph: TokenGraph, options: Options) -> Result:
        """Rewrite the graph (never in place)."""

    def __post_init__(self) -> None:
        """Check the parameters; subclasses extend it."""
        check_kinds(self)

    def expanded(self) -> Sequence[Pass]:
        """The passes that do what this one says: itself, unless it stands for several."""
        return (self,)

    def why_not(self, graph: TokenGraph) -> str:
        """Why this pass cannot apply anywhere in the graph; "" when it can."""
        return ""

    @classmethod
    def apply_together(cls, passes: Sequence[Pass], graph: TokenGraph, options: Options) -> Result:
        """Apply neighbours of one family; families whose passes share one rewrite override this."""
        outcomes: list[Outcome] = []
        for one in passes:
            result = one.apply(graph, options)
            graph, outcomes = result.graph, [*outcomes, *result.outcomes]
        return Result(graph, tuple(outcomes))

    def __str__(self) -> str:
        given = (
            f"{f.name}={shown(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != _default(f)
        )
        parameters = ",".join(given)
        return f"{self.name}:{parameters}" if parameters else self.name


def build_pass(name: str, parameters: dict[str, Any]) -> Pass:
    """A pass from its name and parameters; raises UnknownPass, UnknownParameter, BadParameter."""
    cls = find_pass(name)
    if not isinstance(parameters, Mapping) or not all(isinstance(one, str) for one in parameters):
        rule, hint = "a mapping from their names", f"for example {{{name!r}: {{'layers': [0, 1]}}}}."
        raise BadParameter(where=name, name="parameters", rule=rule, got=brief(parameters), hint=hint)
    try:
        return cls(**parameters)
    except (TypeError, ValueError) as error:
        known = [f.name for f in dataclasses.fields(cls)]
        raise BadParameter(
            where=name, name="parameters", rule="complete", got=str(error), hint=f"it takes {', '.join(known)}."
        ) from error


def parse_passes(passes: str | Pass | dict[str, Any] | Iterable[Any]) -> list[Pass]:
    """Passes from text (`tome:r=13 + evit`), objects, dicts (`{"tome": {"r": 13}}`) or lists of these."""
    if isinstance(passes, Pass):
        return list(passes.expanded())
    if isinstance(passes, str):
        return parse_passes([_parse_one(part.strip()) for part in _split(passes, "+")])
    if isinstance(passes, dict):
        named = passes.items()
        return parse_passes([build_pass(name, {} if given is None else given) for name, given in named])
    if isinstance(passes, type):
        name = getattr(passes, "name", "") or passes.__name__
        raise BadPassText(text=name, reason=f"it is the class, not a pass; write {passes.__name__}(...)")
    if not isinstance(passes, Iterable) or isinstance(passes, bytes) or hasattr(passes, "dtype"):
        rule, hint = "text or the object of a pass", 'write "tome:r=13" or tamis.passes.ToMe(r=13).'
        raise BadParameter(where="passes", name="each", rule=rule, got=brief(passes), hint=hint)
    return [parsed for one in passes for parsed in parse_passes(one)]


def _parse_one(text: str) -> Pass:
    if not re.fullmatch(r"[A-Za-z][\w-]*(:.*)?", text, re.DOTALL):
        named = re.match(r"[A-Za-z][\w-]*", text)
        reason = f"a ':' should follow {named.group()}" if named else "it does not start with a name"
        reason = reason if text else "there is nothing"
        raise BadPassText(text=text, reason=reason)
    name, _, rest = text.partition(":")
    parameters: dict[str, Any] = {}
    for item in filter(None, map(str.strip, _split(rest, ","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise BadPassText(text=text, reason=f"{item!r} is not key=value")
        if key.strip() in parameters:
            raise BadPassText(text=text, reason=f"{key.strip()} is given twice")
        parameters[key.strip()] = _value(value.strip())
    return build_pass(name, parameters)


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(text: str) -> Any:
    lowered = {"true": True, "false": False, "none": None, "on": True, "off": False, "yes": True, "no": False}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.  Neighbours of one family run as one rewrite, so that their plans compose."""

    passes: tuple[Pass, ...] = field(default_factory=tuple)

    @staticmethod
    def parse(passes: Any) -> Pipeline:
        """Build from anything `parse_passes` reads."""
        return Pipeline(tuple(parse_passes(passes)))

    def run(
        self,
        graph: TokenGraph,
        *,
        allow_noop: bool = False,
        restore: bool = True,
        token_map: bool = False,
        symbolic_counts: bool = False,
    ) -> Result:
        """Apply all passes; raises NothingChanged when one of them changed nothing, unless allow_noop.

        Raises PassesExclude when two of them each need an original.  The other keywords are those of `Options`.
        """
        if not isinstance(graph, TokenGraph):
            hint = "tamis.capture.capture(model, args) makes one; tamis.compile takes the model itself."
            raise BadParameter(where="Pipeline.run", name="graph", rule="a captured graph", got=brief(graph), hint=hint)
        options = Options(restore, token_map, symbolic_counts)
        outcomes: list[Outcome] = []
        maker: Pass | None = None  # the first pass that changed an original, where it takes nothing else
        for family in self._families():
            if maker is not None and family[0].takes_original:
                raise PassesExclude(first=str(maker), second=str(family[0]))
            try:
                result = type(family[0]).apply_together(family, graph, options)
            except Exception as error:
                done = ", ".join(str(p) for p in self.passes[: self.passes.index(family[0])])
                if done:
                    error.add_note(f"passes before: {done}")
                raise
            if result.changed:
                maker = family[0] if family[0].takes_original else maker
                check_invariants(graph, result.graph, " + ".join(map(str, family)), restore=restore)
            graph, outcomes = result.graph, [*outcomes, *result.outcomes]
        if not allow_noop:
            self._require_effect(outcomes)
        return Result(graph, tuple(outcomes))

    def _families(self) -> list[list[Pass]]:
        groups: list[list[Pass]] = []
        for one in self.passes:
            if groups and groups[-1][0].family == one.family != "other":
                groups[-1].append(one)
            else:
                groups.append([one])
        return groups

    def _require_effect(self, outcomes: list[Outcome]) -> None:
        for one in dict.fromkeys(map(str, self.passes)):
            own = [o for o in outcomes if o.pass_name == one]
            if not any(o.applied for o in own):
                reasons = dict.fromkeys(
                    f"  layer {o.layer}: {o.reason}" if o.layer is not None else f"  {o.reason}" for o in own
                )
                raise NothingChanged(passes=one, reasons="\n".join(reasons) or "  no candidate place was found")

    def __str__(self) -> str:
        return " + ".join(map(str, self.passes))
