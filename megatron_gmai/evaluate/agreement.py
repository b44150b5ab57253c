"""The same inputs through Megatron's model and through transformers: logits and greedy tokens.

Shapes: L tokens of a sample, n images of side I, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.evaluate.generate import Decoding, Prompt, generate
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.model.vit import CLIP_MEAN, CLIP_STD
from megatron_gmai.weights import EMBEDDING

NEW_TOKENS = 16
_NEVER = -1  # as a stop id: every answer has full length


@dataclass(frozen=True)
class Ran:
    """What a model said to each sample."""

    logits: list[Tensor]  # fp32 [L, V]
    answers: list[list[int]]  # NEW_TOKENS greedy ids


def samples(model: ModelConfig) -> list[Prompt]:
    """Text alone, one image and two, as many as fit the positions that the model knows."""
    generator = torch.Generator().manual_seed(0)
    image, side = model.vision.tokens_per_image, model.vision.image_size
    made = []
    for count in (0, 1, 2):
        words = torch.randint(3, model.language.vocab_size, (12,), generator=generator)
        words[words == model.image_token_id] = 3
        images = torch.full((image,), model.image_token_id)
        parts = [words[:4], *[images, words[4:6]] * count, words[6:]]
        starts = torch.tensor([4 + number * (image + 2) for number in range(count)])
        pixels = torch.randint(
            0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8
        )
        prompt = Prompt(torch.cat(parts), starts.long(), pixels)
        if len(prompt.tokens) + NEW_TOKENS <= model.language.max_position_embeddings:
            made.append(prompt)
    return made


@torch.no_grad()
def run_megatron(model: GMAIVL, prompts: list[Prompt]) -> Ran:
    """A model in eval mode, in fp32 on CPUs; all ranks that share it get the same."""
    decoding, pp = Decoding(model), model.groups.pp
    logits = []
    for prompt in prompts:
        length = len(prompt.tokens)
        bounds = torch.tensor([0, length], dtype=torch.int32)
        segments = Segments.from_cu_seqlens(bounds, length, torch.device("cpu"))
        hidden = decoding.hidden_states(
            prompt.tokens, torch.arange(length), segments, prompt.pixels, prompt.image_starts
        )
        found = torch.empty(length, model.table[EMBEDDING].shape[0])
        if model.post_process:
            found = model.language_model.output_layer(hidden)[:, 0].float().contiguous()
        if pp.size() > 1:
            dist.broadcast(found, dist.get_global_rank(pp, pp.size() - 1), group=pp)
        logits.append(found)
    return Ran(logits, [generate(model, [one], _NEVER, NEW_TOKENS)[0] for one in prompts])


@torch.no_grad()
def run_transformers(folder: Path, prompts: list[Prompt]) -> Ran:
    """A folder of the transformers flavour, in fp32, offline and without remote code."""
    import transformers

    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, torch_dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    logits, answers = [], []
    for prompt in prompts:
        batch: dict[str, Any] = {"input_ids": prompt.tokens[None]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if len(prompt.pixels):
            batch["pixel_values"] = (prompt.pixels / 255 - mean) / std
        logits.append(model(**batch).logits[0])
        made = model.generate(
            **batch,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(made[0, len(prompt.tokens) :].tolist())
    return Ran(logits, answers)


def difference(one: Ran, two: Ran) -> tuple[float, int, int]:
    """Largest difference of logits, greedy tokens that agree, greedy tokens in all."""
    largest = max(
        float((ours - theirs).abs().max())
        for ours, theirs in zip(one.logits, two.logits, strict=True)
    )
    pairs = [
        (a, b)
        for ours, theirs in zip(one.answers, two.answers, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return largest, sum(a == b for a, b in pairs), len(pairs)
