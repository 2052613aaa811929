"""Re-execution with fewer tokens inside some regions of the graph and all of them everywhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import set_current_meta

from ..counts import CountRule
from ..errors import PositionRead
from ..graph import Mask, TokenGraph
from ..rewrite import Options, Outcome
from ..tokens import Plan, Tokens
from .cuts import count_text, plan_of, real_tokens
from .interpreter import Mark, ReductionInterpreter
from .outputs import restored_output
from .stream_state import StreamState
from .sub_layers import Place, SubLayerReduction
from .token_axes import Axes


@dataclass(eq=False)
class Block:
    """A block whose sub-layers share one plan, made from what enters it.

    start  the value [B, N, C] that enters;  mask  that of its self-attention, which knows padding
    """

    method: SubLayerReduction
    place: Place
    rule: CountRule
    start: fx.Node
    mask: Mask
    plan: Plan | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True, eq=False)
class Span:
    """Nodes of the graph that may run on fewer tokens.

    kind     what they are: "self-attention", "cross-attention", "MLP", "the block", "the layers"
    site     what outcomes call them: the node of the attention, or the exit
    inside   the nodes, from the first behind the entries to the exit
    entries  values [B, N, C] outside of it, which enter it reduced
    exit     the value [B, N, C] that leaves it at full length
    passes   value [B, N, C] that dropped tokens leave with; None: zeros
    reason   why they cannot; "" where they can
    more     the other layers that they hold, each by index and site
    """

    kind: str
    site: str
    inside: set[fx.Node]
    entries: tuple[fx.Node, ...]
    exit: fx.Node
    passes: fx.Node | None = None
    reason: str = ""
    more: tuple[tuple[int, str], ...] = ()


@dataclass(eq=False)
class Region:
    """A span that runs on the tokens of its block's plan, with a stream state of its own."""

    block: Block
    span: Span
    state: StreamState | None = None
    reduced: dict[fx.Node, Tensor] = field(default_factory=dict)
    done: list[fx.Node] = field(default_factory=list)
    given_up: str = ""

    @property
    def inside(self) -> set[fx.Node]:
        """The nodes of the span."""
        return self.span.inside


class NeedsAll(Exception):
    """Something inside a region cannot do without all tokens."""


