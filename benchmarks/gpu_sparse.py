"""Sparse attention of long prompts on a GPU: rows M5 and K8 to K12 of the goals.

    python benchmarks/gpu_sparse.py [--json FILE]
        [--rehearse]        # tiny sizes on the CPU: shows that the script runs, measures nothing worth keeping

Heads as in Llama 3 8B (32 query heads, 8 key heads of 128), bfloat16, tiles of 128 x 128, choices shared by the query
heads of a key head.  Times are medians of replays of a CUDA graph, so what reads a result on the host fails.

of_matrix_rate     FLOPs of the pairs read over the rate of a bfloat16 product of 8192 x 8192 matrices in the same run
flex_over_ours     FlexAttention's time with the same block mask, over the kernel's
of_dense_ideal     own dense kernel's time x density, over the kernel's
choosing           the choice's time over the kernel's; for `vertical-slash` and `hip` with their published budgets too
break_even         the shortest of the lengths at which choice and kernel take less than torch's dense attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_kernels import Machine, main
from torch import Tensor
from torch.nn import functional as F

import tamis
from tamis.attention_index import Heads
from tamis.passes import BlockSparse, HiP, VerticalSlash
from tamis.passes.sparse import SparseAttention, arguments

ops = torch.ops.tamis
BLOCK = 128


def sizes(machine: Machine) -> tuple[int, int, int, int]:
    """Query heads, key heads, head size, tokens of a tile."""
    return (4, 2, 16, 16) if machine.rehearse else (32, 8, 128, BLOCK)


def drawn(machine: Machine, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values."""
    heads, key_heads, width, _ = sizes(machine)
    return tuple(machine.random(1, count, tokens, width) for count in (heads, key_heads, key_heads))  # type: ignore[return-value]


def heads_of(q: Tensor, k: Tensor, v: Tensor) -> Heads:
    """What a method sees of them."""
    return Heads(q, k, v, lengths=None, scale=q.shape[3] ** -0.5, causal=True, softcap=None, layer=0, layers=1)


Choice = tuple[Tensor, Tensor | None]  # tiles [1, Hk, R, T] and columns [1, Hk, R, C]
Chooser = Callable[[Tensor, Tensor, Tensor], Choice]


def block_sparse(machine: Machine, density: float) -> BlockSparse:
    """The method of most rows."""
    return BlockSparse(density=density, block=sizes(machine)[3], share="kv")


def chooser(machine: Machine, method: SparseAttention) -> Chooser:
    """A method's choice, compiled."""

    def choose(q: Tensor, k: Tensor, v: Tensor) -> Choice:
        index = method.index(heads_of(q, k, v))
        assert index.tiles is not None
        return index.tiles, index.columns

    return choose if machine.rehearse else torch.compile(choose, dynamic=False)


def attention(method: SparseAttention, q: Tensor, k: Tensor, v: Tensor) -> Callable[[Choice], Tensor]:
    """The op over what the method chose."""
    few = min(q.shape[2], 256)  # all but the lists is the same for any length
    index = method.index(heads_of(*(x[:, :, :few] for x in (q, k, v))))

    def attend(choice: Choice) -> Tensor:
        tiles, columns = choice
        return ops.block_sparse_attention(*arguments(replace(index, tiles=tiles, columns=columns), heads_of(q, k, v)))

    return attend


def pairs(tiles: Tensor, block: int) -> int:
    """Pairs of queries and keys in these tiles that causality leaves, of the query heads of one key head each."""
    rows = torch.arange(tiles.shape[2], device=tiles.device).unsqueeze(1) * block
    own = int((tiles == rows).sum())
    return (int((tiles >= 0).sum()) - own) * block * block + own * block * (block + 1) // 2


def kernels(machine: Machine) -> list[dict[str, Any]]:
    """K8 to K11."""
    cases = [(131072, 0.1), (131072, 0.25), (32768, 0.1), (32768, 0.05)]
    return [_kernel(machine, *case) for case in ([(96, 0.25)] if machine.rehearse else cases)]


