"""What the GPU packages' published sources take: names of parameters by version, `=` marks a
default.

Read from the release tags of NVIDIA/TransformerEngine (2.9, 2.11, 2.14.1, 2.17.1, 2.18),
Dao-AILab/flash-attention (2.7.4.post1, 2.8.3) and NVIDIA/apex (25.09). A new version that is
supported gets a line here where it differs from the one before.
"""

from inspect import Parameter, Signature

_DPA_INIT = (
    "num_attention_heads kv_channels num_gqa_groups= attention_dropout= qkv_format= "
    "attn_mask_type= window_size= {}sequence_parallel= tp_size= get_rng_state_tracker= tp_group= "
    "layer_number= attention_type= cp_group= cp_global_ranks= cp_stream= cp_comm_type= "
    "softmax_scale= softmax_type= return_max_logit={}"
)
_DPA_FORWARD = (
    "query_layer key_layer value_layer attention_mask= qkv_format= cu_seqlens_q= cu_seqlens_kv= "
    "cu_seqlens_q_padded= cu_seqlens_kv_padded= max_seqlen_q= max_seqlen_kv= attn_mask_type= "
    "window_size= {}checkpoint_core_attention= core_attention_bias_type= core_attention_bias= "
    "alibi_slopes= fast_zero_fill= inference_params= pad_between_seqs= fp8_output={}"
)
_DIAGONAL = "bottom_right_diagonal= "
_SCORES = " score_mod= score_mod_bprop= score_mod_tensors= score_mod_bprop_tensors="
_NORM = (
    "normalized_shape= eps= sequence_parallel= params_dtype= zero_centered_gamma= hidden_size= "
    "device= dtype= sm_margin="  # the last three by way of **kwargs
)

# Called name -> version from which on it holds -> parameters.
SIGNATURES: dict[str, dict[str, str]] = {
    "transformer_engine.pytorch.Linear": {
        "2.9": "in_features out_features sequence_parallel= fuse_wgrad_accumulation= tp_group= "
        "tp_size= get_rng_state_tracker= rng_tracker_name= init_method= bias= return_bias= "
        "params_dtype= parallel_mode= parameters_split= device= ub_overlap_ag= ub_overlap_rs= "
        "ub_overlap_rs_dgrad= ub_bulk_dgrad= ub_bulk_wgrad= ub_name= delay_wgrad_compute= "
        "symmetric_ar_type= save_original_input= name="
    },
    "transformer_engine.pytorch.Linear.forward": {
        "2.9": "inp is_first_microbatch= fp8_output= fp8_grad="
    },
    "transformer_engine.pytorch.RMSNorm": {"2.9": _NORM},
    "transformer_engine.pytorch.LayerNorm": {"2.9": _NORM},
    "transformer_engine.pytorch.DotProductAttention": {
        "2.9": _DPA_INIT.format("", ""),
        "2.14": _DPA_INIT.format(_DIAGONAL, ""),
        "2.17": _DPA_INIT.format(_DIAGONAL, " name="),
    },
    "transformer_engine.pytorch.DotProductAttention.forward": {
        "2.9": _DPA_FORWARD.format("", ""),
        "2.11": _DPA_FORWARD.format("", " num_splits="),
        "2.14": _DPA_FORWARD.format(_DIAGONAL, " num_splits="),
        "2.17": _DPA_FORWARD.format(_DIAGONAL, " num_splits=" + _SCORES),
    },
    "transformer_engine.pytorch.attention.rope.apply_rotary_pos_emb": {
        "2.9": "t freqs tensor_format= start_positions= interleaved= fused= cu_seqlens= cp_size= "
        "cp_rank="
    },
    "transformer_engine.pytorch.optimizers.FusedAdam": {
        "2.9": "params lr= betas= eps= weight_decay= amsgrad= * bias_correction= adam_w_mode= "
        "capturable= master_weights= master_weight_dtype= exp_avg_dtype= exp_avg_sq_dtype= "
        "use_decoupled_grad= store_param_remainders= set_grad_none="
    },
    "flash_attn.flash_attn_varlen_func": {
        "2.7.4": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p= "
        "softmax_scale= causal= window_size= softcap= alibi_slopes= deterministic= "
        "return_attn_probs= block_table="
    },
    # Bound by pybind11 without names.
    "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32": {
        "25.09": "input_2d d_output_2d d_weight /"
    },
}


def signature(parameters: str) -> Signature:
    """The signature that a line of the table describes."""
    found: list[Parameter] = []
    keyword_only = False
    for word in parameters.split():
        if word == "/":
            found = [p.replace(kind=Parameter.POSITIONAL_ONLY) for p in found]
        elif word == "*":
            keyword_only = True
        else:
            kind = Parameter.KEYWORD_ONLY if keyword_only else Parameter.POSITIONAL_OR_KEYWORD
            default = None if word.endswith("=") else Parameter.empty
            found.append(Parameter(word.rstrip("="), kind, default=default))
    return Signature(found)
