"""Vocabulary-parallel cross-entropy agrees with float64, whole, in slices and in place."""

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    TOLERANCE,
    as_ranks,
    assert_close,
    every_dtype,
    every_implementation,
    grad,
    leaf,
    running,
)

from gmai_kernels import use_implementation, vocab_parallel_cross_entropy

LOSS = 2e-6  # the loss is fp32 whatever the dtype of the logits


def inputs(tokens: int, columns: int, vocab_size: int, dtype: torch.dtype):
    """Logits with wide values, labels of which every fourth is ignored, incoming gradients."""
    torch.manual_seed(tokens + columns)
    labels = torch.randint(0, vocab_size, (tokens,))
    labels[1::4] = -100
    return (5 * torch.randn(tokens, columns)).to(dtype), labels, torch.rand(tokens) + 0.5


def in_float64(logits, labels, dloss, vocab_size):
    """Loss and logit gradient by torch's own cross-entropy on the true columns."""
    logits = leaf(logits, torch.float64)
    loss = F.cross_entropy(logits[:, :vocab_size], labels, reduction="none", ignore_index=-100)
    loss.backward(dloss.double())
    return loss, grad(logits)


@every_implementation
@every_dtype
@pytest.mark.parametrize(
    ("tokens", "columns", "vocab_size"),
    # one row, less than a step, a step of the kernel, one column more, odd, padded twice
    [(1, 7, 7), (5, 1000, 1000), (3, 4096, 4096), (3, 4097, 4097), (3, 92553, 92553)]
    + [(6, 5120, 5003), (4, 92672, 92553)],
)
def test_loss_and_gradient(implementation, dtype, tokens, columns, vocab_size):
    logits, labels, dloss = inputs(tokens, columns, vocab_size, dtype)
    reference_loss, reference_grad = in_float64(logits, labels, dloss, vocab_size)
    logits = leaf(logits)
    with running(implementation):
        loss = vocab_parallel_cross_entropy(logits, labels, vocab_size=vocab_size)
        loss.backward(dloss)
    assert loss.dtype == torch.float32
    assert_close(loss, reference_loss, LOSS, "loss")
    assert_close(grad(logits), reference_grad, TOLERANCE[dtype], "dlogits")


@every_implementation
@every_dtype
@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
def test_slices_equal_the_whole(implementation, dtype, ranks):
    vocab_size, held = 1003, 384  # four slices hold 1536: the last is all padding
    logits, labels, dloss = inputs(9, held * ranks, min(vocab_size, held * ranks), dtype)
    size = min(vocab_size, held * ranks)
    reference_loss, reference_grad = in_float64(logits, labels, dloss, size)

    def rank_run(rank, all_gather):
        part = leaf(logits[:, rank * held : (rank + 1) * held])
        with running(implementation):
            loss = vocab_parallel_cross_entropy(
                part, labels, vocab_start=rank * held, vocab_size=size, all_gather=all_gather
            )
            loss.backward(dloss)
        return loss, grad(part)

    results = as_ranks(ranks, rank_run)
    for loss, _ in results:
        assert_close(loss, reference_loss, LOSS, "loss")
    gradient = torch.cat([found for _, found in results], dim=1)
    assert_close(gradient, reference_grad, TOLERANCE[dtype], "dlogits")


@every_implementation
def test_padded_columns_never_count(implementation):
    logits, labels, dloss = inputs(4, 128, 100, torch.float32)
    results = []
    for padding in (0.0, 1e4, torch.inf, torch.nan):
        padded = leaf(logits)
        padded.data[:, 100:] = padding
        with running(implementation):
            loss = vocab_parallel_cross_entropy(padded, labels, vocab_size=100)
            loss.backward(dloss)
        results.append((loss, grad(padded)))
        assert not grad(padded)[:, 100:].any()
    assert all(torch.equal(loss, results[0][0]) for loss, _ in results)
    assert all(torch.equal(found, results[0][1]) for _, found in results)


