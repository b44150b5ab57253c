"""The contenders of the training benchmark: this project, and transformers padded or packed.

Each runs in a process of its own, since the emulated `torch.cuda` here would slow transformers
down, and steps on the same samples when it is told to.
Legend: T tokens of a pack, S tokens of the longest sample of a batch, B samples of a batch.
"""

import dataclasses
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gmai.config import (
    CLIP_MEAN,
    CLIP_STD,
    IGNORE_INDEX,
    Config,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_gmai.convert.export_configs import transformers_config
from megatron_gmai.data.loading.batch import MicroBatch

MODEL = ModelConfig(
    vision=VisionConfig(
        num_layers=6,
        hidden_size=256,
        num_attention_heads=4,
        ffn_hidden_size=1024,
        image_size=112,
    ),
    language=LanguageConfig(
        num_layers=8,
        hidden_size=512,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=1408,
        vocab_size=8192,
        max_position_embeddings=2048,
    ),
    image_token_id=8191,
)
LENGTH = 2048  # tokens of a pack
SHORTEST, LONGEST = 16, 208  # tokens of a sample, uniform: the mean is 112
QUESTION = 8  # tokens of a sample before its image, none of them supervised
BATCH = 8  # samples that are padded to their longest
TRAIN = TrainConfig(lr=1e-4, wd=0.05, global_batch_size=1)


@dataclasses.dataclass(frozen=True)
class Sample:
    tokens: torch.Tensor  # int64 [length]
    labels: torch.Tensor  # int64 [length], in the place of the token itself
    pixels: torch.Tensor  # uint8 [0 or 1, 3, I, I]


def make_pack(seed: int) -> list[Sample]:
    """Samples drawn until the next one fits no more."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    left = LENGTH
    while left >= (length := draw.randint(SHORTEST, LONGEST)):
        samples.append(_sample(length, generator))
        left -= length
    return samples


def _sample(length: int, generator: torch.Generator) -> Sample:
    patches, size = MODEL.vision.tokens_per_image, MODEL.vision.image_size
    tokens = torch.randint(10, 8000, (length,), generator=generator)
    labels = tokens.clone()
    has_image = length > QUESTION + patches
    start = QUESTION + patches if has_image else QUESTION
    tokens[QUESTION:start] = MODEL.image_token_id
    labels[:start] = IGNORE_INDEX
    shape = (int(has_image), 3, size, size)
    return Sample(
        tokens, labels, torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    )


def supervised(samples: Sequence[Sample]) -> int:
    return sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in samples)


def micro_batch(samples: Sequence[Sample]) -> MicroBatch:
    """One pack of LENGTH tokens, as the loader makes it."""
    sizes = [len(sample.tokens) for sample in samples]
    filled = sum(sizes)
    tail = [LENGTH - filled] if filled < LENGTH else []
    bounds = torch.tensor([0, *sizes, *tail]).cumsum(0)
    labels = [torch.cat([s.labels[1:], s.labels.new_tensor([IGNORE_INDEX])]) for s in samples]
    padding = torch.zeros(LENGTH - filled, dtype=torch.int64)
    with_image = torch.tensor([len(sample.pixels) > 0 for sample in samples])
    return MicroBatch(
        tokens=torch.cat([*(s.tokens for s in samples), padding]),
        labels=torch.cat([*labels, padding + IGNORE_INDEX]),
        position_ids=torch.cat([torch.arange(size) for size in sizes + tail]),
        cu_seqlens=bounds.int(),
        max_seqlen=max(sizes + tail),
        pixel_values=torch.cat([s.pixels for s in samples]),
        image_starts=bounds[: len(samples)][with_image] + QUESTION,
        num_samples=len(samples),
        num_tokens=filled,
        keys=(),
    )


Step = Callable[[Sequence[Sample]], Callable[[], float]]


def ours(weights: Path, parallel: ParallelConfig | None = None, packs: int = 1) -> Step:
    """A step of this project on `packs` packs; samples of a step are those of all its packs."""
    from megatron_gmai.convert.huggingface import open_pretrained
    from megatron_gmai.model.gmai_vl import build_chunks
    from megatron_gmai.runtime.world import open_world
    from megatron_gmai.training.optimizer import build_optimizer, wrap_for_training
    from megatron_gmai.training.step import TrainStep
    from megatron_gmai.training.weights import fill

    config = Config(
        model=MODEL,
        data=DataConfig(max_length=LENGTH),
        parallel=parallel or ParallelConfig(),
        train=dataclasses.replace(TRAIN, global_batch_size=packs),
    )
    world = open_world(config)
    chunks = build_chunks(config, world)
    fill(chunks, open_pretrained(weights).weights)
    wrapped = wrap_for_training(chunks, config, world.groups)
    optimizer = build_optimizer(wrapped, config, world.device, world.groups)
    optimizer.reload_model_params()
    step = TrainStep(wrapped, optimizer, world, packs, LENGTH)

    def prepare(samples: Sequence[Sample]) -> Callable[[], float]:
        batch = micro_batch(samples)
        return lambda: step(iter([batch] * packs), TRAIN.lr).loss

    return prepare


def theirs(weights: Path, packed: bool) -> Step:
    """A step of transformers on batches of BATCH padded samples, or on one masked pack."""
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=TRAIN.wd), dict(params=plain, weight_decay=0.0)],
        lr=TRAIN.lr,
        betas=(TRAIN.adam_beta1, TRAIN.adam_beta2),
        eps=TRAIN.adam_eps,
    )

    def prepare(samples: Sequence[Sample]) -> Callable[[], float]:
        parts = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
        batches = [pack_masked(samples)] if packed else [pad(part) for part in parts]
        labels = supervised(samples)

        def step() -> float:
            optimizer.zero_grad()
            total = 0.0
            for batch in batches:
                loss = model(**batch, num_items_in_batch=labels, use_cache=False).loss
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.max_grad_norm)
            optimizer.step()
            return total

        return step

    return prepare


def pad(samples: Sequence[Sample]) -> dict[str, Any]:
    """[B, S], padded on the right."""
    join = torch.nn.utils.rnn.pad_sequence
    tokens = [sample.tokens for sample in samples]
    labels = [sample.labels for sample in samples]
    return dict(
        input_ids=join(tokens, batch_first=True),
        labels=join(labels, batch_first=True, padding_value=IGNORE_INDEX),
        attention_mask=join([torch.ones_like(t) for t in tokens], batch_first=True),
        pixel_values=_normalised(samples),
    )


def pack_masked(samples: Sequence[Sample]) -> dict[str, Any]:
    """[1, T] without padding, with a block-diagonal causal mask [1, 1, T, T]."""
    sizes = [len(sample.tokens) for sample in samples]
    visible = torch.block_diag(*(torch.ones(size, size).tril() for size in sizes)).bool()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return dict(
        input_ids=torch.cat([sample.tokens for sample in samples])[None],
        labels=torch.cat([sample.labels for sample in samples])[None],
        attention_mask=mask[None, None],
        position_ids=torch.cat([torch.arange(size) for size in sizes])[None],
        pixel_values=_normalised(samples),
    )


def _normalised(samples: Sequence[Sample]) -> torch.Tensor | None:
    pixels = torch.cat([sample.pixels for sample in samples])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels / 255 - mean) / std if len(pixels) else None


def save_start(folder: Path) -> None:
    """Random weights that all contenders start from, in transformers' format."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    tokens = dict(bos=None, eos=None, pad=None)
    config = LlavaConfig.from_dict(transformers_config(MODEL, "float32", tokens))
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def peak_flops(size: int = 1024, repeats: int = 8) -> tuple[float, float]:
    """Floating-point operations a second and a CPU second of this machine's matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    wall, busy = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    work = 2 * size**3 * repeats
    return work / (time.perf_counter() - wall), work / (time.process_time() - busy)
