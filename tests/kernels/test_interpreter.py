"""The interpreter computes what a GPU would, bfloat16 included, and leaves no trace."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import triton.language as tl
from sample_kernels import (
    bf16_chain_kernel,
    matmul_kernel,
    row_norm,
    scale,
    scale_kernel,
    skip_kernel,
)
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from gmai_kernels.testing.interpreter import interpret, round_to_bfloat16


def test_runs_a_real_launcher_on_cpu_tensors():
    x = torch.randn(100)
    with interpret():
        y = scale(x, 3.0)
    torch.testing.assert_close(y, x * 3.0, rtol=0, atol=0)


def test_follows_strides_loops_and_device_functions():
    x = torch.randn(3, 256)[:, :200]
    with interpret():
        y = row_norm(x)
    torch.testing.assert_close(y, x.double().norm(dim=1).float(), rtol=1e-6, atol=0)


def test_bfloat16_rounding_is_that_of_torch():
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x00008000, -0x80000000])
    values = torch.cat([bits, ties.to(torch.int32)]).view(torch.float32)
    expected = values.bfloat16().float().numpy()
    np.testing.assert_array_equal(round_to_bfloat16(values.numpy()), expected)


def test_bfloat16_arithmetic_rounds_after_every_operation():
    a, b = torch.randn(2, 37).bfloat16()
    c = torch.empty(4, 37, dtype=torch.bfloat16)
    with interpret():
        bf16_chain_kernel[(1,)](a, b, c, 37, BLOCK=64)
    one = torch.ones((), dtype=torch.bfloat16)
    expected = torch.stack([a * b + a, (a - b).abs(), a.maximum(b), torch.where(a < b, a, one)])
    assert torch.equal(c, expected)


def test_bfloat16_dot_accumulates_in_float32():
    a, b = torch.randn(2, 32, 32).bfloat16()
    c = torch.empty_like(a)
    with interpret():
        matmul_kernel[(1,)](a, b, c, N=32)
    reference = a.double() @ b.double()
    assert (c.double() - reference).abs().max() <= 2**-8 * reference.abs().max()


def test_bfloat16_store_of_a_scaled_load_is_exact():
    x = torch.randn(1000).bfloat16()
    with interpret():
        y = scale(x, 0.3)
    assert torch.equal(y, x * torch.tensor(0.3).bfloat16())


def test_a_scalar_comparison_is_a_mask():
    x, y = torch.arange(3.0), torch.full((3, 64), -1.0)
    with interpret():
        skip_kernel[(3,)](x, y, 64, BLOCK=64)
    assert y[0].eq(0).all() and y[1].eq(-1).all() and y[2].eq(2).all()


def test_nothing_stays_patched():
    watched = [
        (JITFunction, "run"),
        (JITFunction, "__call__"),
        (stock, "interpreter_builder"),
        (stock, "_get_np_dtype"),
        (stock.TensorHandle, "__post_init__"),
        (tl, "load"),
        (tl, "range"),
        (tl.tensor, "__add__"),
    ]
    before = [vars(owner)[name] for owner, name in watched]
    names = set(scale_kernel.__globals__)
    with interpret():
        scale(torch.ones(4), 2.0)
    assert all(vars(owner)[name] is old for (owner, name), old in zip(watched, before, strict=True))
    assert set(scale_kernel.__globals__) == names
    assert not hasattr(JITFunction, "__get__")


def test_restores_after_an_error_and_passes_it_on():
    run = JITFunction.run
    with pytest.raises(TypeError, match="n"), interpret():
        scale_kernel[(1,)](torch.ones(4))
    assert JITFunction.run is run


def test_a_compiler_that_is_used_after_the_interpreter_is_untouched():
    """In a process of its own: here the compiler has long been imported."""
    program = """
import triton.language as tl
from gmai_kernels.testing.interpreter import interpret
with interpret():
    from triton.compiler.code_generator import CodeGenerator
assert CodeGenerator.builtin_namespace["min"] is tl.core.builtin_min
"""
    subprocess.run([sys.executable, "-c", program], check=True)
