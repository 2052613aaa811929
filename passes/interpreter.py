"""Re-execution of one graph with token reductions: every node runs again with live shapes, by its token-axis rule."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.traceback import set_current_meta

from ..capture.closure import descendants
from ..errors import PositionRead, TokenAxisUnsupported, TokenShapeConflict
from ..graph import TokenGraph, op_name, source_line
from ..onnx_errors import OpaqueOnStream
from ..opaque import carried_in, opaque_of
from ..rewrite import Options, Outcome
from ..shape_names import named_shape
from .attention_rule import attend
from .axis_rules import Call, rule_for
from .axis_rules.indexing import ReadsPosition
from .cuts import CutRunner
from .outputs import output_values, restored_output, token_map, without_padding
from .replay import Replay
from .stream_state import StreamState
from .token_axes import RESTORED, Axes, NeedsFullLength, Pieces, Restored

PLACES = ("before_attention", "after_attention", "after_block")
Mark = Axes | Pieces | Restored | None


class ReductionInterpreter(Replay):
    """Runs the original graph; `marks` says of each live value (of a list: each piece) which axes are token axes."""

    def __init__(
        self, graph: TokenGraph, placed: Any, options: Options, weights: dict[int, dict[str, str]] | None = None
    ) -> None:
        super().__init__(graph)
        self.options = options
        self.sites = {site.node: site for site in graph.sites}
        self.weights = weights or {}  # by a method's id: the nodes of its trained tensors
        self.cuts = CutRunner(graph, placed, self)
        self.marks: dict[fx.Node, Mark] = {}
        self.state: StreamState | None = None
        self._states = {layer.cut(where) for layer in graph.layers for where in PLACES}
        self._left: dict[fx.Node, tuple[Any, ...]] = {}  # of the stream's states: see StreamState.left
        self._whole: dict[fx.Node, Any] = {}

    @property
    def outcomes(self) -> list[Outcome]:
        """What happened at every cut."""
        return self.cuts.outcomes

    def run_node(self, n: fx.Node) -> Any:
        """Run one node by its rule, then reduce if it is a cut."""
        if n.op == "output":
            return self._outputs(n)
        with set_current_meta(n):
            if not any(self.marks.get(a) for a in n.all_input_nodes):
                value = super().run_node(n)
            else:
                value, self.marks[n] = self._run_marked(n)
            value = self.cuts.at(n, value)
            mark = self.marks.get(n)
            if n.name in self._states and isinstance(mark, Axes) and self.state is not None:
                self._left[n] = self.state.left[: mark.epoch]
            return value

    def _run_marked(self, n: fx.Node) -> tuple[Any, Mark]:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        assert self.state is not None
        self._refuse_opaque(n)
        pieces = self.marks.get(n.all_input_nodes[0])
        if isinstance(pieces, tuple):  # only a getitem takes a list apart
            return super().run_node(n), pieces[args[1]]
        if any(isinstance(self.marks.get(a), Restored) for a in n.all_input_nodes):
            return self._run_restored(n, "")
        call = Call(n, args, kwargs, self._axes_of, self.state, self.graph_.prefix)
        rule = rule_for(n.target)
        try:
            if n.name in self.sites:
                return attend(call, self.sites[n.name])
            if rule is None:
                raise NeedsFullLength("tamis has no token-axis rule for this op")
            return rule(call)
        except NeedsFullLength as need:
            return self._run_restored(n, str(need))
        except ReadsPosition as read:
            raise PositionRead(position=read.position, prefix=self.graph_.prefix, **self._where(n)) from None
        except RuntimeError as error:
            raise TokenShapeConflict(op=op_name(n), reason=str(error).splitlines()[0], **self._where(n)) from error

    def _refuse_opaque(self, n: fx.Node) -> None:
        """Raise OpaqueOnStream for a node without a form in torch that stands before a place yet to be reduced.

        Behind the last such place it may stand: the sequence is restored for it.
        """
        if opaque_of(n) is None:
            return
        below = {one.name for one in descendants(n, through_sizes=False)}
        chosen = any(method.layers is not None for at in self.cuts.placed.values() for _, method in at)
        sites = [site.node for site in self.graph_.sites if site.role in ("stream", "other") and not chosen]
        if below.isdisjoint([*self.cuts.placed, *sites]):
            return
        where = self._where(n)
        said = {key: where[key] for key in ("where", "node", "method")}
        raise OpaqueOnStream(op=op_name(n), ops=carried_in(self.graph_.graph), **said)

    def _axes_of(self, arg: Any) -> Axes | None:
        mark = self.marks.get(arg) if isinstance(arg, fx.Node) else None
        return mark if isinstance(mark, Axes) else None

    def _run_restored(self, n: fx.Node, reason: str) -> tuple[Any, Mark]:
        """Run a node on the restored sequence: merging can be undone, and what passed through be put back."""
        state = self.state
        assert state is not None
        dropped = any(self._lost(arg) for arg in n.all_input_nodes)
        if dropped or (state.padded and reason):
            raise self._cannot_restore(n, reason or "it follows a node that needs every token", dropped)
        return self._at_full_length(n), RESTORED

    def _at_full_length(self, n: fx.Node) -> Any:
        """What a node computes from full-length arguments."""
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._full)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def _full(self, arg: fx.Node) -> Any:
        """A value put back to full length.  Where its batch axis was folded away, what it came from is put back.

        So it is where tokens passed through: what is computed of each token by itself is computed of them too.
        """
        axes, value = self._axes_of(arg), self.env[arg]
        if isinstance(self.marks.get(arg), tuple):
            return self._at_full_length(arg)
        if axes is None:
            return value
        assert self.state is not None
        if axes.batch is None and self._lost(arg):
            raise self._cannot_restore(arg, "its batch axis is folded away", True)
        if self.state.dropped_by(axes.epoch) and not self._lost(arg):
            return self._with_dropped(arg)
        if axes.batch is None:
            return self._at_full_length(arg)
        if isinstance(value, (list, tuple)):
            return type(value)(restored_output(v, axes, self.state) for v in value)
        return restored_output(value, axes, self.state)

    def _with_dropped(self, n: fx.Node) -> Any:
        """The value of a node for every token, dropped ones being in the stream what they were when they left."""
        assert self.state is not None
        if n.name in self.sites:
            raise self._cannot_restore(n, "attention has no result for tokens that are not there", True)
        if n not in self._whole:
            at_state = n in self._left and self._axes_of(n) is not None
            self._whole[n] = (
                self.state.with_dropped(self.env[n], self._left[n]) if at_state else self._at_full_length(n)
            )
        return self._whole[n]

    def _lost(self, arg: fx.Node) -> bool:
        """Whether tokens were dropped for good before a value was computed."""
        axes = self._axes_of(arg)
        return axes is not None and self.state is not None and self.state.lost_by(axes.epoch)

    def _cannot_restore(self, n: fx.Node, reason: str, dropped: bool) -> TokenAxisUnsupported:
        lost = "dropped some for good" if dropped else "left no place for padding"
        hint = (
            "use a merging pass (tome), which can be undone before this node, passthrough=true (evit: and fuse=false), "
            "which leaves dropped tokens as they were, or other layers."
            if dropped
            else "give rows without padding (no mask), or keep the layers before this node unreduced (layers=...)."
        )
        return TokenAxisUnsupported(op=op_name(n), lost=lost, reason=reason, hint=hint, **self._where(n))

    def _where(self, n: fx.Node) -> dict[str, Any]:
        """Fields that every rewriting error has."""
        first = next((a for a in n.all_input_nodes if self.marks.get(a)), n)
        live = self.env.get(first)
        method, layer = self.cuts.last
        opaque = opaque_of(n)
        return {
            "where": source_line(n) or self.graph_.name,
            "node": opaque.node if opaque is not None else n.name,
            "method": method,
            "layer": layer,
            "before": named_shape(first.meta.get("val"), self.graph_.program),
            "after": named_shape(live, self.graph_.program),
        }

    def _outputs(self, n: fx.Node) -> list[Any]:
        values = []
        for node in output_values(n):
            axes = self._axes_of(node)
            value = self.env[node] if isinstance(node, fx.Node) else node
            if axes is not None and self.options.restore:
                value = self._full(node)
                if self.state is not None and self.state.dropped_by(axes.epoch) and not self._lost(node):
                    value = without_padding(value, axes, self.state)
            values.append(value)
        state = self.graph_.layers[-1].after_block if self.graph_.layers else None
        for method, tokens in self.cuts.seen.values():
            values = values if state is None else method.answer(values, self.value_of(state), tokens)
        if self.options.token_map:
            values.append(token_map(self.state, self.cuts.first_hidden, self.cuts.valid()))
        return values
