"""One table for any Triton kernels: registers, spills, shared memory, access width, bytes moved.

A `Case` names an op and calls it twice: at the size to compile, and at a size to count. The
project's own cases are `own_cases()`; a benchmark makes those of other libraries with the same
functions, so that all figures come from the same code and the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gmai_kernels import cross_entropy_triton, linear_cross_entropy, rms_norm_triton
from gmai_kernels.dispatch import use_implementation
from gmai_kernels.linear_cross_entropy import GPU_CHUNK

from .disguise import looks_like_gpu
from .gate import TARGETS, Target, compiling
from .traffic import counted

Call = Callable[[], object]
BF16 = torch.bfloat16
EPS = 1e-6
ROWS_TO_COMPILE = 16
HIDDEN = (4096, 8192, 16384)
VOCABULARIES = (92544, 92553)
FORWARD, BACKWARD = "RMSNorm forward", "RMSNorm backward"
FORWARD_RESIDUAL, BACKWARD_RESIDUAL = "RMSNorm + residual forward", "RMSNorm + residual backward"
CROSS_ENTROPY = "cross-entropy forward + backward"
# Linear cross-entropy is counted with every dimension divided by this: its traffic has only
# products of two dimensions, so the count is exact times the square.
SCALE = 16
TOKENS, HIDDEN_SIZE, VOCABULARY = 4096, 2048, 92544


@dataclass(frozen=True)
class Case:
    """An op of one library. `compile` and `count` make the inputs and return the call to make."""

    op: str
    library: str
    compile: Callable[[], Call] | None
    count: Callable[[], Call]
    bytes_per: float  # divisor of the counted bytes: elements, or a share of a gigabyte
    unit: str = "B/element"
    gpu_path: bool = False  # count what the op does with GPU tensors


@dataclass(frozen=True)
class Row:
    """Figures of one case: the worst over its kernels on each target, and its traffic."""

    op: str
    library: str
    registers: dict[str, int]
    spills: dict[str, int]
    shared: dict[str, int]
    width: dict[str, int]
    traffic: float
    unit: str
    failures: dict[str, str]


def report(cases: Iterable[Case], targets: Iterable[Target] = TARGETS) -> list[Row]:
    """Compile every case for every target, and count its bytes; a failure is a figure too."""
    return [_row(case, tuple(targets)) for case in cases]


def own_cases() -> list[Case]:
    """The project's ops at the sizes of its presets."""
    own = "gmai_kernels"
    cases = []
    for hidden in HIDDEN:
        cases += [
            norm_case(FORWARD, own, hidden, 8, _forward),
            norm_case(BACKWARD, own, hidden, 1024, _backward),
            norm_case(FORWARD_RESIDUAL, own, hidden, 8, _forward_residual),
            norm_case(BACKWARD_RESIDUAL, own, hidden, 1024, _backward_residual),
        ]
    cases += [loss_case(own, vocabulary, _cross_entropy) for vocabulary in VOCABULARIES]
    return [*cases, linear_case(own, _linear_cross_entropy)]


def _row(case: Case, targets: tuple[Target, ...]) -> Row:
    registers, spills, shared, width, failures = {}, {}, {}, {}, {}
    prepare = case.compile
    for target in targets:
        if prepare is None:
            break
        try:
            call = prepare()
            with compiling(target) as kernels:
                call()
        except (
            Exception
        ) as error:  # a rival's kernel may not compile for a chip: that is its figure
            failures[target.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        registers[target.name] = max(k.registers for k in kernels)
        spills[target.name] = max(k.spills for k in kernels)
        shared[target.name] = max(k.shared for k in kernels)
        widths = [access.bits for k in kernels for access in k.main_accesses]
        width[target.name] = min(widths, default=0)
    moved = _count(case) / case.bytes_per
    return Row(case.op, case.library, registers, spills, shared, width, moved, case.unit, failures)


def _count(case: Case) -> int:
    call = case.count()
    # The disguise goes outside: what it does to stand in for a GPU is not counted.
    with looks_like_gpu() if case.gpu_path else nullcontext(), counted() as traffic:
        call()
    return traffic.total


def norm_case(
    op: str, library: str, hidden: int, rows: int, call: Callable[[Tensor, Tensor], object]
) -> Case:
    """A case of `call(x [R, hidden], weight [hidden])`, its bytes counted with R = `rows`."""

    def prepare(rows: int) -> Call:
        x, weight = torch.zeros(rows, hidden, dtype=BF16), torch.zeros(hidden, dtype=BF16)
        return lambda: call(x, weight)

    return Case(
        op=f"{op}, hidden {hidden}",
        library=library,
        compile=lambda: prepare(ROWS_TO_COMPILE),
        count=lambda: prepare(rows),
        bytes_per=rows * hidden,
    )


def loss_case(
    library: str, vocabulary: int, call: Callable[[Tensor, Tensor], object], op: str = CROSS_ENTROPY
) -> Case:
    """A case of `call(logits [R, vocabulary], labels [R])`, forward and backward."""

    def prepare(rows: int) -> Call:
        # Rows start on 16 elements, as a caller with an odd vocabulary would arrange.
        stride = -(-vocabulary // 16) * 16
        logits = torch.zeros(rows, stride, dtype=BF16)[:, :vocabulary]
        labels = torch.arange(rows)
        return lambda: call(logits, labels)

    return Case(
        op=f"{op}, vocabulary {vocabulary}",
        library=library,
        compile=lambda: prepare(ROWS_TO_COMPILE),
        count=lambda: prepare(4),
        bytes_per=4 * vocabulary,
    )


def linear_case(library: str, call: Callable[[Tensor, Tensor, Tensor], object]) -> Case:
    """A case of `call(hidden [M, H], weight [V, H], labels [M])`, forward and backward."""

    def prepare() -> Call:
        hidden = torch.zeros(TOKENS // SCALE, HIDDEN_SIZE // SCALE, dtype=BF16).requires_grad_()
        weight = torch.zeros(VOCABULARY // SCALE, HIDDEN_SIZE // SCALE, dtype=BF16).requires_grad_()
        labels = torch.zeros(TOKENS // SCALE, dtype=torch.int64)
        return lambda: call(hidden, weight, labels)

    return Case(
        op=f"linear + cross-entropy, M{TOKENS} H{HIDDEN_SIZE} V{VOCABULARY}",
        library=library,
        compile=None,
        count=prepare,
        bytes_per=1e9 / SCALE**2,
        unit="GB",
        gpu_path=True,
    )


def _forward(x: Tensor, weight: Tensor) -> None:
    rms_norm_triton.forward(x, None, weight, EPS)


def _forward_residual(x: Tensor, weight: Tensor) -> None:
    rms_norm_triton.forward(x, x, weight, EPS)


def _backward(x: Tensor, weight: Tensor) -> None:
    rms_norm_triton.backward(x, None, x, torch.ones(len(x), 1), weight, True)


def _backward_residual(x: Tensor, weight: Tensor) -> None:
    rms_norm_triton.backward(x, x, x, torch.ones(len(x), 1), weight, True)


def _cross_entropy(logits: Tensor, labels: Tensor) -> None:
    stats = cross_entropy_triton.statistics(logits, labels, logits.shape[1])
    lse, scale = stats[:, 0].contiguous(), torch.ones(logits.shape[0])
    cross_entropy_triton.gradient_(logits, labels, lse, scale, logits.shape[1])


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    with use_implementation("triton"):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=GPU_CHUNK // SCALE)
        loss.sum().backward()
