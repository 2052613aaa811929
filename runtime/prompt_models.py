"""What the drivers of `prompts` ask of a model: logits at the end of a prompt, and the question's rows of attention."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attention_index import Heads
from ..capture.partial_run import values_of
from ..error_text import first_line
from ..errors import InputMismatch
from ..graph import TokenGraph
from ..passes.sparse import UNDERSTOOD, window_of
from ..passes.sparse_scores import last_queries
from .compiled import CompiledModel
from .inputs import input_nodes
from .onnx_model import OnnxModel

SHOWN = "a causal language model of token ids, with an attention mask and positions at most"
RUN = f"check ids against the vocabulary; give {SHOWN}."


def last_logits(model: Any, ids: Tensor, many: int) -> Tensor:
    """Logits of the last `many` tokens, [B, many, V]; ids [B, N] int64 without padding.

    Raises:
        InputMismatch: the model does not run on ids, mask and positions, or returns no logits [B, N, V].
    """
    if isinstance(model, str | os.PathLike):
        from .api import load

        model = load(model)
    if not callable(model):
        rule, got = "the model must be a module, a function, or the path of a file", type(model).__name__
        raise InputMismatch(where="prompts.xl3m", rule=rule, got=got, hint=f"give {SHOWN}.")
    ids = ids.to(_device(model))
    names = _names(model)
    given = {} if names is None else _filled(names, ids)
    if names and "logits_to_keep" in names and not isinstance(model, CompiledModel | OnnxModel):
        given["logits_to_keep"] = many
    try:
        with torch.no_grad():
            result = model(**given) if given else model(ids)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        got, rule = f"{type(error).__name__}: {first_line(error)}", f"the model must run on token ids {list(ids.shape)}"
        raise InputMismatch(
            where="prompts.xl3m", rule=rule, got=got, hint=f"check ids against the vocabulary; give {SHOWN}."
        ) from error
    return _logits(result, ids)[:, -many:]


def question_attention(model: Any, many: int) -> Callable[[Tensor], Tensor]:
    """A function of token ids [N]: the last layer's attention of the last `many` tokens, [heads, many, N] float32.

    The model is captured, and runs up to the queries and keys of its last layer; the other rows are never computed.

    Raises:
        InputMismatch: the model needs other inputs, or its last attention is not one of tokens to those before them.
        TamisError: it cannot be captured (see `capture.capture`).
    """
    graph = _graph(model)
    site = graph.sites[graph.layers[-1].site]
    window = window_of(site)
    if site.mask.kind not in UNDERSTOOD or window is None or site.cached or not site.hides_later:
        got = "one that continues a cache" if site.cached else f"a mask of kind {site.mask.kind!r}"
        raise InputMismatch(
            where=f"{graph.name}, node {site.node}",
            rule="the last layer's attention must be causal, without a bias",
            got=got,
            hint=f"give {SHOWN}.",
        )
    run = values_of(graph.program, [site.q, site.k])
    inputs = input_nodes(graph.program)
    names = [node.name for node in inputs]
    wanted = [node.name for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    if missing := set(wanted) - _filled(names, torch.zeros(1, 1, dtype=torch.int64)).keys():
        rule = "the model may take ids, mask and positions"
        raise InputMismatch(where=graph.name, rule=rule, got=", ".join(sorted(missing)), hint=f"give {SHOWN}.")
    device = next((x.device for x in graph.program.state_dict.values()), torch.device("cpu"))

    def rows(ids: Tensor) -> Tensor:
        given = _filled(names, ids.to(device).unsqueeze(0))
        try:
            with torch.no_grad():
                q, k = run([given.get(name) for name in names])
        except (IndexError, RuntimeError) as error:
            rule, got = f"the model must run on {len(ids)} token ids", f"{type(error).__name__}: {first_line(error)}"
            raise InputMismatch(
                where=graph.name, rule=rule, got=got, hint=f"check ids against the vocabulary; give {SHOWN}."
            ) from error
        weights, _ = last_queries(Heads(q, k, k, None, site.scale, True, site.softcap, 0, 1, window=window), many)
        return weights[0].cpu()

    return rows


def _graph(model: Any) -> TokenGraph:
    """The captured model; of what was compiled, the original."""
    from ..capture import capture

    if isinstance(model, TokenGraph):
        return model
    if isinstance(model, CompiledModel):
        return model._original("question_attention")
    if not isinstance(model, nn.Module):
        return capture(model)
    ids = torch.zeros(2, 8, dtype=torch.int64, device=_device(model))
    return capture(model, (ids,)) if _names(model) is None else capture(model, kwargs={"input_ids": ids})


def _device(model: Any) -> torch.device:
    if not isinstance(model, nn.Module):
        return torch.device("cpu")
    return next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _names(model: Any) -> list[str] | None:
    """Names of the model's inputs; None for a function without any that we know, which takes ids alone."""
    if isinstance(model, OnnxModel):
        return list(model.inputs)
    if isinstance(model, CompiledModel):
        return [name for name in model._inputs.names if name is not None]
    call = model.forward if isinstance(model, nn.Module) else model
    names = list(inspect.signature(call).parameters)
    return names if "input_ids" in names else None


def _filled(names: Iterable[str], ids: Tensor) -> dict[str, Any]:
    """Inputs by name for prompts without padding: ids, and a mask, positions and token types where there are any.

    The other inputs are left out, and the model says what it misses.
    """
    mask = torch.ones_like(ids)
    known = {"attention_mask": mask, "position_ids": mask.cumsum(1) - 1, "token_type_ids": mask - 1, "input_ids": ids}
    names = list(names)
    first = names[0] if names and not set(names) & {"input_ids"} else "input_ids"
    return {name: ids if name == first else known[name] for name in names if name == first or name in known}


def _logits(result: Any, ids: Tensor) -> Tensor:
    """The logits in what a model returned."""
    found = result
    if isinstance(result, Mapping):
        found = result.get("logits")
    elif not isinstance(result, Tensor):
        found = getattr(result, "logits", result[0] if isinstance(result, tuple | list) and result else None)
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[0] != ids.shape[0]:
        got = list(found.shape) if isinstance(found, Tensor) else type(result).__name__
        rule = "a model must return logits [B, N, V], alone, first, or by that name"
        raise InputMismatch(where="prompts.xl3m", rule=rule, got=got, hint=f"give {SHOWN}.")
    return found
