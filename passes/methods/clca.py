"""CLCA's cache: means of the tokens of every block come back as tokens after the layers that lose some.

Source: Rios et al., "Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image Recognition", ICASSP
2025, arXiv 2501.00243, in the order of its code (methods card 10.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from ...counts import CountRule, at_most
from ...errors import BadParameter
from ...graph import TokenGraph
from ...registry import register
from ...tokens import Plan, Tokens
from ...weights import Shape, TrainedPass
from ..outputs import output_values
from ..plans import append_plan
from ..reduction import TokenReduction, quarter_layers

EPSILON = 1e-5  # of batch norm
NORM = ("weight", "bias", "running_mean", "running_var")


@register("clca")
@dataclass(frozen=True)
class CLCA(TrainedPass, TokenReduction):
    """Keep the mean over the patch tokens of every block, and append those kept so far after some layers.

    It lets no token leave: put it behind a pass that does, `"evit:keep_ratio=0.7 + clca"`.  After block i the means of
    the blocks since the last recovery, without i's own, come in at the end of the sequence, oldest first; from then on
    they are ordinary tokens, which may leave, merge, and count in later means.  They have no place in the image: where
    a model asks for a position, they have the first token's, and they belong to no original token.

    Published with two trained parts, fine-tuned on the task; without `weights` neither is there, and the means are
    strangers to the later layers.  Carrier tokens stand at the end of the sequence from the start on, unprotected; of
    every block the last tokens, as many as there are carriers, are kept behind the mean, which leaves them out.  The
    head reads the class token as it is after the layers where tokens come back, but for the last but one, and after the
    last block, and its scores are the model's only output; published between batch norms, as here.  Where the card is
    open: the class token is read before the model's last norm.

    Args:
        layers: layers after which tokens come back: by default a quarter, a half and three quarters of the depth, where
            EViT reduces, and the last but one.
        weights: the trained parts, one or both: `carriers` [K, C], with their positions added; and of the head, for M
            class tokens, `head.norm1` (batch norm of C: weight, bias, running_mean, running_var), `head.conv1` (weight
            [2C, 1, M], bias), `head.norm2` (of 2C), `head.conv2` (weight [classes, 2C, 1], bias).
    """

    where: ClassVar[str] = "after_block"
    always: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    own_count: ClassVar[bool] = True
    untrained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:  # carriers come in before the first block: what is after one is before the next
            object.__setattr__(self, "where", "before_attention")

    @property
    def carriers(self) -> int:
        """How many carrier tokens there are."""
        given = None if self.weights is None else self.weights.tensors.get("carriers")
        return 0 if given is None or not given.dim() else int(given.shape[0])

    @property
    def has_head(self) -> bool:
        """Whether it has a head of its own."""
        return self.weights is not None and any(name.startswith("head.") for name in self.weights.tensors)

    def default_layers(self, layers: int) -> Sequence[int]:
        """Layers 3, 6, 9 and 10 of 12, as published."""
        return [*quarter_layers(layers), max(layers - 2, 0)]

    def recoveries(self, layers: int) -> list[int]:
        """Layers after which tokens come back; raises BadParameter where nothing would read trained ones."""
        found = super().selected(layers)
        if self.weights is not None and found[-1] == layers - 1:
            rule, hint = f"below {layers - 1} with trained parts", "no layer reads what comes in behind the last."
            raise BadParameter(where=self.name, name="layers", rule=rule, got=found[-1], hint=hint)
        return found

    def selected(self, layers: int) -> list[int]:
        """All layers up to the last recovery, whose means are kept; with trained parts the one behind it too."""
        return list(range(self.recoveries(layers)[-1] + (1 if self.weights is None else 2)))

    def expected(self, layers: Sequence[int], width: int) -> Mapping[str, Shape]:
        """Carriers, a head, or both, as they were given."""
        assert self.weights is not None
        shapes: dict[str, Shape] = {} if self.has_head and not self.carriers else {"carriers": (None, width)}
        if self.has_head:
            shapes |= {f"head.norm1.{name}": (width,) for name in NORM}
            shapes |= {f"head.norm2.{name}": (2 * width,) for name in NORM}
            shapes |= {"head.conv1.weight": (2 * width, 1, None), "head.conv1.bias": (2 * width,)}
            shapes |= {"head.conv2.weight": (None, 2 * width, 1), "head.conv2.bias": (None,)}
        return shapes

    def rule(self, layer: int, layers: int, prefix: int) -> CountRule:
        """As many come in as were kept since the last recovery; carriers before the first block."""
        known, block = self.recoveries(layers), layer if self.weights is None else layer - 1
        last = max([0, *(one for one in known if one < block)])
        come = (block - last) * (1 + self.carriers) if block in known else 0
        return CountRule(prefix, (at_most(0),), appended=self.carriers if block < 0 else come)

    def why_not(self, graph: TokenGraph) -> str:
        """Tokens that come in last must be seen by all; a head needs class tokens and one output of its shape."""
        if graph.hides_later:
            return "attention is causal, and no token would see those that come in at the end"
        if any(graph.sites[layer.site].mask.kind == "window" for layer in graph.layers):
            return "attention is windowed, and tokens that come in have no place in it"
        return super().why_not(graph) or (self._why_no_head(graph) if self.has_head else "")

    def _why_no_head(self, graph: TokenGraph) -> str:
        read = self.weights.tensors["head.conv1.weight"].shape[-1] if "head.conv1.weight" in self.weights.tensors else 0
        many = len(self._read_after(len(graph.layers))) + 1
        if not graph.class_token or graph.layers[-1].after_block is None:
            return "its head reads the class token after the last block, and this model has no such token or place"
        if read != many:
            return f"its head reads {read} class tokens, and with these layers there are {many}"
        scores = self.weights.tensors.get("head.conv2.bias")
        outputs = [getattr(node, "meta", {}).get("val") for node in output_values(graph.graph.output_node())]
        shapes = [list(one.shape[1:]) for one in outputs if isinstance(one, Tensor)]
        if scores is None or shapes != [list(scores.shape)]:
            return (
                f"its head gives {'no' if scores is None else len(scores)} scores, and the model's outputs are {shapes}"
            )
        return ""

    def why_not_at(self, tokens: Tokens) -> str:
        """Carriers must be the last of every row."""
        if self.carriers and tokens.valid is not None:
            return "some tokens may be padding, and the last of a row are then not in one place"
        return ""

    def _read_after(self, layers: int) -> list[int]:
        """Blocks after which the head reads the class token, without the last."""
        return [block for block in self.recoveries(layers) if block != layers - 2]

    def note(self, layer: int, layers: int) -> str:
        """What happens at layers without recovery."""
        return "" if self.rule(layer, layers, 0).appended else "the mean of its tokens is kept for a later layer"

    def plan(self, tokens: Tokens) -> Plan | None:
        """The cache is [B, A, C] in the stream's dtype; means are summed in float32."""
        if self.weights is not None and tokens.layer == 0:
            return self._with_carriers(tokens)
        if self.has_head and tokens.layer - 1 in self._read_after(tokens.layers):
            known = [tokens.memory["classes"]] if "classes" in tokens.memory else []
            tokens.memory["classes"] = torch.cat([*known, tokens.hidden[:, :1]], dim=1)
        cache = tokens.memory.pop("cache", None)
        x, counted = tokens.hidden, tokens.patches.unsqueeze(-1)
        plan = None
        if tokens.rule.appended:
            assert cache is not None
            plan = append_plan(tokens, cache)
            x = torch.cat([x, cache], dim=1)
            counted = torch.cat([counted, torch.ones_like(cache[..., :1], dtype=torch.bool)], dim=1)
            cache = None
        own = x.shape[1] - self.carriers
        amount = counted[:, :own].float()
        mean = (x[:, :own].float() * amount).sum(1, keepdim=True) / amount.sum(1, keepdim=True).clamp(min=1)
        kept = torch.cat([mean.to(x.dtype), x[:, own:]], dim=1) if self.carriers else mean.to(x.dtype)
        tokens.memory["cache"] = kept if cache is None else torch.cat([cache, kept], dim=1)
        return plan

    def _with_carriers(self, tokens: Tokens) -> Plan | None:
        if not self.carriers:
            return None
        carriers = tokens.weights["carriers"].to(tokens.hidden.dtype)
        return append_plan(tokens, carriers.expand(tokens.hidden.shape[0], -1, -1))

    def answer(self, outputs: list[Any], state: Tensor, tokens: Tokens) -> list[Any]:
        """The head's scores [B, classes], in the dtype of the model's own; its arithmetic is float32."""
        if not self.has_head:
            return outputs
        known = [tokens.memory["classes"]] if "classes" in tokens.memory else []
        read, parts = torch.cat([*known, state[:, :1]], dim=1).float().transpose(1, 2), tokens.weights
        each = _normed(read, parts, "head.norm1").unsqueeze(2)
        pairs = each.expand(-1, -1, 2, -1).flatten(1, 2)  # the convolution has a group of two for every channel
        wide = (pairs * parts["head.conv1.weight"][:, 0]).sum(2) + parts["head.conv1.bias"]
        wide = gelu(_normed(wide.unsqueeze(2), parts, "head.norm2").squeeze(2))
        return [linear(wide, parts["head.conv2.weight"][..., 0], parts["head.conv2.bias"]).to(outputs[0].dtype)]


def _normed(x: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """Batch norm of x [B, C, M] by the numbers that it was trained to."""
    weight, bias, mean, variance = (parts[f"{name}.{one}"].unsqueeze(1) for one in NORM)
    return (x - mean) * (variance + EPSILON).rsqrt() * weight + bias
