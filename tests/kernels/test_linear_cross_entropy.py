"""The fused output layer and loss agree with float64, whatever the chunks, ranks and gradients."""

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

from gmai_kernels import linear_cross_entropy, use_implementation
from gmai_kernels.testing.disguise import looks_like_gpu

HIDDEN = 96


def inputs(tokens: int, rows: int, vocab_size: int, dtype: torch.dtype):
    """hidden [T, H], weight [V, H], labels of which every fifth is ignored."""
    torch.manual_seed(tokens * rows)
    labels = torch.randint(0, vocab_size, (tokens,))
    labels[2::5] = -100
    weight = 0.2 * torch.randn(rows, HIDDEN)
    return torch.randn(tokens, HIDDEN).to(dtype), weight.to(dtype), labels


def with_full_logits(hidden, weight, labels, dloss, vocab_size, dtype=torch.float64):
    """Loss, hidden gradient and weight gradient with full logits."""
    hidden, weight = leaf(hidden, dtype), leaf(weight, dtype)
    logits = (hidden @ weight.T)[:, :vocab_size]
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    loss.backward(dloss.to(loss.dtype))
    return loss.detach(), grad(hidden), grad(weight)


def assert_exact(found, hidden, weight, labels, dloss, vocab_size):
    """Fail unless loss and gradients keep the tolerance of the dtype."""
    reference = with_full_logits(hidden, weight, labels, dloss, vocab_size)
    for name, value, expected in zip(("loss", "dhidden", "dweight"), found, reference, strict=True):
        assert_close(value, expected, TOLERANCE[hidden.dtype], name)


def run(hidden, weight, labels, dloss, vocab_size, chunk):
    """Loss, hidden gradient and weight gradient of the fused op."""
    hidden, weight = leaf(hidden), leaf(weight)
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=vocab_size, chunk_size=chunk)
    loss.backward(dloss)
    assert loss.dtype == torch.float32
    assert grad(hidden).dtype == grad(weight).dtype == hidden.dtype
    return loss, grad(hidden), grad(weight)


every_shape = pytest.mark.parametrize(
    ("tokens", "rows", "vocab_size", "chunk"),
    # one token, one chunk, ragged chunks, one token a chunk, an odd vocabulary, padding
    [(1, 50, 50, None), (20, 1003, 1003, None), (33, 1003, 1003, 8), (6, 50, 50, 1)]
    + [(3, 92553, 92553, 2), (17, 1152, 1003, 16)],
)
FACTORS = {
    "power-of-two": lambda tokens: torch.full((tokens,), 0.5),
    "mean": lambda tokens: torch.full((tokens,), 1 / (tokens + 2)),
    "factor-per-token": lambda tokens: torch.rand(tokens) + 0.5,
}
every_factor = pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)


@every_implementation
@every_dtype
@every_shape
@every_factor
def test_loss_and_gradients(implementation, dtype, tokens, rows, vocab_size, chunk, factors):
    hidden, weight, labels = inputs(tokens, rows, vocab_size, dtype)
    arguments = hidden, weight, labels, factors(tokens), vocab_size
    with running(implementation):
        found = run(*arguments, chunk)
    assert_exact(found, *arguments)


@every_shape
@every_factor
def test_on_a_gpu_bfloat16_errs_no_more_than_full_logits(tokens, rows, vocab_size, chunk, factors):
    """A GPU's bfloat16 products read bfloat16, so logits and their gradient are rounded to it.

    Either alone can exceed the tolerance, with full logits too: these set the bar where they do.
    """
    hidden, weight, labels = inputs(tokens, rows, vocab_size, torch.bfloat16)
    arguments = hidden, weight, labels, factors(tokens), vocab_size
    with running("triton"), looks_like_gpu():
        found = run(*arguments, chunk)
    unfused = with_full_logits(*arguments, dtype=torch.bfloat16)
    reference = with_full_logits(*arguments)
    for name, value, plain, expected in zip(
        ("loss", "dhidden", "dweight"), found, unfused, reference, strict=True
    ):
        error = (plain.double() - expected).abs().max() / expected.abs().max()
        assert_close(value, expected, max(4e-3, 1.2 * error.item()), name)


@every_implementation
@every_dtype
@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
@pytest.mark.parametrize("sequence_parallel", (False, True), ids=("replicated", "sequence"))
def test_ranks_equal_the_whole(implementation, dtype, ranks, sequence_parallel):
    tokens, held = 12, 384  # four slices hold 1536 rows: the last is all padding
    vocab_size = min(1003, held * ranks)
    hidden, weight, labels = inputs(tokens, held * ranks, vocab_size, dtype)
    dloss = torch.full((tokens,), 0.25)

    def rank_run(rank, all_gather):
        own = slice(rank * tokens // ranks, (rank + 1) * tokens // ranks)
        local = leaf(hidden[own] if sequence_parallel else hidden)
        part = leaf(weight[rank * held : (rank + 1) * held])
        partial = []  # this rank's share of the hidden gradient, before the sum over ranks

        def reduce_hidden_grad(gradient):
            partial.append(gradient)
            return gradient[own] if sequence_parallel else gradient

        with running(implementation):
            loss = linear_cross_entropy(
                local,
                part,
                labels,
                vocab_start=rank * held,
                vocab_size=vocab_size,
                all_gather=all_gather,
                reduce_hidden_grad=reduce_hidden_grad,
                gather_hidden=(lambda _: hidden) if sequence_parallel else None,
                chunk_size=5,
            )
            loss.backward(dloss)
        assert grad(local).shape == local.shape
        return loss, partial[0].double(), grad(part)

    results = as_ranks(ranks, rank_run)
    dhidden = torch.stack([result[1] for result in results]).sum(0)
    dweight = torch.cat([result[2] for result in results])
    for loss, *_ in results:
        assert_exact((loss, dhidden, dweight), hidden, weight, labels, dloss, vocab_size)


@every_implementation
def test_a_frozen_output_layer_gets_no_gradient(implementation):
    hidden, weight, labels = inputs(12, 200, 200, torch.float32)
    dloss = torch.rand(12)
    reference = with_full_logits(hidden, weight, labels, dloss, 200)
    hidden = leaf(hidden)
    with running(implementation):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=5)
        loss.backward(dloss)
    assert weight.grad is None
    assert_close(grad(hidden), reference[1], 2e-6, "dhidden")


