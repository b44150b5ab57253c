"""Both losses on two real tensor-parallel ranks, over gloo, equal the unsharded ones."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numerics import assert_close, grad, leaf

from gmai_kernels import linear_cross_entropy, vocab_parallel_cross_entropy
from megatron_gmai.runtime.processes import free_port

WORLD, TOKENS, HIDDEN, VOCAB_SIZE, HELD = 2, 12, 32, 101, 64


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, H], weight [2 * HELD, H] padded past the vocabulary, labels."""
    torch.manual_seed(0)
    labels = torch.randint(0, VOCAB_SIZE, (TOKENS,))
    labels[::3] = -100
    return torch.randn(TOKENS, HIDDEN), torch.randn(WORLD * HELD, HIDDEN), labels


def all_gather(own: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(parts, own)
    return torch.stack(parts)


def all_reduce(gradient: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(gradient)
    return gradient


def reduce_scatter(gradient: torch.Tensor) -> torch.Tensor:
    return all_reduce(gradient).chunk(WORLD)[dist.get_rank()]


def rank_main(rank: int, port: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    hidden, weight, labels = inputs()
    full_hidden, full_weight = leaf(hidden), leaf(weight)
    expected = linear_cross_entropy(full_hidden, full_weight, labels, vocab_size=VOCAB_SIZE)
    expected.mean().backward()
    own_rows = slice(rank * HELD, (rank + 1) * HELD)
    own_tokens = slice(rank * TOKENS // WORLD, (rank + 1) * TOKENS // WORLD)
    split = {"vocab_start": rank * HELD, "vocab_size": VOCAB_SIZE, "all_gather": all_gather}

    logits = leaf((hidden @ weight.T)[:, own_rows])
    loss = vocab_parallel_cross_entropy(logits, labels, **split)
    assert_close(loss, expected, 2e-6, "vocabulary-parallel loss")

    for tokens, gather, reduce in (
        (slice(None), None, all_reduce),
        (own_tokens, lambda part: all_gather(part).flatten(0, 1), reduce_scatter),
    ):
        local, part = leaf(hidden[tokens]), leaf(weight[own_rows])
        loss = linear_cross_entropy(
            local,
            part,
            labels,
            **split,
            reduce_hidden_grad=reduce,
            gather_hidden=gather,
            chunk_size=5,
        )
        loss.mean().backward()
        assert_close(loss, expected, 2e-6, "loss")
        assert_close(grad(local), grad(full_hidden)[tokens], 2e-6, "dhidden")
        assert_close(grad(part), grad(full_weight)[own_rows], 2e-6, "dweight")
    dist.destroy_process_group()


def test_two_ranks_equal_one():
    mp.spawn(rank_main, args=(free_port(),), nprocs=WORLD)
