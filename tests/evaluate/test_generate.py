"""Batched generation with a cache says what whole forward passes say, one prompt at a time."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_gmai.config import ParallelConfig
from megatron_gmai.evaluate.generate import Prompt, generate
from megatron_gmai.evaluate.sampling import Sampling
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.gmai_vl import GMAIVL
from tests.evaluate.models import build
from tests.parallel.batches import CONFIG, MODEL
from tests.parallel.cases import Processes
from tests.parallel.world import run_world

NEVER = -1  # as a stop token: all answers have full length
NEW = 9


def prompt(seed: int, length: int, *image_starts: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 90, (length,), generator=generator)
    for start in image_starts:
        tokens[start : start + MODEL.vision.tokens_per_image] = MODEL.image_token_id
    pixels = torch.randint(
        0, 256, (len(image_starts), 3, 28, 28), generator=generator, dtype=torch.uint8
    )
    return Prompt(tokens, torch.tensor(image_starts, dtype=torch.int64), pixels)


# Text only, one image, two images, of unequal lengths; the third begins with an image.
PROMPTS = [prompt(1, 12), prompt(2, 25, 3), prompt(3, 17, 0, 9), prompt(4, 5), prompt(5, 30, 20)]


@torch.no_grad()
def by_whole_passes(model: GMAIVL, one: Prompt, new_tokens: int) -> list[int]:
    """The answer by running all tokens so far, as in training, for each new one."""
    tokens = one.tokens
    for _ in range(new_tokens):
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
        segments = Segments.from_cu_seqlens(bounds, len(tokens), torch.device("cpu"))
        embeddings = model.language_model.embed(tokens[None])
        embeddings = model.merge(embeddings, model.encode(one.pixels), one.image_starts)
        hidden = model.language_model(embeddings, torch.arange(len(tokens)), segments)
        chosen = model.language_model.output_layer(hidden[-1:])[0, 0].argmax()
        tokens = torch.cat([tokens, chosen[None]])
    return tokens[len(one.tokens) :].tolist()


@pytest.fixture
def model(alone: Processes) -> GMAIVL:
    return build(alone)


def test_a_batch_with_a_cache_answers_as_whole_passes_do_one_by_one(model: GMAIVL) -> None:
    expected = [by_whole_passes(model, one, NEW) for one in PROMPTS]
    assert len({token for answer in expected for token in answer}) > 10
    assert generate(model, PROMPTS, NEVER, NEW) == expected


def test_a_batch_of_text_alone_needs_no_image(model: GMAIVL) -> None:
    texts = [PROMPTS[0], PROMPTS[3]]
    expected = [by_whole_passes(model, one, NEW) for one in texts]
    assert generate(model, texts, NEVER, NEW) == expected


def test_answers_depend_on_the_image(model: GMAIVL) -> None:
    seen = PROMPTS[1]
    other = dataclasses.replace(seen, pixels=255 - seen.pixels)
    assert generate(model, [seen], NEVER, NEW) != generate(model, [other], NEVER, NEW)


def test_an_answer_ends_before_the_stop_token_and_the_others_go_on(model: GMAIVL) -> None:
    whole = generate(model, PROMPTS, NEVER, NEW)
    stop = next(token for token in whole[0][1:] if token not in whole[1])
    answers = generate(model, PROMPTS, stop, NEW)
    assert answers[0] == whole[0][: whole[0].index(stop)]
    assert answers[1] == whole[1]


def test_nothing_is_said_where_the_stop_token_comes_first(model: GMAIVL) -> None:
    first = generate(model, PROMPTS[:1], NEVER, 1)[0][0]
    assert generate(model, PROMPTS[:1], first, NEW) == [[]]


def test_what_is_drawn_does_not_depend_on_the_batch(model: GMAIVL) -> None:
    together = generate(model, PROMPTS, NEVER, NEW, HOT)
    assert together != generate(model, PROMPTS, NEVER, NEW)
    for one, sampling, answer in zip(PROMPTS, HOT, together, strict=True):
        assert generate(model, [one], NEVER, NEW, [sampling]) == [answer]


HOT = [Sampling(1.0, 0.9, seed).of_question("q") for seed in range(len(PROMPTS))]
LAYOUTS = {"tp2-pp2": (2, 2), "pp2": (1, 2), "tp2": (2, 1)}  # of four ranks; others are copies


def both_ways(model: GMAIVL) -> list[list[list[int]]]:
    """Greedy answers, and drawn ones."""
    return [generate(model, PROMPTS, NEVER, NEW, sampling) for sampling in (None, HOT)]


def write_answers(folder: Path) -> None:
    """What each rank of each layout says, one file a rank."""
    world = Processes()
    for name, (tp, pp) in LAYOUTS.items():
        parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        model = build(world, dataclasses.replace(CONFIG, parallel=parallel))
        torch.save(both_ways(model), folder / f"{name}-{dist.get_rank()}.pt")


def test_all_layouts_answer_as_one_process_does(model: GMAIVL, tmp_path: Path) -> None:
    run_world(4, write_answers, tmp_path)
    said = [torch.load(tmp_path / f"{name}-{rank}.pt") for name in LAYOUTS for rank in range(4)]
    assert said == [both_ways(model)] * 12
