"""One probe decides what fills the layers' slots; forcing what cannot run is an error."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_gmai.runtime import implementation as probe
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.implementation import (
    APEX_EXTENSION,
    ATTENTIONS,
    PLAIN,
    choose_implementation,
    why_no_torch_varlen,
)

GPU = Device("cuda", torch.device("cuda", 0), "nccl", torch.bfloat16)
CPU = Device("cpu", torch.device("cpu"), "gloo", torch.float32)
PACKAGES = ("transformer_engine", "flash_attn", "torch_varlen", APEX_EXTENSION)


def machine(monkeypatch: pytest.MonkeyPatch, *packages: str, capability: int = 9) -> None:
    """A GPU with these packages."""
    reasons = {name: None if name in packages else "not installed" for name in PACKAGES}
    probes = {name: lambda reason=reason: reason for name, reason in reasons.items()}
    monkeypatch.setattr(probe, "_PROBES", probes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))


@pytest.mark.parametrize(
    ("packages", "capability", "layers", "attention", "fused"),
    [
        (PACKAGES, 9, "transformer_engine", "transformer_engine", True),
        (("transformer_engine",), 9, "transformer_engine", "transformer_engine", True),
        (("transformer_engine", "torch_varlen"), 8, "transformer_engine", "torch_varlen", True),
        (("transformer_engine", "flash_attn"), 8, "transformer_engine", "transformer_engine", True),
        (("flash_attn", "torch_varlen"), 9, "local", "flash_attn", False),
        (("torch_varlen", APEX_EXTENSION), 9, "local", "torch_varlen", True),
        ((), 9, "local", "sdpa", False),
        (PACKAGES, 7, "local", "sdpa", False),
    ],
)
def test_auto_takes_the_first_that_can_run(
    packages: tuple[str, ...],
    capability: int,
    layers: str,
    attention: str,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, *packages, capability=capability)
    found = choose_implementation(GPU)
    assert dataclasses.astuple(found)[:3] == (layers, attention, fused)


def test_local_does_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "transformer_engine", "torch_varlen")
    found = choose_implementation(GPU, "local")
    assert (found.layers, found.attention) == ("local", "torch_varlen")
    assert not found.fused_weight_gradient


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_attention_can_be_forced(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, *PACKAGES)
    assert choose_implementation(GPU, "local", attention).attention == attention


@pytest.mark.parametrize(
    ("device", "layers", "attention", "told"),
    [
        (GPU, "transformer_engine", "auto", "--transformer-impl transformer_engine: not installed"),
        (GPU, "auto", "flash_attn", "--attention-backend flash_attn: not installed"),
        (CPU, "auto", "torch_varlen", "--attention-backend torch_varlen: there is no GPU"),
        (
            dataclasses.replace(GPU, dtype=torch.float32),
            *("transformer_engine", "auto"),
            "--transformer-impl transformer_engine: it needs --dtype bf16",
        ),
    ],
)
def test_forcing_what_cannot_run_is_told_with_the_remedy(
    device: Device, layers: str, attention: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    with pytest.raises(ValueError, match=f"^{told}.*or use --.* auto"):
        choose_implementation(device, layers, attention)


def test_what_was_chosen_is_told_with_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(choose_implementation(CPU)) == (
        "layers: local, attention: sdpa, weight gradients: added afterwards "
        "(others: there is no GPU)"
    )
    machine(monkeypatch, "transformer_engine", "torch_varlen")
    assert str(choose_implementation(GPU)) == (
        "layers: transformer_engine, attention: transformer_engine, weight gradients: added by "
        "their product (flash_attn: not installed)"
    )


def test_on_a_cpu_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dict.fromkeys(PACKAGES, lambda: pytest.fail("probed"))
    monkeypatch.setattr(probe, "_PROBES", broken)
    found = choose_implementation(CPU)
    assert dataclasses.replace(found, absent=()) == PLAIN


def test_a_package_built_for_another_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(probe.importlib, "import_module", fail)
    assert probe._why_not_importable("flash_attn") == "its import fails: undefined symbol: _ZN3c10"


def test_an_old_torch_has_no_attention_with_grouped_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert why_no_torch_varlen() is None or torch.__version__.startswith("2.10")
    old = SimpleNamespace(varlen_attn=lambda query, key, value, is_causal=False: None)
    monkeypatch.setattr(probe.importlib, "import_module", lambda name: old)
    assert why_no_torch_varlen() == f"not in torch {torch.__version__}"
