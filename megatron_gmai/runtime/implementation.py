"""What fills the slots of the model's layers: the one place that asks which packages are there.

Of each slot the first that can run is taken; all but the last need a GPU and half precision.

- linears, norms, rotary: Transformer Engine; Megatron-Core's linears with this project's norms
- attention over packs: Transformer Engine, flash-attn, torch's varlen attention, a call a segment
- gradients of the language model's weights: added to their buffer by the product itself
  (Transformer Engine, or Apex's extension under Megatron-Core's linears); by an addition afterwards
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_gmai.runtime.device import Device

LAYERS = ("transformer_engine", "local")
ATTENTIONS = ("transformer_engine", "flash_attn", "torch_varlen", "sdpa")
APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True)
class Implementation:
    """What was chosen. `absent` says why something better was not: (package, reason)."""

    layers: str = "local"  # of LAYERS
    attention: str = "sdpa"  # of ATTENTIONS
    fused_weight_gradient: bool = False
    absent: tuple[tuple[str, str], ...] = ()

    @property
    def is_transformer_engine(self) -> bool:
        return self.layers == "transformer_engine"

    def __str__(self) -> str:
        gradients = "added by their product" if self.fused_weight_gradient else "added afterwards"
        chosen = (
            f"layers: {self.layers}, attention: {self.attention}, weight gradients: {gradients}"
        )
        reasons = "; ".join(f"{package}: {reason}" for package, reason in self.absent)
        return f"{chosen} ({reasons})" if reasons else chosen


PLAIN = Implementation()


def choose_implementation(
    device: Device, layers: str = "auto", attention: str = "auto"
) -> Implementation:
    """Resolve `--transformer-impl` and `--attention-backend` for this device.

    Raises ValueError where one is asked for that cannot run here.
    """
    absent = find_absent(device)
    if absent.get(layers):
        raise _cannot("--transformer-impl", layers, absent[layers])
    if layers == "auto":
        layers = _first(LAYERS, absent)
    reasons = dict(absent)
    reason = reasons.get("transformer_engine") or _no_engine_attention(device, reasons)
    if reason:
        reasons["transformer_engine"] = reason
    if reasons.get(attention):
        raise _cannot("--attention-backend", attention, reasons[attention])
    if attention == "auto":
        # "local" asks to do without Transformer Engine.
        known = ATTENTIONS if layers == "transformer_engine" else ATTENTIONS[1:]
        attention = _first(known, reasons)
    fused = layers == "transformer_engine" or APEX_EXTENSION not in absent
    return Implementation(layers, attention, fused, _worth_telling(absent))


def find_absent(device: Device) -> dict[str, str]:
    """What cannot run on this device -> why not."""
    names = (*ATTENTIONS[:-1], APEX_EXTENSION)
    if not device.is_cuda:
        return dict.fromkeys(names, "there is no GPU")
    if device.dtype is torch.float32:
        return dict.fromkeys(names, "it needs --dtype bf16")
    if (found := torch.cuda.get_device_capability(device.torch_device)) < (8, 0):
        return dict.fromkeys(names, f"the GPU has compute capability {found[0]}.{found[1]}, not 8")
    reasons = {name: _PROBES[name]() for name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def why_no_torch_varlen() -> str | None:
    """Why `torch.nn.attention.varlen` cannot be used; None where it can."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
        parameters = inspect.signature(module.varlen_attn).parameters
    except (ImportError, AttributeError):
        parameters = {}  # type: ignore[assignment]
    # torch 2.10's knows no grouped queries.
    if {"window_size", "enable_gqa"} <= parameters.keys():
        return None
    return f"not in torch {torch.__version__}"


def _why_no_transformer_engine() -> str | None:
    if reason := _why_not_importable("transformer_engine.pytorch"):
        return reason
    # A version that this Megatron-Core does not know fails to import there.
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    return None if extension.HAVE_TE else "this Megatron-Core cannot use its version"


def _why_not_importable(module: str) -> str | None:
    """An import, since a package built for another torch is found and yet fails."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return "not installed"
    except (ImportError, OSError) as error:
        return f"its import fails: {str(error).splitlines()[0]}"
    return None


_PROBES: dict[str, Callable[[], str | None]] = {
    "transformer_engine": _why_no_transformer_engine,
    "flash_attn": lambda: _why_not_importable("flash_attn"),
    "torch_varlen": why_no_torch_varlen,
    APEX_EXTENSION: lambda: _why_not_importable(APEX_EXTENSION),
}


def _no_engine_attention(device: Device, absent: dict[str, str]) -> str | None:
    """Its own kernels take packed sequences from Hopper on; before, it calls flash-attn."""
    if "transformer_engine" in absent or "flash_attn" not in absent:
        return None
    if torch.cuda.get_device_capability(device.torch_device) >= (9, 0):
        return None
    return "its attention over packs needs flash-attn on GPUs before Hopper"


def _first(names: tuple[str, ...], absent: dict[str, str]) -> str:
    return next(name for name in names if name not in absent)


def _worth_telling(absent: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """One reason for all where there is one; a missing extension only if something would use it."""
    if len(absent) == len(_PROBES) and len(set(absent.values())) == 1:
        return (("others", next(iter(absent.values()))),)
    with_engine = "transformer_engine" not in absent
    return tuple((k, v) for k, v in absent.items() if not (with_engine and k == APEX_EXTENSION))


def _cannot(flag: str, value: str, reason: str) -> ValueError:
    return ValueError(f"{flag} {value}: {reason}. Mend that (docs/gpu.md), or use {flag} auto.")
