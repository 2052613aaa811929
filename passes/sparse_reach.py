"""From how many tokens on a sparse attention method leaves out any key: tried on queries and keys made for it."""

from __future__ import annotations

import torch

from ..attention_index import Heads
from ..graph import Site
from .index_pairs import held
from .sparse import SparseAttention, window_of

PAIRS = 1 << 20  # of queries and keys that are looked at; of longer prompts some queries
LONGEST = 1 << 13  # tokens at which the search ends
STEP = 16  # a length is found to so many tokens, or to this part of it
PARTS = 4  # runs of like tokens in a prompt in which a few keys hold all attention


def reads_all(method: SparseAttention, site: Site, tokens: int) -> bool:
    """Whether a method reads every pair that dense attention reads at this length, whatever its queries and keys are.

    Judged by two prompts: tokens drawn at random, which all attend alike, and runs of equal tokens, which attend to
    their own run alone.  A method without an index, or that needs more than queries and keys, does not.
    """
    if not method.indexed:
        return False
    try:
        return all(_reads_all(method, _heads(site, tokens, drawn)) for drawn in (tokens, min(tokens, PARTS)))
    except Exception:  # a method may ask for what is only in a model (trained tensors): then nothing is said
        return False


def first_sparse(method: SparseAttention, site: Site, tokens: int) -> int | None:
    """About how many tokens, more than `tokens` at which it reads all, a method leaves out keys at; None: not found."""
    low, high = tokens, min(2 * tokens, LONGEST)
    while low < LONGEST and reads_all(method, site, high):
        low, high = high, min(2 * high, LONGEST)
    if low >= LONGEST:
        return None
    while high - low > max(STEP, low // STEP):
        middle = (low + high) // 2
        low, high = (middle, high) if reads_all(method, site, middle) else (low, middle)
    return high


def _heads(site: Site, tokens: int, drawn: int) -> Heads:
    """One key head and its queries, [1, h, tokens, D]: `drawn` different tokens, each in a run of its own."""
    generator = torch.Generator().manual_seed(tokens)
    own = torch.arange(tokens) * drawn // tokens
    each = torch.randn(1, 1, drawn, site.head_dim, generator=generator)
    keys = torch.nn.functional.normalize(each, dim=-1)[:, :, own] * (1.0 if drawn == tokens else 1e3)
    queries = keys.expand(-1, site.heads // site.kv_heads, -1, -1)
    window = window_of(site) or 0
    return Heads(queries, keys, keys, None, site.scale, site.hides_later, site.softcap, 0, 1, window=window)


@torch.no_grad()
def _reads_all(method: SparseAttention, heads: Heads) -> bool:
    (found,) = held(heads, [method.index(heads)], every=max(1, heads.tokens**2 // PAIRS))
    return all(density == 1.0 for density in found.density)
