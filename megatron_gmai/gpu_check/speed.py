"""Speed: attention over packs by each implementation, and training steps of a large model."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_gmai.config import Config, RunConfig
from megatron_gmai.dry_run.packs import made_up
from megatron_gmai.gpu_check.finding import Finding, failed
from megatron_gmai.gpu_check.steps import fill_on_device, join, replaced, trainer, world_for
from megatron_gmai.model.attention import ATTENTIONS, Segments
from megatron_gmai.model.transformer import language_transformer_config
from megatron_gmai.planner.cost import load_of, step_flops, with_vocabulary
from megatron_gmai.planner.hardware import GPUS, device_peak
from megatron_gmai.planner.search import search
from megatron_gmai.runtime.device import Device, device_name
from megatron_gmai.runtime.implementation import Implementation, choose_implementation, find_absent
from megatron_gmai.runtime.processes import in_processes

WARM_UP, TIMED = 2, 4  # steps
LAYERS = (32, 28, 24, 20, 16, 12, 8, 4, 2)  # of models as wide as gmai-vl-7b
PER_GPU_STEP = 16  # packs


def attention_times(config: Config, device: str, segments: int) -> list[Finding]:
    """Milliseconds of a forward and backward pass over a pack of equal segments."""
    chosen = join(device, "auto")
    absent = find_absent(chosen)
    found = []
    for name, kind in ATTENTIONS.items():
        if name in absent:
            continue
        world = world_for(config, chosen, Implementation(attention=name))
        settings = language_transformer_config(config, world.chunks[0], world)
        module = kind(settings, 1, AttnMaskType.causal, "self", world.groups.mcore)
        seconds = _seconds(_attention_step(module, config, chosen, segments), chosen)
        label = f"{config.data.max_length:,} tokens, {segments} segments: {name}"
        found.append(Finding("attention", label, 1e3 * seconds, "ms"))
    return found


def _attention_step(
    module: torch.nn.Module, config: Config, device: Device, segments: int
) -> Callable[[], object]:
    language, length = config.model.language, config.data.max_length
    head = language.hidden_size // language.num_attention_heads
    bounds = torch.arange(segments + 1, dtype=torch.int32) * (length // segments)
    where = Segments.from_cu_seqlens(bounds, length // segments, device.torch_device)
    counts = (language.num_attention_heads, *[language.num_query_groups] * 2)
    qkv = [
        torch.randn(int(bounds[-1]), 1, n, head, dtype=device.dtype, device=device.torch_device)
        for n in counts
    ]
    for tensor in qkv:
        tensor.requires_grad_()

    def step() -> object:
        return torch.autograd.grad(module(*qkv, None, packed_seq_params=where).sum(), qkv)

    return step


def _seconds(step: Callable[[], object], device: Device) -> float:
    """Seconds of one call: the shortest of a few."""
    times = []
    for _ in range(WARM_UP + 3 * TIMED):
        began = time.perf_counter()
        step()
        if device.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[WARM_UP:])


def training_speed(config: Config, device: str, images: int) -> list[Finding]:
    """Tokens a second, share of the devices' peak, and peak memory of this world's steps."""
    chosen = join(device, "auto")
    implementation = choose_implementation(chosen)
    world = world_for(config, chosen, implementation)
    step, packs, lr = trainer(config, world, fill_on_device), made_up(config, images), 0.0
    for _ in range(WARM_UP):
        step(packs, lr)
    began = time.perf_counter()
    for _ in range(TIMED):
        result = step(packs, lr)  # its loss is read, so the device is done
    seconds = (time.perf_counter() - began) / TIMED
    label = f"{config.model.language.num_layers} decoder layers on {world.layout.world_size}"
    flops = step_flops(config, result.tokens, result.images, result.samples)
    peak = device_peak(device_name(chosen))
    found = [
        Finding("speed", f"{label}: tokens", result.tokens / seconds, "a second"),
        Finding("speed", f"{label}: step", seconds, "s", note=str(implementation)),
        Finding(
            "speed", f"{label}: model FLOPs", flops / seconds / 1e12, "TFLOP/s",
            note=f"loss {result.loss:.3f}",
        ),
    ]  # fmt: skip
    if peak is not None:
        mfu = flops / seconds / (peak * world.layout.world_size)
        found.append(Finding("speed", f"{label}: MFU", mfu, "of the peak"))
    if chosen.is_cuda:
        gib = torch.cuda.max_memory_allocated() / 2**30
        found.append(Finding("speed", f"{label}: peak memory", gib, "GiB"))
    return found


def largest(gpus: int, memory_gib: float) -> Iterator[Config]:
    """Models as wide as gmai-vl-7b, as deep as fits in training, each in its fastest layout; the
    deepest first."""
    whole = with_vocabulary(Config(run=RunConfig(dtype="bf16")))
    whole = replaced(whole, "train", global_batch_size=PER_GPU_STEP * gpus)
    gpu = dataclasses.replace(GPUS["h100-80gb"], memory_gib=memory_gib)
    for layers in LAYERS:
        language = dataclasses.replace(whole.model.language, num_layers=layers)
        config = dataclasses.replace(
            whole, model=dataclasses.replace(whole.model, language=language)
        )
        if plans := search(config, gpus, load_of(config, 3), gpu).plans:
            yield plans[0].config


def fastest_training(gpus: int, memory_gib: float, seconds: float = 100) -> Iterator[Finding]:
    """Speed of the largest model that trains; a prediction that was too bold is told."""
    for config in largest(gpus, memory_gib):
        try:
            yield from in_processes(gpus, seconds, training_speed, config, "cuda", 3)
            return
        except (TimeoutError, RuntimeError) as error:
            name = f"{config.model.language.num_layers} decoder layers"
            yield failed("speed", name, str(error).splitlines()[-1])
            if "out of memory" not in str(error).lower():
                return
