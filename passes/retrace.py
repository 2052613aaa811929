"""Re-execution: run an exported graph once more under tracing, with something changed on the way.

Interprets the lifted graph in export's own fake mode, so a new graph has right metadata by construction.
`pre_dispatch` keeps attention, linear, layer norm and GELU whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from .quick_shapes import quick_shapes


def retrace(program: ExportedProgram, run: Callable[..., list[Any]]) -> fx.GraphModule:
    """Trace `run`, called with fake values for the program's placeholders; it returns the new outputs.

    Guards are not recorded: they would stay in the ShapeEnv that all rewrites of this program share.

    -> a graph module with the same placeholders, in order and by name.
    """
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders]
    mode: Any = detect_fake_mode(values)
    with (
        mode,
        _without_cache(mode),
        quick_shapes(),
        mode.shape_env.suppress_guards(),
        preserve_node_meta(),
        torch.no_grad(),
    ):
        traced = make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    _restore_placeholders(traced, placeholders)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


@contextmanager
def _without_cache(mode: Any) -> Iterator[None]:
    """Every layer has another token count: entries of the cache are made (a third of the time) but never hit."""
    before = getattr(mode, "cache_enabled", None)
    if before is not None:
        mode.cache_enabled = False
    try:
        yield
    finally:
        if before is not None:
            mode.cache_enabled = before


def _restore_placeholders(traced: fx.GraphModule, originals: list[fx.Node]) -> None:
    names = {node.name for node in originals}
    for node in traced.graph.nodes:
        if node.op != "placeholder" and node.name in names:
            node._rename(f"{node.name}_tamis")
    fresh = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for i, node in enumerate(fresh):
        node._rename(f"tamis_input_{i}")
    for node, original in zip(fresh, originals, strict=True):
        node._rename(original.name)
        node.name = original.name  # renaming avoids names of builtins, such as `input`, that export itself gives
        node.target = original.name
        node.meta.update({key: value for key, value in original.meta.items() if key != "tensor_meta"})
