"""The rewrite of all methods that reduce tokens inside sub-layers: which sub-layers, and one re-execution for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from torch import fx

from ..capture.branches import Branch, between, find_branches
from ..capture.prefix import image_size
from ..capture.program import rebuild
from ..graph import TokenGraph
from ..kernels.symbols import symbolic_counts
from ..rewrite import Options, Outcome, Result
from .outputs import with_token_map
from .regions import Block, Region, RegionInterpreter
from .retrace import retrace
from .sub_layers import Place, SubLayerReduction

NAMES = {"self": "self-attention", "cross": "cross-attention", "mlp": "MLP"}


def reduce_around(graph: TokenGraph, methods: Sequence[SubLayerReduction], options: Options) -> Result:
    """Give the methods' sub-layers fewer tokens, and put all of them back behind each."""
    outcomes: list[Outcome] = []
    regions: list[Region] = []
    for method in methods:
        reason = method.why_not(graph)
        if reason:
            outcomes.append(Outcome(str(method), None, "", False, reason))
        else:
            regions += _Placing(graph, method, outcomes).regions(regions)
    if not regions and not options.token_map:
        return Result(graph, tuple(outcomes))
    interpreter = RegionInterpreter(graph, regions, options)
    with symbolic_counts() if options.symbolic_counts else nullcontext():
        module = retrace(graph.program, interpreter.run_all)
    outcomes += map(interpreter.outcome_of, regions)
    outcomes.sort(key=lambda o: -1 if o.layer is None else o.layer)
    if not any(o.applied for o in outcomes) and not options.token_map:
        return Result(graph, tuple(outcomes))
    spec = with_token_map(graph.program) if options.token_map else None
    program = rebuild(graph.program, module, out_spec=spec)
    return Result(graph.with_program(program), tuple(outcomes))


class _Placing:
    """Finds the regions of one method in one graph; says of every sub-layer that gets none why."""

    def __init__(self, graph: TokenGraph, method: SubLayerReduction, outcomes: list[Outcome]) -> None:
        self.graph, self.method, self.outcomes = graph, method, outcomes
        self.by_name = {node.name: node for node in graph.graph.nodes}
        self.branches = find_branches(graph)
        self.blocks = [branch for branch in self.branches if branch.kind == "self"]

    def regions(self, taken: Sequence[Region]) -> list[Region]:
        """Regions around the wanted sub-layers that none of `taken` holds."""
        held = {node for region in taken for node in region.inside}
        found: list[Region] = []
        for index in self.method.selected(len(self.blocks)):
            opener = self.blocks[index]
            block = self._block(index, opener)
            for branch in self._wanted(opener):
                inside = between(self.by_name[branch.entry], self.by_name[branch.exit])
                reason = block if isinstance(block, str) else branch.reason
                if not reason and inside & held:
                    reason = "tokens are merged around it by another pass or with a sub-layer that shares its nodes"
                if reason:
                    self.outcomes.append(Outcome(str(self.method), index, self._site(branch), False, reason))
                    continue
                held |= inside
                ends = self.by_name[branch.entry], self.by_name[branch.exit]
                kind = NAMES[branch.kind]
                found.append(Region(block, kind, inside, ends[:1], ends[1], self._site(branch)))
        return found

    def _wanted(self, opener: Branch) -> Iterator[Branch]:
        return (one for one in self.branches if one.block == opener.site and one.kind in self.method.kinds)

    def _site(self, branch: Branch) -> str:
        return branch.exit if branch.site is None else self.graph.sites[branch.site].node

    def _block(self, index: int, opener: Branch) -> Block | str:
        """The block that a self-attention opens, or why it has no plan."""
        assert opener.site is not None
        site = self.graph.sites[opener.site]
        start: fx.Node = self.by_name[opener.stream]
        if site.hides_later:
            return "its attention is causal: a merged token would see ahead"
        place = Place(
            index,
            len(self.blocks),
            start.meta["val"].shape[1],
            self.graph.prefix if site.role == "stream" else 0,
            image_size(self.graph.program),
            site.mask.padded,
        )
        rule = self.method.rule(place)
        if isinstance(rule, str):
            return rule
        if rule.is_identity or (isinstance(place.tokens, int) and rule.removed(place.tokens) == 0):
            return "nothing to remove here (r=0, keep_ratio=1, or no token that can leave)"
        return Block(self.method, place, rule, start, site.mask)