def _kernel(machine: Machine, tokens: int, density: float) -> dict[str, Any]:
    heads, key_heads, width, block = sizes(machine)
    q, k, v = drawn(machine, tokens)
    method = block_sparse(machine, density)
    choose, attend = chooser(machine, method), attention(method, q, k, v)
    chosen = choose(q, k, v)
    tiles = chosen[0]
    read = pairs(tiles, block) * (heads // key_heads)
    ours = machine.seconds(lambda: attend(chosen))
    choosing = machine.seconds(lambda: choose(q, k, v))
    dense = machine.seconds(lambda: ops.attention(q, k, v, None, None, width**-0.5, True))
    sdpa = machine.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    part = read / (heads * tokens * (tokens + 1) / 2)
    flex = machine.seconds(flex_attention(machine, q, k, v, tiles, attend(chosen)))
    return {
        "row": "K8, K9, K10, K11",
        "shape": f"H={heads}/{key_heads} N={tokens} D={width} density {density}",
        "pairs_read": part,
        "milliseconds": 1e3 * ours,
        "of_matrix_rate": 4 * read * width / ours / machine.flops,
        "flex_over_ours": flex / ours,
        "of_dense_ideal": dense * part / ours,
        "sdpa_over_ours": sdpa / ours,
        "choosing": choosing / ours,
    }


def flex_attention(
    machine: Machine, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, expected: Tensor
) -> Callable[[], Any]:
    """torch's FlexAttention with the same block mask, ready to be timed."""
    from torch.nn.attention import flex_attention as flex

    block = sizes(machine)[3]
    rows = torch.arange(tiles.shape[2], device=tiles.device).unsqueeze(1) * block
    full = (tiles >= 0) & (tiles != rows)
    group = q.shape[1] // k.shape[1]

    def listed(some: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.where(some, tiles // block, tiles.shape[2]).sort(-1).values
        order = torch.where(order < tiles.shape[2], order, 0)
        order = F.pad(order, (0, max(0, tiles.shape[2] - order.shape[-1])))[..., : tiles.shape[2]]
        return some.sum(-1).int().repeat_interleave(group, 1), order.int().repeat_interleave(group, 1).contiguous()

    read = torch.zeros(k.shape[1], *[tiles.shape[2]] * 2, dtype=torch.bool, device=q.device)
    read.scatter_(2, (tiles[0] // block).clamp(min=0).long(), tiles[0] >= 0)  # unused entries say no to tile 0 ...
    read[:, :, 0] |= (tiles[0] == 0).any(-1)  # ... which may be read all the same

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Not compiled, FlexAttention goes by this alone; compiled, it skips what the block mask leaves out."""
        return (key <= query) & read[h // group, query // block, key // block] if machine.rehearse else key <= query

    mask = flex.BlockMask.from_kv_blocks(
        *listed(tiles == rows), *listed(full), BLOCK_SIZE=block, mask_mod=seen, seq_lengths=(q.shape[2], q.shape[2])
    )
    call = flex.flex_attention if machine.rehearse else torch.compile(flex.flex_attention, dynamic=False)

    def run() -> Any:
        return call(q, k, v, block_mask=mask, enable_gqa=True)

    torch.testing.assert_close(run(), expected, rtol=3e-2, atol=3e-2)
    return run


def break_even(machine: Machine) -> list[dict[str, Any]]:
    """K12, at a tenth of the pairs."""
    lengths = [32, 64] if machine.rehearse else [1024, 2048, 4096, 8192, 16384, 32768]
    ratios = {}
    for tokens in lengths:
        q, k, v = drawn(machine, tokens)
        method = block_sparse(machine, 0.1)
        choose, attend = chooser(machine, method), attention(method, q, k, v)
        choose(q, k, v)
        ours = machine.seconds(lambda: attend(choose(q, k, v)))  # noqa: B023
        sdpa = machine.seconds(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: B023
        )
        ratios[tokens] = ours / sdpa
    first = next((tokens for tokens, ratio in ratios.items() if ratio < 1), None)
    return [{"row": "K12", "shape": "density 0.1", "of_sdpa": ratios, "break_even": first}]


def layer(machine: Machine) -> list[dict[str, Any]]:
    """M5: one decoder layer of Llama 3 8B's shapes, compiled, against the dense one and Amdahl's ideal."""
    from transformers import LlamaConfig, LlamaModel

    heads, key_heads, width, block = sizes(machine)
    tokens = 128 if machine.rehearse else 32768
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=heads * width,
        intermediate_size=heads * width * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=131072,
        use_cache=False,
    )
    model = LlamaModel(config).eval().to(machine.device, torch.bfloat16)
    ids = torch.randint(0, 256, (1, tokens), device=machine.device)
    recipe = f"block-sparse:density=0.1,block={block},share=kv"
    fast = tamis.compile(model, (ids,), passes=recipe, mode=None if machine.rehearse else "default")
    dense = model if machine.rehearse else torch.compile(model)
    with torch.no_grad():
        fast(ids), dense(ids)
        whole, ours = machine.seconds(lambda: dense(ids)), machine.seconds(lambda: fast(ids))
    q, k, v = drawn(machine, tokens)
    of_attention = machine.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    part = pairs(chooser(machine, block_sparse(machine, 0.1))(q, k, v)[0], block) / (
        key_heads * tokens * (tokens + 1) / 2
    )
    ideal = whole / (whole - of_attention * (1 - part))
    return [
        {
            "row": "M5",
            "shape": f"one layer, N={tokens}",
            "speedup": whole / ours,
            "ideal": ideal,
            "of_ideal": whole / ours / ideal,
        }
    ]


def choices(machine: Machine) -> list[dict[str, Any]]:
    """K11 for methods whose lists are built by kernels of their own, with tiles of 64 queries."""
    few = {"share": "kv", "block": 16}
    small = [VerticalSlash(columns=4, slashes=9, sink=1, near=2, **few), HiP(4, 8, (8, 4), (16, 8), (2, 1), **few)]
    methods = small if machine.rehearse else [VerticalSlash(share="kv"), HiP(share="kv")]
    lengths = [96] if machine.rehearse else [32768, 131072]
    return [_choice(machine, method, tokens) for method in methods for tokens in lengths]


def _choice(machine: Machine, method: SparseAttention, tokens: int) -> dict[str, Any]:
    heads, key_heads, width, _ = sizes(machine)
    q, k, v = drawn(machine, tokens)
    choose, attend = chooser(machine, method), attention(method, q, k, v)
    chosen = choose(q, k, v)
    choosing, attending = machine.seconds(lambda: choose(q, k, v)), machine.seconds(lambda: attend(chosen))
    sdpa = machine.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return {
        "row": "K11",
        "shape": f"{method.name} H={heads}/{key_heads} N={tokens} D={width}",
        "choosing_milliseconds": 1e3 * choosing,
        "attending_milliseconds": 1e3 * attending,
        "choosing": choosing / attending,
        "sdpa_over_both": sdpa / (choosing + attending),
    }


if __name__ == "__main__":
    main(__doc__, (kernels, break_even, layer, choices))
