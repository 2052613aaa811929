"""`TokenReduction`: the base of every method that prunes, merges or pools tokens.

A method is a frozen dataclass with one function, `plan`, on plain tensors.  The compiler traces it and splices it in at
the cut the method names.  This base turns `r`, `keep_ratio` and `layers` into a count rule per layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..counts import ALL, CountRule, Term, at_most, keep_at_least
from ..errors import BadParameter
from ..graph import TokenGraph
from ..op import OPS
from ..rewrite import Options, Pass, Result
from ..schedule import Schedule
from ..tokens import Plan, Tokens
from .layer_choice import chosen_layers, read_layers
from .properties import PRUNING

if TYPE_CHECKING:
    from torch import Tensor

KEEP_ONE: Term = (1, -1, 1)


@dataclass(frozen=True)
class TokenReduction(Pass):
    """Fewer tokens from some layers on.

    Args:
        r: tokens removed per layer, a number or a Schedule in any of its forms.
        keep_ratio: fraction of the unprotected tokens kept at each chosen layer, in (0, 1]; give this or `r`.
        layers: layer indices (0-based, negative from the end); None: the method's own choice.
        causal: reduce under causal attention too, as in CLIP's text tower (off: such a model is refused).  Slots then
            keep the order of tokens, and merged ones stand where the last of them stood, so that none sees ahead.
        passthrough: dropped tokens pass by the remaining layers as they are and are put back where every token is
            needed: before a dense head, in an output with a row per token (SViT, Liu et al., WACV 2024, arXiv
            2306.07050).  Off: such a head is refused.  Merged tokens are always put back, as copies of their slot.
    """

    where: ClassVar[str] = "after_attention"  # before_attention, after_attention or after_block
    needs_class_token: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False  # it reads attention in another way than the class token's row
    own_count: ClassVar[bool] = False  # other parameters say how many tokens stay; r and keep_ratio are not given
    limit: ClassVar[Term] = KEEP_ONE  # the most that a method can remove at one layer
    added: ClassVar[int] = 0
    always: ClassVar[bool] = False  # it also runs where its rule lets nothing leave
    grows: ClassVar[bool] = False  # it lets tokens in and none leave
    family: ClassVar[str] = "reduction"
    takes_original: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = PRUNING  # what holds of it, in the words of `properties.py`

    r: Any = None
    keep_ratio: Any = None
    layers: Any = field(default=None, kw_only=True)
    causal: bool = field(default=False, kw_only=True)
    passthrough: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        given = (self.r is not None) + (self.keep_ratio is not None)
        if given != (not self.counts_itself):
            rule, hint = "given, one of them", "for example r=8."
            if self.counts_itself:
                rule, hint = "left out", "the method's own parameters say how many tokens stay."
            got = ("neither", "one", "both")[given]
            raise BadParameter(where=self.name, name="r or keep_ratio", rule=rule, got=got, hint=hint)
        self._read_counts("r", "r is tokens removed per layer.")
        hint = "keep_ratio is the fraction kept; 0.3 removes 70%."
        self._read_schedule("keep_ratio", lambda v: 0 < v <= 1, "in (0, 1]", hint)
        object.__setattr__(self, "layers", read_layers(self.layers, self.name))
        super().__post_init__()

    def _read_counts(self, name: str, hint: str) -> None:
        """A parameter as a schedule of tokens, where it is given."""
        self._read_schedule(name, lambda v: isinstance(v, int) and v >= 0, "whole numbers >= 0", hint)

    def _read_schedule(self, name: str, check: Callable[[Any], bool], rule: str, hint: str) -> None:
        """A parameter as a schedule all of whose amounts pass the check, where it is given."""
        if getattr(self, name) is None:
            return
        schedule = Schedule.of(getattr(self, name), where=self.name, name=name)
        if not all(map(check, schedule.amounts())):
            raise BadParameter(where=self.name, name=name, rule=rule, got=schedule, hint=hint)
        object.__setattr__(self, name, schedule)

    @abstractmethod
    def plan(self, tokens: Tokens) -> Plan | None:
        """Decide where each token goes; None changes nothing.  Traced: plain torch, no branch on data."""

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The amounts that were given."""
        return tuple(one for one in (self.r, self.keep_ratio) if one is not None)

    @property
    def counts_itself(self) -> bool:
        """Whether parameters as given here say how many tokens stay, so that r and keep_ratio must not."""
        return self.own_count

    @property
    def tracks_sizes(self) -> bool:
        """Whether later attention gets the log-size bias (proportional attention)."""
        return False

    def default_layers(self, layers: int) -> Sequence[int]:
        """Layers used when the user chose none."""
        return range(layers)

    def selected(self, layers: int) -> list[int]:
        """Layer indices this pass wants, out of `layers`; raises BadParameter for one that does not exist."""
        chosen = self.default_layers(layers) if self.layers is None else self.layers
        named = [layer for one in self.schedules if one.kind == "table" for layer, _ in one.values]
        chosen_layers(named, layers, self.name)
        return chosen_layers(chosen, layers, self.name)

    def amount(self, layer: int, layers: int) -> int | float:
        """r or keep_ratio at a selected layer."""
        return self.at(self.keep_ratio, layer, layers, 1) if self.r is None else self.at(self.r, layer, layers, 0)

    def at(self, schedule: Schedule, layer: int, layers: int, missing: int) -> int | float:
        """An amount at a selected layer; a table speaks of the model's layers, other forms of the selected."""
        selected = self.selected(layers)
        if schedule.kind == "table":
            return {named % layers: amount for named, amount in schedule.values}.get(layer, missing)
        return schedule.at(selected.index(layer), len(selected))

    def asked(self, layer: int, layers: int) -> int | None:
        """How many tokens the user wants to leave at a selected layer; None where that is not a number."""
        return None if self.r is None else int(self.amount(layer, layers))

    def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
        """How many tokens leave at a selected layer."""
        amount = self.amount(layer, layers)
        term = keep_at_least(amount) if self.r is None else at_most(int(amount))
        return CountRule(prefix, (term, self.limit), self.added)

    def why_not(self, graph: TokenGraph) -> str:
        """Why this method cannot run on the graph; "" when it can."""
        captured = {site.node for site in graph.sites}
        reductions = {op.call for op in OPS.values() if not op.captured}
        if any(node.target in reductions and node.name not in captured for node in graph.graph.nodes):
            return "the model was reduced before; put all passes in one recipe for the original: reductions compose"
        if not graph.layers:
            return "no token stream was found"
        if any(graph.sites[layer.site].cached for layer in graph.layers):
            return "attention continues a key-value cache, in which every token keeps its place"
        if self.needs_class_token and not graph.class_token:
            return "it scores tokens by the class token's attention, and this model has no class token"
        reads = self.needs_class_token or self.needs_attention
        if reads and any(graph.sites[layer.site].softcap is not None for layer in graph.layers):
            what = "the class token's attention" if self.needs_class_token else "attention"
            return f"it scores tokens by {what}, which it cannot yet read under a soft cap"
        if graph.hides_later and self.needs_class_token:
            return "attention is causal: its first token sees itself alone and scores nothing"
        if graph.hides_later and not self.causal:
            return "attention is causal, and later tokens lose what they saw of removed ones; causal=true allows it"
        if all(layer.cut(self.where) is None and layer.after_block is None for layer in graph.layers):
            return f"no layer has a place {self.where.replace('_', ' ')}"
        return ""

    def why_not_at(self, tokens: Tokens) -> str:
        """Why this method cannot run on the tokens that the passes before it left at a layer; "" when it can."""
        return ""

    def note(self, layer: int, layers: int) -> str:
        """What the report says of the method's choices at a layer, where its parameters do not; "" for nothing."""
        return ""

    def answer(self, outputs: list[Any], state: Tensor, tokens: Tokens) -> list[Any]:
        """The program's outputs, where the method has a head of its own.  Traced.

        state   [B, N, C] of the stream behind the last block;  tokens  as the method saw them last
        """
        return outputs

    def apply(self, graph: TokenGraph, options: Options) -> Result:
        """Rewrite with this method alone."""
        return self.apply_together([self], graph, options)

    @classmethod
    def apply_together(cls, passes: Sequence[Pass], graph: TokenGraph, options: Options) -> Result:
        """Rewrite with all methods in one re-execution: their plans compose."""
        from .reduce import reduce_tokens_of

        return reduce_tokens_of(graph, [one for one in passes if isinstance(one, TokenReduction)], options)


def quarter_layers(layers: int) -> list[int]:
    """After a quarter, a half and three quarters of the layers: 3, 6, 9 of 12 (the published pruning places)."""
    return sorted({layers * k // 4 for k in (1, 2, 3)})


def most_removable(rule: CountRule, tokens: int) -> int:
    """The most that the method's own limit (its last term) lets leave `tokens` tokens."""
    return max(0, CountRule(rule.prefix, rule.terms[-1:]).removed(tokens))


__all__ = ["ALL", "TokenReduction", "most_removable", "quarter_layers"]
