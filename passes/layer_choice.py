"""Which methods can run on a graph, and at which layers: as the user wrote, checked against the layers there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import BadParameter
from ..graph import TokenGraph
from ..rewrite import Outcome, Pass

AnyPass = TypeVar("AnyPass", bound=Pass)


def able(graph: TokenGraph, methods: Iterable[AnyPass], outcomes: list[Outcome]) -> list[AnyPass]:
    """The methods that can run on the graph; of each other one an outcome says why not."""
    found = []
    for method in methods:
        reason = method.why_not(graph)
        if reason:
            outcomes.append(Outcome(str(method), None, "", False, reason))
        else:
            found.append(method)
    return found


def read_layers(layers: Any, where: str, name: str = "layers") -> tuple[int, ...] | None:
    """A parameter of the pass `where` that names layers, as a tuple; None stays; raises BadParameter."""
    if layers is None:
        return None
    if _is_whole(layers):
        return (layers,)
    numbers = isinstance(layers, Sequence) and not isinstance(layers, bytes) and all(map(_is_whole, layers))
    if (numbers and layers) or isinstance(layers, range):
        return tuple(layers)
    raise BadParameter(
        where=where, name=name, rule="a list of layer indices", got=repr(layers), hint=f"for example {name}=[3,6,9]."
    )


def read_heads(heads: Any, where: str, name: str = "heads") -> tuple[int, ...] | dict[int, list[int]] | None:
    """A parameter that names heads, the same in all layers or by layer; None stays; raises BadParameter."""
    if heads is None:
        return None
    each = heads if isinstance(heads, Mapping) else {0: heads}
    found = {}
    for layer, chosen in each.items():
        many = (chosen,) if _is_whole(chosen) else chosen
        numbers = isinstance(many, Sequence) and not isinstance(many, str | bytes) and all(map(_is_whole, many))
        if not (_is_whole(layer) and numbers and many):
            rule, hint = "a list of head indices, or {layer: list}", f"for example {name}=[0,2] or {name}={{3:[0,2]}}."
            raise BadParameter(where=where, name=name, rule=rule, got=repr(heads), hint=hint)
        found[layer] = list(many)
    if not found:
        raise BadParameter(where=where, name=name, rule="for some layer", got=repr(heads), hint="leave it out.")
    return found if isinstance(heads, Mapping) else tuple(found[0])


def chosen_layers(chosen: Iterable[int], layers: int, where: str, name: str = "layers") -> list[int]:
    """Indices out of `layers` in order, each once; raises BadParameter for one that does not exist."""
    chosen = list(chosen)
    for layer in chosen:
        if not -layers <= layer < layers:
            rule = f"{'' if name == 'layers' else 'for layers '}between 0 and {layers - 1}"
            raise BadParameter(where=where, name=name, rule=rule, got=layer, hint=f"the model has {layers} layers.")
    return sorted({layer % layers for layer in chosen})


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
