"""GPU part of the kernel benchmark: each op against its rivals and the copy bandwidth of the card.

Every number is a ratio, so it can be read without knowing the card: times of a rival divided by
ours (above 1: ours is faster), and the bandwidth that an op would need for its counted bytes,
divided by that of a plain copy. Without a GPU the part returns a note that says what it would have
done.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from kernel_figures import Figure
from torch import Tensor

from gmai_kernels import (
    linear_cross_entropy,
    rms_norm,
    vocab_parallel_cross_entropy,
)

BF16 = torch.bfloat16
EPS = 1e-5
ROWS = 16384
HIDDEN_SIZES = (1024, 4096, 8192, 16384)
LOSS_TOKENS, VOCABULARIES = 4096, (92544, 92553, 151936)
LINEAR_HIDDEN = 2048
COPY_BYTES = 1 << 30

Step = Callable[[], object]


def figures() -> tuple[list[Figure], list[str]]:
    """Return the ratios measured on GPU 0, or a note where there is none."""
    if not torch.cuda.is_available():
        return [], [
            "gpu: no GPU is visible, so nothing was timed. On a GPU machine the same command times "
            "RMSNorm, the losses and the fused linear loss against eager torch, torch.compile, "
            "Liger-Kernel and the card's copy bandwidth, as ratios."
        ]
    liger = importlib.util.find_spec("liger_kernel") is not None
    bandwidth = _copy_bandwidth()
    notes = [
        f"gpu: {torch.cuda.get_device_name(0)}, copy bandwidth {bandwidth / 1e9:.0f} GB/s, "
        f"Liger-Kernel {'present' if liger else 'not installed'}"
    ]
    found = []
    for hidden in HIDDEN_SIZES:
        found += _norm_figures(hidden, bandwidth, liger)
    for vocabulary in VOCABULARIES:
        found += _loss_figures(vocabulary, bandwidth, liger)
        found += _linear_loss_figures(vocabulary, frozen=False, liger=liger)
        found += _linear_loss_figures(vocabulary, frozen=True, liger=liger)
    return found, notes


def _norm_figures(hidden: int, bandwidth: float, liger: bool) -> list[Figure]:
    x, weight, dy = _leaf(ROWS, hidden), _leaf(hidden), _leaf(ROWS, hidden).detach()

    def eager(x: Tensor) -> Tensor:
        wide = x.float()
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * r).to(x.dtype) * weight

    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: rms_norm(x, weight, EPS),
        "eager": eager,
        "compile": torch.compile(eager),
    }
    if liger:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        norms["Liger"] = lambda x: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
    elements = ROWS * hidden
    forward = {name: partial(norm, x.detach()) for name, norm in norms.items()}
    both = {name: partial(_backward, norm, x, dy) for name, norm in norms.items()}
    found = _ratios(f"RMSNorm {hidden} forward", forward, 4 * elements, bandwidth)
    return found + _ratios(f"RMSNorm {hidden} forward + backward", both, 10 * elements, bandwidth)


def _loss_figures(vocabulary: int, bandwidth: float, liger: bool) -> list[Figure]:
    """The loss on full logits, which some overwrite: values change from step to step."""
    logits, labels = _leaf(LOSS_TOKENS, vocabulary), _labels(vocabulary)

    def eager(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda logits: vocab_parallel_cross_entropy(logits, labels),
        "eager": eager,
        "compile": torch.compile(eager),
    }
    if liger:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        losses["Liger"] = lambda logits: LigerCrossEntropyFunction.apply(
            logits, labels, None, -100, 0.0, 0.0, "sum"
        )[0]
    steps = {name: partial(_gradient_of_sum, loss, logits) for name, loss in losses.items()}
    label = f"cross-entropy {vocabulary} forward + backward"
    return _ratios(label, steps, 6 * logits.numel(), bandwidth)


def _linear_loss_figures(vocabulary: int, frozen: bool, liger: bool) -> list[Figure]:
    hidden, labels = _leaf(LOSS_TOKENS, LINEAR_HIDDEN), _labels(vocabulary)
    weight = _leaf(vocabulary, LINEAR_HIDDEN).detach().requires_grad_(not frozen)

    def eager(hidden: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda hidden: linear_cross_entropy(hidden, weight, labels),
        "eager": eager,
        "compile": torch.compile(eager),
    }
    if liger:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction,
        )

        losses["Liger"] = lambda hidden: LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum"
        )[0]
    leaves = (hidden,) if frozen else (hidden, weight)
    steps = {name: partial(_gradient_of_sum, loss, hidden, leaves) for name, loss in losses.items()}
    state = "frozen" if frozen else "trained"
    label = f"linear cross-entropy {vocabulary}, {state}"
    return _ratios(label, steps) + _memory_ratios(label, steps)


def _gradient_of_sum(
    loss: Callable[[Tensor], Tensor], argument: Tensor, leaves: tuple[Tensor, ...] = ()
) -> None:
    torch.autograd.grad(loss(argument).sum(), leaves or (argument,))


def _backward(norm: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> None:
    norm(x).backward(dy)
    x.grad = None


def _ratios(
    name: str, steps: Mapping[str, Step], counted_bytes: int = 0, bandwidth: float = 0.0
) -> list[Figure]:
    """Times of the rivals over ours, and our share of the copy bandwidth where bytes are given."""
    seconds = {rival: _seconds(step) for rival, step in steps.items()}
    ours = seconds.pop("ours")
    found = [Figure(f"gpu, {name}: {r} / ours", s / ours, "x") for r, s in seconds.items()]
    if counted_bytes:
        share = counted_bytes / ours / bandwidth
        found.append(Figure(f"gpu, {name}: ours, of the copy bandwidth", share, "x"))
    return found


def _memory_ratios(name: str, steps: Mapping[str, Step]) -> list[Figure]:
    """Peak memory of the rivals over ours, above what the inputs take."""
    peaks = {}
    for rival, step in steps.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks[rival] = torch.cuda.max_memory_allocated() - before
    ours = peaks.pop("ours")
    return [Figure(f"gpu, {name}: memory, {r} / ours", p / ours, "x") for r, p in peaks.items()]


def _seconds(step: Step, repeats: int = 20) -> float:
    """Median seconds of a step on the GPU, caches of the card flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for repeat in range(3 + repeats):  # the first three compile and warm up
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def _copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of COPY_BYTES."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _seconds(lambda: target.copy_(source))


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=BF16, device="cuda").requires_grad_()


def _labels(vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (LOSS_TOKENS,), device="cuda")