@every_implementation
def test_ignored_rows_have_no_loss_and_no_gradient(implementation):
    logits = leaf(torch.randn(3, 50))
    with running(implementation):
        loss = vocab_parallel_cross_entropy(logits, torch.full((3,), 7), ignore_index=7)
        loss.sum().backward()
    assert not loss.any() and not grad(logits).any()


@every_implementation
def test_large_logits_do_not_overflow(implementation):
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4], [-torch.inf, 0.0, 1.0]])
    with running(implementation):
        loss = vocab_parallel_cross_entropy(logits, torch.tensor([1, 0, 1]))
    assert_close(loss, torch.tensor([6e4, 1.0986123, 1.3132617]), LOSS, "loss")


@every_implementation
@pytest.mark.parametrize("stride", (1003, 1008))
def test_the_gradient_lies_where_the_logits_lay(implementation, stride):
    rows = torch.randn(5, stride)[:, :1003]  # rows with and without a gap behind them
    labels = torch.arange(5)
    _, reference = in_float64(rows, labels, torch.ones(5), 1003)
    logits = rows.detach().requires_grad_()
    with running(implementation):
        vocab_parallel_cross_entropy(logits, labels).sum().backward()
    assert torch.equal(rows, grad(logits))
    assert_close(rows, reference, 2e-6, "dlogits")


@every_implementation
def test_a_second_backward_pass_is_refused(implementation):
    logits = leaf(torch.randn(3, 50))
    with running(implementation):
        loss = vocab_parallel_cross_entropy(logits, torch.arange(3)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_implementation
def test_the_forward_pass_alone_leaves_the_logits(implementation):
    logits = torch.randn(3, 50)
    before = logits.clone()
    with running(implementation):
        vocab_parallel_cross_entropy(logits, torch.arange(3))
    assert torch.equal(logits, before)


@every_implementation
def test_two_runs_agree_bitwise(implementation):
    results = []
    for _ in range(2):
        logits, labels, dloss = inputs(8, 5003, 5003, torch.bfloat16)
        logits = leaf(logits)
        with running(implementation):
            loss = vocab_parallel_cross_entropy(logits, labels)
            loss.backward(dloss)
        results.append((loss, grad(logits)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_the_reference_has_the_gradient_of_the_formula():
    logits, labels, dloss = inputs(6, 60, 55, torch.float64)
    logits = leaf(logits)

    def loss(x):
        return vocab_parallel_cross_entropy(x, labels, vocab_size=55)

    with use_implementation("reference"):
        assert torch.autograd.gradcheck(loss, logits)


X, L = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)


@every_implementation
@pytest.mark.parametrize(
    ("argument", "logits", "labels", "keywords"),
    [
        ("logits: dtype", X.double(), L, {}),
        ("logits: shape", X[0], L, {}),
        ("logits: shape", X[:0], L[:0], {}),
        ("logits: strides", torch.zeros(8, 3).T, L, {}),
        ("labels: dtype", X, L.int(), {}),
        ("labels: shape", X, L[:2], {}),
        ("labels: device", X, L.to("meta"), {}),
        ("labels: value 8", X, L + 8, {}),
        ("labels: value -1", X, L - 1, {}),
        ("labels: value 7", X, L + 7, {"vocab_size": 7}),
        ("vocab_start", X, L, {"vocab_start": -1, "vocab_size": 8}),
        ("vocab_size", X, L, {"vocab_size": 0}),
        ("vocab_size", X, L, {"vocab_start": 8}),
        ("vocab_size", X, L, {"all_gather": lambda stats: stats[None]}),
        ("all_gather", X, L, {"vocab_size": 16}),
        ("all_gather", X, L, {"vocab_size": 16, "all_gather": lambda stats: stats}),
    ],
)
def test_wrong_input_is_named(implementation, argument, logits, labels, keywords):
    with running(implementation), pytest.raises(ValueError, match=f"^{argument}"):
        vocab_parallel_cross_entropy(logits, labels, **keywords)
