"""What two folders of one model say: logits and greedy tokens."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import psutil
import torch.distributed as dist

from megatron_gmai.config import ModelConfig, ParallelConfig
from megatron_gmai.convert.compare import Side
from megatron_gmai.evaluate.agreement import (
    Ran,
    difference,
    run_megatron,
    run_transformers,
    samples,
)
from megatron_gmai.evaluate.generate import Prompt
from megatron_gmai.verification.ranks import HeldWeights, Ranks, training_world
from megatron_gmai.weights import parameters

_LOGITS_TOLERANCE = 1e-5  # of the largest logit, in fp32


def run_both(a: Side, b: Side, is_exact: bool, ranks: Ranks | None = None) -> dict[str, Any] | str:
    """Logits and greedy tokens of the two, in fp32 on the CPU: the transformers flavour through
    transformers, on the first rank alone, everything else through the training model.

    Returns why they were not run where that tells nothing, as with weights that are not the same,
    or is not possible here. All ranks get the same.
    """
    reason = [_reason_not_to_run(a.model, is_exact)]
    if ranks is not None:  # each sees another amount of free memory
        dist.broadcast_object_list(reason, src=0)
    if reason[0] is not None:
        return reason[0]
    prompts = samples(a.model)
    one, two = _run(a, prompts, ranks), _run(b, prompts, ranks)
    found = [_judged(one, two) if one and two else None]
    if ranks is not None:
        dist.broadcast_object_list(found, src=0)
    assert found[0] is not None  # the first rank runs both
    return found[0]


def _reason_not_to_run(model: ModelConfig, is_exact: bool) -> str | None:
    if not is_exact:
        return "not run: the weights differ, or one side was cast"
    if find_spec("transformers") is None:
        return "not run: transformers is not installed"
    needed = 6 * parameters(model)  # fp32, and room to work
    if needed > psutil.virtual_memory().available:
        return f"not run: it takes {needed / 1e9:.0f} GB of memory"
    return None


def _run(side: Side, prompts: list[Prompt], ranks: Ranks | None) -> Ran | None:
    if side.kind == "transformers":
        is_elsewhere = ranks is not None and not ranks.world.is_first_rank
        return None if is_elsewhere else run_transformers(side.path, prompts)
    if isinstance(side.weights, HeldWeights):
        return run_megatron(side.weights.model, prompts)
    world: AbstractContextManager[Ranks] = (
        nullcontext(ranks) if ranks else training_world(side.model, ParallelConfig())
    )
    with world as opened:
        return run_megatron(opened.model(side.weights), prompts)


def _judged(one: Ran, two: Ran) -> dict[str, Any]:
    largest, agreeing, tokens = difference(one, two)
    scale = max(1.0, *(float(logits.abs().max()) for logits in one.logits))
    return {
        "samples": len(one.logits),
        "logits_difference": largest,
        "largest_logit": scale,
        "logits_tolerance": _LOGITS_TOLERANCE * scale,
        "greedy_tokens_agreeing": f"{agreeing} of {tokens}",
        "same": largest <= _LOGITS_TOLERANCE * scale and agreeing == tokens,
    }


def ran_in_words(ran: dict[str, Any]) -> str:
    """What `run_both` found, as a line for a terminal."""
    return (
        f"run on {ran['samples']} samples: logits differ by {ran['logits_difference']:.2g} "
        f"({ran['logits_tolerance']:.2g} is allowed), "
        f"{ran['greedy_tokens_agreeing']} greedy tokens agree"
    )
