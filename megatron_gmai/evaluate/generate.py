"""Greedy generation for a batch of prompts, with Megatron's key-value cache.

Shapes: B prompts, S tokens of the longest, N images of all prompts, M new tokens at most, H hidden.
Prompts are padded on the left, so that all answers begin at the same place of the cache. Padding
shifts a prompt's positions, which rotary embeddings do not notice: only differences count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_gmai.model.gmai_vl import GMAIVL


@dataclass(frozen=True)
class Prompt:
    """Token ids up to where the answer begins, and the images that placeholders stand for."""

    tokens: Tensor  # int64 [L]
    image_starts: Tensor  # int64 [n], first placeholder of each image
    pixels: Tensor  # uint8 [n, 3, I, I]


@torch.no_grad()
def generate(
    model: GMAIVL, prompts: Sequence[Prompt], stop_id: int, pad_id: int, max_new_tokens: int
) -> list[list[int]]:
    """The most probable next token, again and again: ids of each answer, without `stop_id`.

    All tensor-parallel ranks call it with the same prompts and get the same answers. The model must
    hold every layer (one pipeline stage) and be in eval mode; the longest prompt and the answer
    together must not exceed the positions that it knows.
    """
    language = model.language_model
    device = next(model.parameters()).device
    tokens, real_keys, image_starts = _left_padded(prompts, pad_id, max_new_tokens)
    batch, prompt_length = tokens.shape
    context = StaticInferenceContext(batch, real_keys.size(1))
    rotary = language.rotary_for(torch.arange(real_keys.size(1), device=device))
    real_keys = real_keys.to(device)

    pixels = torch.cat([prompt.pixels for prompt in prompts]).to(device)
    embeddings = _embed(model, tokens.to(device), pixels, image_starts.to(device))  # [S, B, H]
    answers = torch.full((batch, max_new_tokens), stop_id, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        hidden = language.decoder(
            hidden_states=embeddings,
            attention_mask=real_keys,
            rotary_pos_emb=rotary,
            inference_context=context,
        )
        context.sequence_len_offset += embeddings.size(0)
        chosen = language.output_layer(hidden[-1:])[0].argmax(dim=-1)  # [B]
        answers[:, step] = chosen.masked_fill(finished, stop_id)
        finished |= chosen == stop_id
        if finished.all():
            break
        embeddings = language.embed(answers[:, step : step + 1])  # [1, B, H]
    return [_until(stop_id, ids) for ids in answers.tolist()]


def _left_padded(
    prompts: Sequence[Prompt], pad_id: int, max_new_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, S], real keys bool [B, S + M], image places [N] in the flat batch (B · S)."""
    length = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.full((len(prompts), length), pad_id)
    real_keys = torch.ones(len(prompts), length + max_new_tokens, dtype=torch.bool)
    starts = []
    for row, prompt in enumerate(prompts):
        padding = length - len(prompt.tokens)
        tokens[row, padding:] = prompt.tokens
        real_keys[row, :padding] = False
        starts.append(prompt.image_starts + row * length + padding)
    return tokens, real_keys, torch.cat(starts)


def _embed(model: GMAIVL, tokens: Tensor, pixels: Tensor, image_starts: Tensor) -> Tensor:
    """[B, S] tokens with the images in their places -> [S, B, H]."""
    flat = model.language_model.embed(tokens.reshape(1, -1))  # [B · S, 1, H]
    merged = model.merge(flat, model.encode(pixels), image_starts)
    return merged.view(*tokens.shape, -1).transpose(0, 1).contiguous()


def _until(stop_id: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(stop_id)] if stop_id in ids else ids
