"""List the parameters of the library functions that our adapters call, as released.

Read from the source distributions and wheels of the versions in VERSIONS, which are the newest
that were out on 2026-11-28. flash_attn_3 has no distribution of its own: it is `hopper/` in the
source distribution of flash-attn. `*` begins the parameters that must be named, `=` marks those
with a default.
"""

from __future__ import annotations

import inspect

VERSIONS = {
    "flash_attn": "2.8.3.post2",
    "flash_attn_3": "3.0.0.b1",
    "xfuser": "0.7.0",
    "yunchang": "0.6.4",
}
PARAMETERS = {
    "flash_attn.flash_attn_interface._flash_attn_forward": (
        "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap"
        " alibi_slopes return_softmax"
    ),
    "flash_attn.flash_attn_interface._flash_attn_backward": (
        "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left"
        " window_size_right softcap alibi_slopes deterministic rng_state="
    ),
    "torch.ops.flash_attn_3.fwd": (
        "q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k"
        " max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin"
        " seqlens_rotary q_descale k_descale v_descale softmax_scale causal window_size_left"
        " window_size_right attention_chunk softcap rotary_interleaved scheduler_metadata"
        " num_splits pack_gqa sm_margin"
    ),
    "torch.ops.flash_attn_3.bwd": (
        "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k seqused_q seqused_k"
        " max_seqlen_q max_seqlen_k softmax_scale causal window_size_left window_size_right"
        " softcap deterministic sm_margin"
    ),
    "yunchang.set_seq_parallel_pg": (
        "sp_ulysses_degree sp_ring_degree rank world_size use_ulysses_low="
    ),
    "xfuser.core.long_ctx_attention.xFuserLongContextAttention": (
        "scatter_idx= gather_idx= ring_impl_type= use_pack_qkv= use_kv_cache= use_sync= attn_type="
        " attn_processor= q_descale= k_descale= v_descale="
    ),
    "xfuser.core.long_ctx_attention.xFuserLongContextAttention.forward": (
        "attn query key value * joint_tensor_query= joint_tensor_key= joint_tensor_value="
        " dropout_p= softmax_scale= causal= window_size= alibi_slopes= deterministic="
        " return_attn_probs= joint_strategy="
    ),
}


def signature(name: str) -> inspect.Signature:
    """Return the signature of a function in PARAMETERS."""
    found, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for word in PARAMETERS[name].split():
        if word == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        default = None if word.endswith("=") else inspect.Parameter.empty
        found.append(inspect.Parameter(word.rstrip("="), kind, default=default))
    return inspect.Signature(found)
