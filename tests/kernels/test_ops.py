"""torch sees the kernels: without data, in a compiled graph, in profiles and in counts of FLOPs."""

import subprocess
import sys

import pytest
import torch
from numerics import every_implementation, grad, leaf, running
from torch.torch_version import TorchVersion

from gmai_kernels import linear_cross_entropy, rms_norm, vocab_parallel_cross_entropy

OPS = torch.ops.gmai_kernels


def call_all(implementation, dtype=torch.float32):
    """Arguments of every operator, as the ops of the package pass them."""
    x, dy, weight = torch.randn(6, 96, dtype=dtype), torch.randn(6, 96), torch.ones(96, dtype=dtype)
    logits, target = torch.randn(6, 200, dtype=dtype)[:, :190], torch.tensor([0, 7, -1, -2, 3, 179])
    return [
        (OPS.rms_norm, (x, weight, 1e-5, implementation)),
        (OPS.rms_norm_backward, (dy.to(dtype), x, torch.rand(6, 1), weight, True, implementation)),
        (OPS.rms_norm_backward, (dy.to(dtype), x, torch.rand(6, 1), weight, False, implementation)),
        (OPS.cross_entropy_statistics, (logits, target, 180, implementation)),
        (
            OPS.cross_entropy_gradient_,
            (logits, target, torch.rand(6), torch.rand(6), 180, implementation),
        ),
    ]


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("number", range(5))
def test_an_operator_keeps_the_promises_of_its_schema(implementation, dtype, number):
    """Results have the shapes, strides and dtypes of the fake ones; only `logits` is written to."""
    operator, arguments = call_all(implementation, dtype)[number]
    checks = ("test_schema", "test_faketensor")
    with running(implementation):
        torch.library.opcheck(operator, arguments, test_utils=checks)


PROGRAM = """
import os
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import FlopCounterMode
from gmai_kernels import linear_cross_entropy, rms_norm, vocab_parallel_cross_entropy

_setup_privateuseone_for_python_backend("gpu")
T, H, V = 4096, 4096, 92544  # two chunks
bf16, host = dict(dtype=torch.bfloat16, device="gpu"), torch.zeros(T, dtype=torch.int64)
with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
    x = torch.empty(T, H, **bf16, requires_grad=True)
    scale = torch.empty(H, **bf16, requires_grad=True)
    weight = torch.empty(V, H, **bf16, requires_grad=True)
    for labels in (host, torch.empty(T, dtype=torch.int64, device="gpu")):
        y = rms_norm(x, scale, 1e-5)
        linear_cross_entropy(y, weight, labels).sum().backward()
        logits = y.detach() @ weight.T
        vocab_parallel_cross_entropy(logits, labels).sum().backward()
        gradients = x.grad, scale.grad, weight.grad
        assert all(g.device.type == "gpu" and g.dtype == torch.bfloat16 for g in gradients)
flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
assert flops["gmai_kernels.rms_norm"] == 2 * 4 * T * H, flops
assert flops["gmai_kernels.rms_norm_backward"] == 2 * 9 * T * H, flops
assert flops["gmai_kernels.cross_entropy_statistics"] == 4 * 4 * T * V, flops
products = sum(n for op, n in flops.items() if "mm" in op or "product" in op)
assert products == 2 * (3 + 2) * 2 * T * H * V, flops
os._exit(0)  # torch keeps a thread for the device; at times one still runs when Python tears down
"""


def test_a_7b_head_runs_on_a_device_that_does_not_exist():
    """Without data, memory or a host's look at a value; in a process of its own for the device."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def head(x, scale, weight, labels):
    """RMSNorm, an output layer and the loss."""
    return vocab_parallel_cross_entropy(rms_norm(x, scale, 1e-5) @ weight.T, labels).sum()


def fused_head(x, scale, weight, labels):
    return linear_cross_entropy(rms_norm(x, scale, 1e-5), weight, labels).sum()


# linear_cross_entropy writes its logits into strided rows, which a whole graph may not.
@pytest.mark.parametrize(("function", "whole"), [(head, True), (fused_head, False)])
def test_torch_compile_gives_the_same_gradients(function, whole, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set by programs run in this process
    compiled = torch.compile(function, backend="aot_eager", fullgraph=whole)
    assert compiled is not function
    torch.manual_seed(0)
    x, scale, weight = torch.randn(16, 64), torch.ones(64), torch.randn(120, 64)
    labels = torch.randint(0, 120, (16,))
    results = []
    for run in (function, compiled):
        leaves = leaf(x), leaf(scale), leaf(weight)
        run(*leaves, labels).backward()
        results.append([grad(tensor) for tensor in leaves])
    assert all(torch.equal(eager, again) for eager, again in zip(*results, strict=True))


def test_a_profile_names_the_kernels():
    x, scale, weight = leaf(torch.randn(4, 64)), leaf(torch.ones(64)), leaf(torch.randn(50, 64))
    with torch.profiler.profile() as profile:
        fused_head(x, scale, weight, torch.arange(4)).backward()
    names = {event.key.partition("::")[2] for event in profile.key_averages()}
    assert {"rms_norm", "rms_norm_backward", "cross_entropy_statistics"} <= names


def test_a_torch_before_2_10_adds_the_product_afterwards(monkeypatch):
    """Its addmm takes no fp32 total beside bf16 factors."""
    product = lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype)  # noqa: E731
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0a0+b558c986e8.nv25.11"))
    monkeypatch.setattr(torch, "mm", product)
    total, left, right = (
        torch.ones(3, 5),
        torch.randn(3, 4).bfloat16(),
        torch.randn(4, 5).bfloat16(),
    )
    expected = 1 + left.float() @ right.float()
    OPS.add_product_(total, left, right)
    torch.testing.assert_close(total, expected)
