"""block_sparse_attention as Inductor compiles it for a CPU: torch's FlexAttention over blocks of keys.

Its C++ kernel visits the blocks that a row of queries lists, in place.  A block that every query of the row reads whole
is listed as full; of any other each pair is asked for.  That question may hold no tensor and no dynamic size: the
kernel's template confuses symbols whose names begin alike, and does not compile.  So it takes what `why_not` has
nothing against, and rows that copy their keys (block_sparse_rows) the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .gathered_attention import with_dense
from .sparse_pairs import Pairs

LEAST = 16  # keys of a block; with fewer, rows that copy their keys are faster
CPU = torch.device("cpu")
TAKEN = (torch.float32, torch.bfloat16, torch.float16)
# As the template asks it; a constant, since torch.compile traces neither question
RUNS = (
    torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    and sys.platform != "darwin"
    and not torch.xpu.is_available()
)


def compiled_form(q: Any, k: Any, v: Any, *rest: Any) -> Callable[..., Tensor] | None:
    """What a call with these arguments is compiled as, of which tensors may be nodes; None: nothing else."""
    return None if why_not_index(Pairs.of(*rest)[0]) else compiled


def compiled(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """block_sparse_attention of the same arguments, for `torch.compile` to trace."""
    index, scale, softcap = Pairs.of(*rest)
    if why_not(q, index):
        return torch.ops.tamis.block_sparse_attention(q, k, v, *rest)
    out = attend_blocks(q, k, v, index, scale, softcap)
    return with_dense(out, None, q, k, v, index, scale, softcap)[0]


def why_not(q: Tensor, index: Pairs) -> str:
    """Why FlexAttention does not take it, from what is known when compiling; "" where it does."""
    if reason := why_not_index(index):
        return reason
    if q.shape[2] == 1:
        return "of one query Inductor does not compile it"  # it fuses a copy behind the kernel, which takes none
    if q.dtype not in TAKEN or q.device.type != "cpu" or not RUNS:
        return "the kernel is not for this type, or not for this processor"
    return ""


def why_not_index(index: Pairs) -> str:
    """Why it takes no such index, whatever its tensors hold; "" where it does."""
    if index.columns is not None or index.positions is not None:
        return "keys are listed one by one, or lie in another order"
    if index.tiles is not None and not (index.aligned and index.width >= LEAST):
        return f"its tiles start anywhere, or are less than {LEAST} keys wide"
    if index.tiles is not None and (index.sink or index.local):
        return "it reads tiles and single keys beside them"
    if index.lengths is not None and not index.causal:
        return "keys of padding lie within what a query may see"
    return ""


@torch.compiler.nested_compile_region
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, index: Pairs, scale: float, softcap: float | None) -> Tensor:
    """The attention, but for the index's `first` and `last` tokens.

    A region of its own, which Inductor compiles once for all layers that are alike: its C++ takes seconds.
    """
    tokens = q.shape[2]
    width = index.rows if index.tiles is None else index.width
    part, whole = visited(index, tokens, width)

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    def reads(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i if index.causal else j >= 0
        if index.tiles is None:
            near = (i - j < index.local) & (j - i < index.local)
            seen = seen & ((j < index.sink) | near)
        return seen & (i - j < index.window) & (j - i < index.window) if index.window else seen

    mask = BlockMask.from_kv_blocks(
        *_lists(part),
        *_lists(whole),
        BLOCK_SIZE=(index.rows, width),
        mask_mod=reads,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )
    out = flex_attention(q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=True)
    if index.lengths is None:
        return out
    real = torch.arange(tokens, device=CPU) < index.lengths.unsqueeze(1)
    return torch.where(real[:, None, :, None], out, 0.0)


def visited(index: Pairs, tokens: Any, width: int) -> tuple[Tensor, Tensor]:
    """[b, s, R, C] bool: blocks of which queries of a row read some keys, and blocks that all of them read whole."""
    first = torch.arange((tokens + index.rows - 1) // index.rows, device=CPU).unsqueeze(1) * index.rows
    last = torch.clamp(first + index.rows, max=tokens) - 1
    low = torch.arange((tokens + width - 1) // width, device=CPU) * width
    high = torch.clamp(low + width, max=tokens) - 1
    if index.tiles is not None:
        some = every = _listed(index.tiles.to(torch.int64), width, low.shape[0])
    else:
        some, every = (((x < index.sink) & (first >= 0))[None, None] for x in (low, high))
        if index.local:
            some = some | ((first - high < index.local) & (low - last < index.local))
            every = every | ((last - low < index.local) & (high - first < index.local))
    if index.causal:
        some, every = some & (low <= last), every & (high <= first)
    if index.window:
        some = some & (first - high < index.window) & (low - last < index.window)
        every = every & (last - low < index.window) & (high - first < index.window)
    return some & ~every, some & every


def _listed(tiles: Tensor, width: int, blocks: Any) -> Tensor:
    """[B, S, R, C] bool: the blocks that tiles [B, S, R, T] name."""
    at = torch.where(tiles < 0, blocks, tiles // width)  # column `blocks` takes what is none
    flags = torch.zeros((*tiles.shape[:3], blocks + 1), dtype=torch.bool, device=CPU)
    return flags.scatter(3, at, torch.ones_like(at, dtype=torch.bool))[..., :-1]


def _lists(flags: Tensor) -> tuple[Tensor, Tensor]:
    """How many [b, s, R] of flags [b, s, R, C] are set, and which: [b, s, R, C], the set ones first."""
    order = flags.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return flags.sum(-1, dtype=torch.int32), order.to(torch.int32)
