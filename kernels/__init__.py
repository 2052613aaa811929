"""tamis.kernels: one file per op.  Importing the package registers every op with torch (`torch.ops.tamis.*`)."""

if __name__ != "tamis.kernels":
    raise ImportError("import tamis.kernels, not kernels: a second copy would register every op twice")

from . import (
    attention,
    attention_statistics,
    bipartite_match,
    hash_scores,
    reduce_tokens,
    restore_tokens,
    select_tokens,
    token_count,
)

__all__ = [
    "attention",
    "attention_statistics",
    "bipartite_match",
    "hash_scores",
    "reduce_tokens",
    "restore_tokens",
    "select_tokens",
    "token_count",
]
