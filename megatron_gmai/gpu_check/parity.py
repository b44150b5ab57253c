"""Training steps on the device against the same steps in one process on the CPU in fp32."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from megatron_gmai.config import Config, LoraConfig, ParallelConfig
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.gpu_check.finding import Finding, at_most, failed
from megatron_gmai.gpu_check.steps import join, own_packs, replaced, trainer, world_for
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.presets import preset
from megatron_gmai.runtime.implementation import choose_implementation
from megatron_gmai.runtime.processes import in_processes
from megatron_gmai.training.weights import fill

STEPS = 3
# Relative difference that is allowed of losses and of gradient norms. In bf16 each of some hundred
# roundings loses 2⁻⁹.
ALLOWED = {"fp32": (1e-4, 1e-3), "bf16": (2e-3, 2e-2)}
_ZERO: dict[str, Any] = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
_TENSOR: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@dataclass(frozen=True)
class Case:
    """A layout of so many processes, and what is trained."""

    name: str
    processes: int = 1
    parallel: ParallelConfig = ParallelConfig()
    train: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig = LoraConfig()

    def config(self) -> Config:
        config = replaced(small(), "train", **self.train)
        return dataclasses.replace(config, parallel=self.parallel, lora=self.lora)


CASES = (
    Case("phase 1", train={"freeze_vit": True, "freeze_llm": True}),
    Case("phase 2", train={"freeze_llm": True}),
    Case("phase 3"),
    Case("recomputed", train={"selective_recompute": 1.0, "vit_micro_batch_size": 1}),
    Case("adapters", lora=LoraConfig(llm_use_lora=True, vit_use_lora=True)),
    Case("TP 2, sequence parallel", 2, ParallelConfig(**_TENSOR)),
    Case("PP 2", 2, ParallelConfig(pipeline_model_parallel_size=2)),
    Case("CP 2", 2, ParallelConfig(context_parallel_size=2)),
    Case("DP 2, sharded, overlaps", 2, ParallelConfig(overlap_param_gather=True, **_ZERO)),
    Case("TP 2, PP 2", 4, ParallelConfig(pipeline_model_parallel_size=2, **_TENSOR, **_ZERO)),
)


def small() -> Config:
    """gmai-vl-tiny with short packs and a small vocabulary, four packs a step."""
    config = preset("gmai-vl-tiny")
    language = dataclasses.replace(config.model.language, vocab_size=500)
    model = dataclasses.replace(config.model, language=language, image_token_id=0)
    config = replaced(config, "data", max_length=160)
    config = replaced(config, "train", global_batch_size=4, adam_eps=1e-4)
    return dataclasses.replace(config, model=model)


class Steps(NamedTuple):
    """What the steps of a case gave."""

    losses: list[float]
    grad_norms: list[float]


def run_cases(cases: tuple[Case, ...], device: str, dtype: str) -> list[Steps]:
    """Run each case in this world of processes."""
    chosen = join(device, dtype)
    implementation = choose_implementation(chosen)
    found = []
    for case in cases:
        config = case.config()
        world = world_for(config, chosen, implementation)
        step = trainer(config, world, partial(fill_seeded, config=config))
        results = [step(own_packs(config, world, i), config.train.lr) for i in range(STEPS)]
        found.append(Steps([r.loss for r in results], [r.grad_norm for r in results]))
    return found


def fill_seeded(chunks: list[GMAIVL], config: Config) -> None:
    """The same weights in every layout."""
    seeded = SeededWeights(config.model, config.train.seed, config.lora)
    fill(chunks, seeded)
    fill(chunks, seeded, adapters=True)


def parity(
    device: str, processes: int, cases: tuple[Case, ...] = CASES, seconds: float = 90
) -> Iterator[Finding]:
    """Compare each case that `processes` devices can run, in fp32 and in bf16."""
    able = tuple(case for case in cases if case.processes <= processes)
    alone = tuple(dataclasses.replace(case, parallel=ParallelConfig()) for case in able)
    references = in_processes(1, 2 * seconds, run_cases, alone, "cpu", "fp32")
    expected = {case.name: steps for case, steps in zip(able, references, strict=True)}
    for dtype in ALLOWED:
        for size in sorted({case.processes for case in able}):
            chosen = tuple(case for case in able if case.processes == size)
            try:
                found = in_processes(size, seconds, run_cases, chosen, device, dtype)
            except (TimeoutError, RuntimeError) as error:
                reason = str(error).splitlines()[-1]
                yield failed("parity", f"{size} processes in {dtype}", reason)
                continue
            for case, steps in zip(chosen, found, strict=True):
                yield from compare(case.name, dtype, steps, expected[case.name])


def compare(name: str, dtype: str, found: Steps, expected: Steps) -> Iterator[Finding]:
    """The largest relative differences over the steps."""
    for what, allowed, ours, theirs in zip(
        ("loss", "gradient norm"), ALLOWED[dtype], found, expected, strict=True
    ):
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        yield at_most("parity", f"{name}, {dtype}: {what}", worst, "relative", allowed)