class RegionInterpreter(ReductionInterpreter):
    """Runs the original graph; every region has a stream state of its own, and other nodes know of none."""

    def __init__(
        self, graph: TokenGraph, regions: list[Region], options: Options, weights: dict[int, dict[str, str]]
    ) -> None:
        super().__init__(graph, {}, options, weights)
        self.regions = regions
        self.region_of = {node: region for region in regions for node in region.inside}
        self.starts: dict[fx.Node, list[Block]] = {}
        self._kept: dict[tuple[int, fx.Node], dict[str, Tensor]] = {}  # what a plan carries to others of its start
        for block in dict.fromkeys(region.block for region in regions):
            self.starts.setdefault(block.start, []).append(block)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, inside its region if it is in one; then make the plans of the blocks that start at it."""
        if n.op == "output":
            return self._outputs(n)
        region = self.region_of.get(n)
        with set_current_meta(n):
            value = self._plain(n) if region is None or region.given_up else self._run_inside(n, region)
            value = self.cuts.at(n, value)
            for block in self.starts.get(n, ()):
                self._make_plan(block, value)
        return value

    def _plain(self, n: fx.Node) -> Any:
        return fx.Interpreter.run_node(self, n)

    def _make_plan(self, block: Block, hidden: Tensor) -> None:
        place, rule = block.place, block.rule
        valid = real_tokens(self.value_of(block.mask.node)) if block.mask.padded and block.mask.node else None
        state = StreamState(hidden.shape[0], hidden.shape[1], valid, hidden.device)
        tokens = Tokens(
            hidden=hidden,
            rule=rule,
            out=torch.ops.tamis.token_count(hidden, 1, place.prefix, rule.flat()),
            prefix=place.prefix,
            layer=place.index,
            layers=place.blocks,
            valid=valid,
            grid=block.method.grid_of(place),
            weights={name: self.value_of(node) for name, node in self.weights.get(id(block.method), {}).items()},
            carried=self._kept.get((id(block.method), block.start), {}),
            _tensors={"positions": state.positions},
        )
        plan = plan_of(block.method, tokens, self.graph_)
        assert plan is not None  # these methods all reduce
        block.plan, block.tokens = plan, tokens
        self._kept[id(block.method), block.start] = {**tokens.carried, **plan.carry}

    def _run_inside(self, n: fx.Node, region: Region) -> Any:
        """Run a node with the region's entries reduced; where that fails, the region is given up."""
        if region.state is None:
            self._enter(region)
        entries = region.span.entries
        full = {entry: self.env[entry] for entry in entries}
        self.env.update(region.reduced)
        self.marks.update(dict.fromkeys(entries, Axes((1,), 0, 1)))
        self.state, self.cuts.last = region.state, (str(region.block.method), region.block.place.index)
        reason = ""
        try:
            marked = any(self.marks.get(a) for a in n.all_input_nodes)
            value, mark = self._run_marked(n) if marked else (self._plain(n), None)
            whole = self._leave(region, value, mark) if n is region.span.exit else value
        except (NeedsAll, PositionRead) as need:
            reason = f"{n.name} needs all tokens: {need}" if isinstance(need, NeedsAll) else str(need).split("\n")[0]
        finally:
            self.env.update(full)
            for entry in entries:
                del self.marks[entry]
            self.state = None
        if reason:
            return self._give_up(region, n, reason)
        region.done.append(n)
        if n is region.span.exit:
            return self._with_passing(region, whole)
        self.marks[n] = mark
        return value

    def _enter(self, region: Region) -> None:
        plan, tokens = region.block.plan, region.block.tokens
        assert plan is not None
        assert tokens is not None
        first, *others = (self.env[entry] for entry in region.span.entries)
        region.state = StreamState(first.shape[0], first.shape[1], tokens.valid, first.device)
        reduced, own = (region.state.advance(first, plan, size_bias=False), region.block.method.shorten(first, tokens))
        values = [reduced if own is None else own]
        values += [region.state.reduce(value, plan) for value in others]
        region.reduced = dict(zip(region.span.entries, values, strict=True))

    def _leave(self, region: Region, value: Tensor, mark: Mark) -> Tensor:
        """A value of the region at full length; zeros for tokens that were dropped."""
        if not isinstance(mark, Axes) or mark.dims != (1,) or mark.batch != 0 or mark.start:
            raise NeedsAll("its tokens are not all in axis 1")
        assert region.state is not None
        assert region.block.tokens is not None
        whole = region.block.method.lengthen(value, region.block.tokens)
        return restored_output(value, mark, region.state) if whole is None else whole

    def _with_passing(self, region: Region, whole: Tensor) -> Tensor:
        """What leaves a region, with what passed it by."""
        if region.span.passes is None:
            return whole
        assert region.block.plan is not None
        return torch.where((region.block.plan.slot >= 0).unsqueeze(-1), whole, self.env[region.span.passes])

    def _give_up(self, region: Region, n: fx.Node, reason: str) -> Any:
        """Run what of a region has run once more, with all tokens; what it made before is used by nothing."""
        region.given_up = reason
        for node in region.done:
            self.marks.pop(node, None)
            self.env[node] = self._plain(node)
        return self._plain(n)

    def _run_restored(self, n: fx.Node, reason: str) -> tuple[Any, Mark]:
        raise NeedsAll(reason)

    def _refuse_opaque(self, n: fx.Node) -> None:
        """What has no form in torch has no rule either: its region is given up."""

    def outcomes_of(self, region: Region) -> list[Outcome]:
        """What happened to a region, for every layer that it holds."""
        block, span = region.block, region.span
        name, where = str(block.method), [(block.place.index, span.site), *span.more]
        if region.given_up:
            return [Outcome(name, index, site, False, region.given_up) for index, site in where]
        assert block.plan is not None
        counts, note = (count_text(block.place.tokens), count_text(block.plan.out)), block.method.note(block.place)
        return [Outcome(name, index, site, True, note, *counts, block.rule, inside=span.kind) for index, site in where]