@every_implementation
def test_the_weight_alone_may_be_trained(implementation):
    hidden, weight, labels = inputs(12, 200, 200, torch.float32)
    reference = with_full_logits(hidden, weight, labels, torch.ones(12), 200)
    weight = leaf(weight)
    with running(implementation):
        linear_cross_entropy(hidden, weight, labels, chunk_size=5).sum().backward()
    assert_close(grad(weight), reference[2], 2e-6, "dweight")


@every_implementation
def test_without_gradients_only_the_loss_is_computed(implementation):
    hidden, weight, labels = inputs(12, 200, 200, torch.float32)
    reference = with_full_logits(hidden, weight, labels, torch.ones(12), 200)
    with running(implementation), torch.no_grad():
        loss = linear_cross_entropy(leaf(hidden), leaf(weight), labels, chunk_size=5)
    assert not loss.requires_grad
    assert_close(loss, reference[0], 2e-6, "loss")


@every_implementation
def test_all_tokens_ignored(implementation):
    hidden, weight, labels = inputs(7, 60, 60, torch.float32)
    hidden, weight = leaf(hidden), leaf(weight)
    with running(implementation):
        loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
        loss.sum().backward()
    assert not loss.any() and not grad(hidden).any() and not grad(weight).any()


@every_implementation
def test_a_second_backward_pass_repeats_the_first(implementation):
    hidden, weight, labels = inputs(12, 200, 200, torch.float32)
    hidden, weight = leaf(hidden), leaf(weight)
    with running(implementation):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=5).sum()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight))
    for name, found, expected in zip(("dhidden", "dweight"), second, first, strict=True):
        assert_close(found, expected, 2e-6, name)


@every_implementation
def test_two_runs_agree_bitwise(implementation):
    results = []
    for _ in range(2):
        hidden, weight, labels = inputs(12, 203, 203, torch.bfloat16)
        hidden, weight = leaf(hidden), leaf(weight)
        with running(implementation):
            loss = linear_cross_entropy(hidden, weight, labels, chunk_size=5)
            loss.mean().backward()
        results.append((loss, grad(hidden), grad(weight)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_the_logits_of_one_chunk_are_the_largest_tensor(monkeypatch):
    made = []
    empty = torch.empty

    def noted(*arguments, **keywords):
        made.append(empty(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(torch, "empty", noted)
    hidden, weight, labels = inputs(64, 1000, 1000, torch.float32)
    linear_cross_entropy(leaf(hidden), weight, labels, chunk_size=16)
    assert max(tensor.numel() for tensor in made) == 16 * 1024


def test_the_reference_has_the_gradient_of_the_formula():
    hidden, weight, labels = inputs(6, 40, 35, torch.float64)
    hidden, weight = leaf(hidden[:, :5]), leaf(weight[:, :5])

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, vocab_size=35)

    with use_implementation("reference"):
        assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("wrong", (-1, 50))
def test_a_wrong_label_on_a_gpu_is_found_there(wrong):
    hidden, weight, labels = inputs(6, 50, 50, torch.bfloat16)
    labels[3] = wrong
    told = r"labels: a value lies outside the vocabulary \[0, 50\); fix the tokenizer"
    with running("triton"), looks_like_gpu(), pytest.raises(RuntimeError, match=told):
        linear_cross_entropy(hidden, weight, labels)


X, W, L = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(3, dtype=torch.int64)
GATHER = {"all_gather": lambda stats: stats[None], "vocab_size": 8}


@every_implementation
@pytest.mark.parametrize(
    ("argument", "hidden", "weight", "labels", "keywords"),
    [
        ("hidden: dtype", X.double(), W.double(), L, {}),
        ("hidden: shape", X[0], W, L, {}),
        ("hidden: shape", X[:0], W, L[:0], {}),
        ("weight: dtype", X, W.half(), L, {}),
        ("weight: shape", X, W[0], L, {}),
        ("weight: shape", X, W[:, :2], L, {}),
        ("weight: strides", X, torch.zeros(8, 8)[:, ::2], L, {}),
        ("weight: strides", X, torch.zeros(8, 8)[:, :4], L, {}),
        ("labels: dtype", X, W, L.int(), {}),
        ("labels: shape", X, W, L[:2], {}),
        ("labels: value 8", X, W, L + 8, {}),
        ("labels: value -1", X, W, L - 1, {}),
        ("reduce_hidden_grad", X, W, L, GATHER),
        ("gather_hidden", X, W, L[:1], {"gather_hidden": torch.clone} | {"reduce_hidden_grad": 0}),
        ("chunk_size", X, W, L, {"chunk_size": 0}),
    ],
)
def test_wrong_input_is_named(implementation, argument, hidden, weight, labels, keywords):
    with running(implementation), pytest.raises(ValueError, match=f"^{argument}"):
        linear_cross_entropy(hidden, weight, labels, **keywords)
