"""Transformer Engine, flash-attn and Apex without a GPU: stand-ins that take what the published
sources take, called by this project and by Megatron-Core's own wrappers, and compute the same."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gmai.runtime.processes import in_processes
from tests.model.engine_runs import RUNS, run_all
from tests.model.published import SIGNATURES, signature
from tests.parallel.cases import Case, LoraConfig, Outcome, run_cases
from tests.parallel.world import MOST_SECONDS, run_world

pytestmark = pytest.mark.worlds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    @cache
    def run() -> Path:
        made = tmp_path_factory.mktemp("stand-ins")
        lora = LoraConfig(llm_use_lora=True, vit_use_lora=True)
        references = [Case("plain"), Case("plain-lora", lora=lora)]
        run_world(1, run_cases, references, made)
        in_processes(2, MOST_SECONDS, run_all, made)  # before Megatron-Core is imported
        return made

    return run


# The stand-ins have what the pinned Megatron-Core imports of the packages; others import more.
@pytest.mark.pinned
@pytest.mark.parametrize("name", RUNS)
def test_layers_by_a_gpu_package_train_as_plain_ones(name: str, folder: Callable[[], Path]) -> None:
    load = lambda of: Outcome(**torch.load(folder() / f"{of}.pt"))  # noqa: E731
    found, expected = load(name), load("plain-lora" if "lora" in name else "plain")
    assert found.drifted == []
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    assert found.weights.keys() == expected.weights.keys()
    for weight, value in expected.weights.items():
        torch.testing.assert_close(found.weights[weight], value, rtol=1e-4, atol=1e-5, msg=weight)


@pytest.mark.pinned
def test_every_call_fits_every_published_version(folder: Callable[[], Path]) -> None:
    calls: list[tuple[str, int, tuple[str, ...]]] = torch.load(folder() / "calls.pt")
    assert {name for name, _, _ in calls} == SIGNATURES.keys()
    for name, positional, keywords in set(calls):
        for version, parameters in SIGNATURES[name].items():
            try:
                signature(parameters).bind(*[0] * positional, **dict.fromkeys(keywords))
            except TypeError as error:
                pytest.fail(f"{name} {version}: {error}")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("flash_attn.flash_attn_varlen_func", {"is_causal": True}),
        ("transformer_engine.pytorch.RMSNorm", {"hidden": 8}),
        ("fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32", {"input_2d": 0}),
    ],
)
def test_a_wrong_name_does_not_fit(name: str, wrong: dict[str, Any]) -> None:
    (parameters,) = SIGNATURES[name].values()
    with pytest.raises(TypeError):
        signature(parameters).bind(**wrong)
