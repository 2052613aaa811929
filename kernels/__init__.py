"""tamis.kernels: one file per op.  Importing the package registers every op with torch (`torch.ops.tamis.*`)."""

if __name__ == "tamis.kernels":
    from . import add_reduce_norm as add_reduce_norm
    from . import attention as attention
    from . import attention_lse as attention_lse
    from . import attention_received as attention_received
    from . import attention_statistics as attention_statistics
    from . import attention_with_lse as attention_with_lse
    from . import bipartite_match as bipartite_match
    from . import block_sparse_attention as block_sparse_attention
    from . import block_sparse_attention_with_lse as block_sparse_attention_with_lse
    from . import block_sparse_received as block_sparse_received
    from . import clustered_attention as clustered_attention
    from . import dequantize_linear as dequantize_linear
    from . import dynamic_quantize_linear as dynamic_quantize_linear
    from . import energy_match as energy_match
    from . import hash_scores as hash_scores
    from . import join_nearest as join_nearest
    from . import landmark_attention as landmark_attention
    from . import match_destinations as match_destinations
    from . import match_keys as match_keys
    from . import matmul_integer as matmul_integer
    from . import merge_tokens as merge_tokens
    from . import onnx_node as onnx_node
    from . import order_slots as order_slots
    from . import page_rank as page_rank
    from . import pick_tiles as pick_tiles
    from . import probe_chunks as probe_chunks
    from . import quantize_linear as quantize_linear
    from . import quantized_attention as quantized_attention
    from . import reduce_tokens as reduce_tokens
    from . import rescale_tokens as rescale_tokens
    from . import restore_tokens as restore_tokens
    from . import sample_tokens as sample_tokens
    from . import select_tokens as select_tokens
    from . import slash_tiles as slash_tiles
    from . import summary_attention as summary_attention
    from . import token_count as token_count
    from . import valid_slots as valid_slots
    from . import weighted_match as weighted_match
    from .gpu import register_for_gpus

    register_for_gpus()
else:
    # transformers imports whatever is called `kernels` to look for a version of the package of that name, so where the
    # checkout is on the path this folder must import quietly; whoever uses something of it gets the reason.
    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("import tamis.kernels, not kernels: a second copy would register every op twice")
