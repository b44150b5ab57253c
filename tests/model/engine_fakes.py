"""Stand-ins for Transformer Engine, flash-attn and Apex's extension that compute in plain torch.

They take exactly what the published sources take (`published.py`), note every call, and are put
where Python looks for modules before Megatron-Core is imported, so that its own wrappers are built
on them.
"""

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention

from tests.model.published import SIGNATURES, signature

VERSION = "2.11"  # of Transformer Engine
CALLS: list[tuple[str, int, tuple[str, ...]]] = []  # name, positional arguments, keywords


def taken(name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their published names, noted. Raises TypeError for what does not fit."""
    table = SIGNATURES[name]
    version = max((v for v in table if _number(v) <= _number(VERSION)), default=min(table))
    bound = signature(table[version]).bind(*args, **kwargs)
    bound.apply_defaults()
    CALLS.append((name, len(args), tuple(kwargs)))
    return bound.arguments


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


class _Accumulate(torch.autograd.Function):
    """x · wᵀ whose backward pass adds the weight's gradient to `main_grad` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        weight.main_grad += dy.flatten(0, -2).T @ x.flatten(0, -2)
        weight.grad_added_to_main_grad = True
        return dy @ weight, torch.full_like(weight, torch.nan)  # must not be used


class Linear(torch.nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = taken("transformer_engine.pytorch.Linear", args, kwargs)
        self.mode, self.tp = given["parallel_mode"], given["tp_group"]
        self.sequence_parallel = given["sequence_parallel"] and self.tp.size() > 1
        self.fused, self.return_bias = given["fuse_wgrad_accumulation"], given["return_bias"]
        out, inside = given["out_features"], given["in_features"]
        rows = out // self.tp.size() if self.mode == "column" else out
        columns = inside // self.tp.size() if self.mode == "row" else inside
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=given["params_dtype"]))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = int(self.mode == "row")  # type: ignore[attr-defined]
        self.bias = None
        if given["bias"]:
            self.bias = torch.nn.Parameter(torch.empty(rows, dtype=given["params_dtype"]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.tensor_parallel import mappings

        given = taken("transformer_engine.pytorch.Linear.forward", args, kwargs)
        x = given["inp"]
        if self.mode == "column" and self.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x, group=self.tp)
        elif self.mode == "column":
            x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp)
        product = _Accumulate.apply if self.fused and self.weight.requires_grad else linear
        out = product(x, self.weight)
        if self.mode == "row" and self.sequence_parallel:
            out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp)
        elif self.mode == "row":
            out = mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp)
        if self.return_bias:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class RMSNorm(torch.nn.Module):
    name = "transformer_engine.pytorch.RMSNorm"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = taken(self.name, args, kwargs)
        self.eps, self.shape = given["eps"], (given["hidden_size"],)
        self.weight = torch.nn.Parameter(torch.empty(self.shape, dtype=given["params_dtype"]))
        self.weight.sequence_parallel = given["sequence_parallel"]  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.shape, self.weight, self.eps)


class LayerNorm(RMSNorm):
    name = "transformer_engine.pytorch.LayerNorm"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.empty_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class DotProductAttention(torch.nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = taken("transformer_engine.pytorch.DotProductAttention", args, kwargs)
        self.heads, self.groups = given["num_attention_heads"], given["num_gqa_groups"]
        self.mask, self.format = given["attn_mask_type"], given["qkv_format"]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = taken("transformer_engine.pytorch.DotProductAttention.forward", args, kwargs)
        q, k, v = (given[f"{name}_layer"] for name in ("query", "key", "value"))
        assert (q.size(1), k.size(1), v.size(1)) == (self.heads, self.groups, self.groups)
        assert (self.mask, self.format) == ("padding_causal", "thd")
        return varlen(q, k, v, given["cu_seqlens_q"]).flatten(1)


def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Causal attention in segments: [T, A, D], [T, G, D], [T, G, D] -> [T, A, D]."""
    assert bounds.dtype is torch.int32
    lengths = bounds.diff().tolist()
    split = (x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))
    out = []
    for one_q, one_k, one_v in zip(*split, strict=True):
        batch = (one_q[None], one_k[None], one_v[None])
        out.append(scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)[0])
    return torch.cat(out, dim=1).transpose(0, 1).contiguous()


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Tensor:
    given = taken("flash_attn.flash_attn_varlen_func", args, kwargs)
    assert given["causal"]
    return varlen(given["q"], given["k"], given["v"], given["cu_seqlens_q"])


def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Tensor:
    given = taken("transformer_engine.pytorch.attention.rope.apply_rotary_pos_emb", args, kwargs)
    t, freqs = given["t"], given["freqs"]  # [S, B, A, D], fp32 [S, 1, 1, D]
    assert given["tensor_format"] == "sbhd" and given["fused"] and not given["interleaved"]
    assert freqs.dtype is torch.float32 and freqs.shape == (t.size(0), 1, 1, t.size(3))
    left, right = t.chunk(2, dim=-1)
    return t * freqs.cos() + torch.cat([-right, left], dim=-1) * freqs.sin()


def wgrad_gemm_accum_fp32(*args: Any) -> None:
    given = taken("fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32", args, {})
    x, dy = given["input_2d"], given["d_output_2d"]
    given["d_weight"].addmm_(dy.T, x)


class FusedAdam(torch.optim.AdamW):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = taken("transformer_engine.pytorch.optimizers.FusedAdam", args, kwargs)
        known = ("lr", "betas", "eps", "weight_decay")
        super().__init__(
            given["params"], **{name: kwargs[name] for name in known if name in kwargs}
        )


def install() -> None:
    """Put the stand-ins where imports look. In a process of its own, before Megatron-Core."""
    assert "megatron.core" not in sys.modules
    nothing: dict[str, Callable] = {"FP8GlobalStateManager": object, "fp8_autocast": object}
    _module("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    _module("fused_weight_gradient_mlp_cuda", wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    _module("transformer_engine", __version__=f"{VERSION}.0", __path__=[])
    _module("transformer_engine.common", __path__=[])
    _module("transformer_engine.common.recipe", DelayedScaling=object)
    parts = (Linear, RMSNorm, LayerNorm, DotProductAttention)
    unused = dict.fromkeys(("LayerNormLinear", "GroupedLinear"), torch.nn.Module)
    names = {part.__name__: part for part in parts}
    _module("transformer_engine.pytorch", __path__=[], **names, **unused)
    recompute = {"activation_recompute_forward": object, "CudaRNGStatesTracker": object}
    _module("transformer_engine.pytorch.distributed", **recompute)
    _module("transformer_engine.pytorch.fp8", **nothing)
    # Megatron-Core imports these for what is not used here.
    _module("transformer_engine.pytorch.ops", __getattr__=_unused)
    _module("transformer_engine.pytorch.router", __getattr__=_unused)
    _module("transformer_engine.pytorch.tensor", __path__=[], QuantizedTensor=torch.nn.Module)
    _module("transformer_engine.pytorch.attention", __path__=[])
    _module("transformer_engine.pytorch.attention.rope", apply_rotary_pos_emb=apply_rotary_pos_emb)
    _module("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD)


def _unused(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return torch.nn.Module


def _module(name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
