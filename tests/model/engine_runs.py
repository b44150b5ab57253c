"""Runs of parity cases on the stand-ins of GPU packages; imported in fresh processes only."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.model import engine_fakes

ENGINE = ("transformer_engine", "transformer_engine")
TENSOR: dict[str, Any] = {"tensor_model_parallel_size": 2}
# Name -> settings of the layout; layers and attention.
RUNS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "engine-tp2": ({**TENSOR, "sequence_parallel": True}, ENGINE),
    "engine-cp2-lora": ({"context_parallel_size": 2}, ENGINE),
    "apex-flash-tp2": (TENSOR, ("local", "flash_attn")),
}


def run_all(folder: Path) -> None:
    """Run each of RUNS on the stand-ins and write its outcome, and the calls of all, to files."""
    engine_fakes.install()
    from megatron.core import optimizer

    from megatron_gmai.config import LoraConfig, ParallelConfig
    from megatron_gmai.runtime.implementation import Implementation
    from megatron_gmai.runtime.world import World
    from tests.parallel.cases import Case, Config, Processes, run_case

    class OnStandIns(Processes):
        implementation = Implementation()

        def world(self, config: Config, dtype: str = "fp32") -> World:
            world = super().world(config, dtype)
            return dataclasses.replace(world, implementation=self.implementation)

    processes = OnStandIns()
    # On a CPU their optimizer is not used where they are installed: its kernels are for GPUs.
    assert optimizer.Adam is torch.optim.AdamW and optimizer.USING_PYTORCH_OPTIMIZER
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = engine_fakes.FusedAdam, False
    for name, (layout, (layers, attention)) in RUNS.items():
        processes.implementation = Implementation(layers, attention, fused_weight_gradient=True)
        parallel = ParallelConfig(
            **layout, use_distributed_optimizer=True, overlap_grad_reduce=True
        )
        lora = LoraConfig(llm_use_lora="lora" in name, vit_use_lora="lora" in name)
        one_image = (("vit_micro_batch_size", 1),)  # at once: the tower is recomputed
        outcome = run_case(Case(name, parallel, lora=lora, train=one_image), processes)
        if dist.get_rank() == 0:
            torch.save(vars(outcome), folder / f"{name}.pt")
    if dist.get_rank() == 0:
        torch.save(engine_fakes.CALLS, folder / "calls.pt")
    dist.barrier()
