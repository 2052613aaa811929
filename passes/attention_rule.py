"""The attention rule: what a site computes once its tokens have been reduced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..capture.sites import attention_argument, attention_parameter
from ..graph import Mask, Site
from .axis_rules.call import Answer, Call, align_epoch, bring_side
from .token_axes import Axes, NeedsFullLength

SDPA = torch.ops.aten.scaled_dot_product_attention.default
ATTENTION = torch.ops.tamis.attention.default
ROUNDED = torch.ops.tamis.quantized_attention.default


def attend(call: Call, site: Site) -> Answer:
    """Run an attention site whose queries, keys or both are reduced.

    Keys of the stream get the per-key bias (log sizes, -inf without a token), which also says what a padding mask
    said; any other mask loses the rows and columns of the tokens that are gone.  Slots of a causal stream are in the
    order of their tokens, so that plain causality needs no table.  Without bias and mask the site stays as it is.
    """
    (q, q_axes), (k, k_axes), (v, v_axes) = (_aligned(call, i) for i in range(3))
    _check_heads(q_axes, k_axes, v_axes, q.dim())
    causal = site.causal or site.mask.kind == "causal"
    if causal and (q_axes is None or k_axes is None):
        raise NeedsFullLength("its attention is causal, and its queries and keys are not the same tokens")
    bias = call.state.key_bias() if k_axes is not None else None
    mask = _live_mask(call, site.mask, q_axes, k_axes)
    answer = q_axes
    if call.node.target is ROUNDED:
        return ROUNDED(q, k, v, bias, mask, site.scale, causal, *call.args[7:]), answer
    if bias is None and site.softcap is None:
        kwargs: dict[str, Any] = {} if site_uses_default_scale(site) else {"scale": site.scale}
        if causal:
            kwargs["is_causal"] = True
        if site.kv_heads != site.heads:
            kwargs["enable_gqa"] = True
        return SDPA(q, k, v, mask, **kwargs), answer
    return ATTENTION(q, k, v, bias, mask, site.scale, causal, site.softcap), answer


def site_uses_default_scale(site: Site) -> bool:
    """Whether the scale is 1/sqrt(D), which needs no argument."""
    return site.scale == site.head_dim**-0.5


def _aligned(call: Call, index: int) -> tuple[Tensor, Axes | None]:
    axes = call.axes(index)
    return (call.args[index], None) if axes is None else align_epoch(call, call.args[index], axes)


def _check_heads(q: Axes | None, k: Axes | None, v: Axes | None, rank: int) -> None:
    token_axis = (rank - 2,)
    if (k is None) != (v is None) or any(
        axes is not None and (axes.dims != token_axis or axes.start) for axes in (q, k, v)
    ):
        raise NeedsFullLength("its queries, keys and values do not hold the same tokens in axis -2")


def _live_mask(call: Call, mask: Mask, q_axes: Axes | None, k_axes: Axes | None) -> Tensor | None:
    parameter = attention_parameter(call.node, "mask")
    assert parameter is not None
    node = attention_argument(call.node, "mask")
    covered = mask.kind in ("full", "causal") or (mask.kind == "padding" and k_axes is not None)
    if not isinstance(node, fx.Node) or covered:
        return None
    live: Any = call.arg(*parameter)
    if call.axes_of(node) is not None:
        return live
    rank = call.args[0].dim()
    dims = tuple(d for d, axes in ((rank - 2, q_axes), (rank - 1, k_axes)) if axes is not None)
    found = q_axes or k_axes
    assert found is not None
    around = Axes(dims, 0, found.epoch)
    return bring_side(call, live, rank, around, node.meta["val"].shape)
