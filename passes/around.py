"""The rewrite of all methods that reduce tokens inside sub-layers: which sub-layers, and one re-execution for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from torch import fx

from ..capture.branches import Branch, are_tokens, between, find_branches, queries_only, why_leaks
from ..capture.closure import ancestors
from ..capture.masks import user_inputs
from ..capture.prefix import image_size
from ..capture.program import rebuild
from ..graph import Mask, TokenGraph
from ..kernels.symbols import symbolic_counts
from ..rewrite import Options, Outcome, Result
from .layer_choice import able
from .outputs import with_token_map
from .regions import Block, Region, RegionInterpreter, Span
from .retrace import retrace
from .sub_layers import Place, SubLayerReduction
from .trained import with_trained

NAMES = {"self": "self-attention", "cross": "cross-attention", "mlp": "MLP"}


def reduce_around(graph: TokenGraph, methods: Sequence[SubLayerReduction], options: Options) -> Result:
    """Give the methods' sub-layers fewer tokens, and put all of them back behind each."""
    outcomes: list[Outcome] = []
    regions: list[Region] = []
    ready = able(graph, methods, outcomes)
    branches = find_branches(graph)
    blocks = [branch for branch in branches if branch.kind == "self"]
    extended, weights = with_trained(graph, [(one.stream, m) for one in blocks[:1] for m in ready], len(blocks))
    for method in ready:
        regions += _Placing(extended, branches, method, outcomes).regions(regions)
    if not regions and not options.token_map:
        return Result(graph, tuple(outcomes))
    interpreter = RegionInterpreter(extended, regions, options, weights)
    with symbolic_counts() if options.symbolic_counts else nullcontext():
        module = retrace(extended.program, interpreter.run_all)
    outcomes += [outcome for region in regions for outcome in interpreter.outcomes_of(region)]
    outcomes.sort(key=lambda o: -1 if o.layer is None else o.layer)
    if not any(o.applied for o in outcomes) and not options.token_map:
        return Result(graph, tuple(outcomes))
    spec = with_token_map(graph.program) if options.token_map else None
    program = rebuild(extended.program, module, out_spec=spec)
    return Result(graph.with_program(program), tuple(outcomes))


class _Placing:
    """Finds the regions of one method in one graph; says of every sub-layer that gets none why."""

    def __init__(
        self, graph: TokenGraph, branches: Sequence[Branch], method: SubLayerReduction, outcomes: list[Outcome]
    ) -> None:
        self.graph, self.branches, self.method, self.outcomes = graph, branches, method, outcomes
        self.by_name = {node.name: node for node in graph.graph.nodes}
        self.blocks = [branch for branch in branches if branch.kind == "self"]
        self.chosen = method.selected(len(self.blocks))

    def regions(self, taken: Sequence[Region]) -> list[Region]:
        """Regions around the wanted sub-layers that none of `taken` holds."""
        held = {node for region in taken for node in region.inside}
        found: list[Region] = []
        for index in self.chosen:
            opener = self.blocks[index]
            block = self._block(index, opener)
            for span in self._wanted(opener):
                reason = block if isinstance(block, str) else span.reason
                if not reason and span.inside & held:
                    reason = "tokens are fewer there by another pass, or in a sub-layer that shares its nodes"
                if reason:
                    self.outcomes.append(Outcome(str(self.method), index, span.site, False, reason))
                    continue
                assert isinstance(block, Block)
                held |= span.inside
                found.append(Region(block, span))
        return found

    def _wanted(self, opener: Branch) -> Iterator[Span]:
        kinds = self.method.kinds
        for branch in self.branches:
            if branch.block == opener.site and branch.kind in kinds:
                entry, end = self.by_name[branch.entry], self.by_name[branch.exit]
                yield Span(
                    NAMES[branch.kind], self._site(branch), between(entry, end), (entry,), end, None, branch.reason
                )
        if "block" in kinds:
            yield self._whole(opener)
        if "layers" in kinds:
            yield from self._in_a_row(opener)

    def _in_a_row(self, opener: Branch) -> Iterator[Span]:
        """The chosen layers of the stream as one, from the place where the first of them starts."""
        assert opener.site is not None
        site, places = self.graph.sites[opener.site], {self.blocks[index].site: index for index in self.chosen}
        layers = [layer for layer in self.graph.layers if layer.site in places]
        if opener.site not in [layer.site for layer in layers]:
            yield Span("the layers", site.node, set(), (), self.by_name[site.node], None, site.reason)
        if not layers or layers[0].site != opener.site:
            return
        start, last = self.by_name[opener.stream], layers[-1]
        end = start if last.after_block is None else self.by_name[last.after_block]
        inside = between(start, end)
        reason = "; ".join(last.notes) if last.after_block is None else why_leaks(inside, end)
        if last.index - layers[0].index >= len(layers):
            reason = "the chosen layers do not follow each other"
        more = tuple((places[layer.site], self.graph.sites[layer.site].node) for layer in layers[1:])
        yield Span("the layers", site.node, inside, (start,), end, None, reason, more)

    def _whole(self, opener: Branch) -> Span:
        """A block whose queries alone are fewer; tokens that are none of them pass it by."""
        assert opener.site is not None
        site = self.graph.sites[opener.site]
        layer = next((one for one in self.graph.layers if one.site == opener.site), None)
        start = self.by_name[opener.stream]
        if layer is None or layer.after_block is None:
            why = site.reason if layer is None else "; ".join(layer.notes)
            return Span("the block", site.node, set(), (start,), start, start, why)
        end = self.by_name[layer.after_block]
        inside, entries = queries_only(self.graph, site, start, end)
        odd = [one.name for one in entries if not are_tokens(one, start)]
        reason = why_leaks(inside, end)
        if odd:
            reason = f"its queries are made together with its keys and values: {odd[0]} is not of the stream's shape"
        return Span("the block", site.node, inside, tuple(entries), end, start, reason)

    def _padding(self, mask: Mask) -> str:
        if mask.padded:
            return "known"
        node = self.by_name[mask.node] if mask.node is not None and mask.kind == "bias" else None
        reads = node is not None and ancestors(node, through_sizes=False) & set(user_inputs(self.graph.program))
        return "unknown" if reads else "none"

    def _site(self, branch: Branch) -> str:
        return branch.exit if branch.site is None else self.graph.sites[branch.site].node

    def _block(self, index: int, opener: Branch) -> Block | str:
        """The block that a self-attention opens, or why it has no plan."""
        assert opener.site is not None
        site = self.graph.sites[opener.site]
        first = self.blocks[0] if self.method.from_the_first else opener
        start: fx.Node = self.by_name[first.stream]
        if site.hides_later:
            return "its attention is causal: a merged token would see ahead"
        place = Place(
            index,
            len(self.blocks),
            start.meta["val"].shape[1],
            self.graph.prefix if site.role == "stream" else 0,
            image_size(self.graph.program),
            self._padding(site.mask),
            site.role == "stream" and self.graph.grid is not None,
        )
        rule = self.method.rule(place)
        if isinstance(rule, str):
            return rule
        if rule.is_identity or (isinstance(place.tokens, int) and rule.removed(place.tokens) == 0):
            return "nothing to remove here (r=0, keep_ratio=1, or no token that can leave)"
        return Block(self.method, place, rule, start, site.mask)
