"""The gate reads compiled code correctly: each planted regression is caught on every target."""

import re
import subprocess
import tempfile

import pytest
import torch
import triton
import triton.language as tl
from sample_kernels import scale
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gmai_kernels.testing.gate import (
    SM_80,
    SM_90,
    TARGETS,
    GateFailure,
    check,
    check_no_spills,
    check_registers,
    check_shared,
    check_wide,
    compiling,
)

every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


@triton.jit
def greedy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Holds two rows in float32: at a large BLOCK, more than the registers there are."""
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols).to(tl.float32)
    y = tl.load(y_ptr + cols).to(tl.float32)
    for _ in range(n):
        x, y = x * tl.sum(y, axis=0), y * tl.sum(x, axis=0)
    tl.store(y_ptr + cols, (x + y).to(y_ptr.dtype.element_ty))


@triton.jit
def loop_kernel(x_ptr, y_ptr, stride, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Sums a row: an unmasked or masked main loop, and a masked tail."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    whole = n if MASKED else n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        mask = start + cols < n if MASKED else None
        total += tl.load(x_ptr + row * stride + start + cols, mask=mask).to(tl.float32)
    tail = whole + cols
    total += tl.load(x_ptr + row * stride + tail, mask=tail < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, tl.sum(total, axis=0))


@triton.jit
def helper_load(x_ptr, cols, n, MASKED: tl.constexpr):
    mask = cols < n if MASKED else None
    return tl.load(x_ptr + cols, mask=mask)


@triton.jit
def helper_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """One line of source loads both the main loop and the tail."""
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n // BLOCK * BLOCK, BLOCK):
        total += helper_load(x_ptr, start + cols, n, MASKED=False)
    total += helper_load(x_ptr, n // BLOCK * BLOCK + cols, n, MASKED=True)
    tl.store(y_ptr + cols, total)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, depth, M: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros([M, M], dtype=tl.float32)
    for start in range(0, depth, K):
        a = tl.load(a_ptr + i[:, None] * depth + start + k[None, :])
        b = tl.load(b_ptr + i[:, None] * depth + start + k[None, :])
        total = tl.dot(a, b.trans(), total)
    tl.store(c_ptr + i[:, None] * M + i[None, :], total.to(tl.bfloat16))


def compile_loop(target, columns: int, stride: int, masked: bool):
    x, y = torch.empty(4, stride, dtype=torch.bfloat16), torch.empty(4)
    with compiling(target) as compiled:
        loop_kernel[(4,)](x, y, stride, columns, MASKED=masked, BLOCK=2048, num_warps=4)
    return compiled[0]


def compile_greedy(target, block: int):
    x, y = torch.empty(2, block)
    with compiling(target) as compiled:
        greedy_kernel[(1,)](x, y, 4, BLOCK=block, num_warps=4)
    return compiled[0]


def compile_product(target, size: int, depth: int):
    a, b = torch.empty(2, size, 4096, dtype=torch.bfloat16)
    c = torch.empty(size, size, dtype=torch.bfloat16)
    with compiling(target) as compiled:
        product_kernel[(1,)](a, b, c, 4096, M=size, K=depth, num_warps=8, num_stages=3)
    return compiled[0]


@every_target
def test_a_good_kernel_passes_through_its_real_launcher(target):
    with compiling(target) as compiled:
        scale(torch.empty(1 << 16), 2.0, block=1024)
    (kernel,) = compiled
    assert (kernel.kernel, kernel.warps, kernel.spills, kernel.shared) == ("scale_kernel", 1, 0, 0)
    assert 8 <= kernel.registers <= 255
    assert [a.verb for a in kernel.main_accesses] == ["load", "store"]
    assert [a.bits for a in kernel.main_accesses] == [128, 128]
    check(kernel, register_cap=255)


@every_target
def test_spills_are_caught(target):
    check_no_spills(compile_greedy(target, 1024))
    spilling = compile_greedy(target, 16 * target.triton.warp_size**2)
    with pytest.raises(
        GateFailure, match=f"greedy_kernel on {target.name}: bytes spilled"
    ) as failure:
        check_no_spills(spilling)
    assert failure.value.value == spilling.spills > 0


def test_spilled_bytes_are_what_the_assembler_reports():
    compiled = compile_greedy(SM_90, 16384)
    kernels = greedy_kernel.device_caches["sm_90"][0].values()
    text = next(k.asm["ptx"] for k in kernels if "16384" in k.asm["ttgir"])
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a", file.name]
        log = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True).stderr
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert found and registers
    assert compiled.spills == int(found[1]) >= int(found[2]) / 2 > 0
    assert compiled.registers == int(registers[1])


@every_target
def test_register_caps_are_caught(target):
    kernel = compile_greedy(target, 1024)
    check_registers(kernel, cap=kernel.registers)
    with pytest.raises(
        GateFailure, match=f"registers is {kernel.registers}, the bar is {kernel.registers - 1}"
    ):
        check_registers(kernel, cap=kernel.registers - 1)


@every_target
def test_narrow_main_loops_are_caught(target):
    narrow = compile_loop(target, columns=5001, stride=5008, masked=True)
    with pytest.raises(
        GateFailure, match=r"loop_kernel .* load of 4096 bytes at test_gate_tools.py:\d+"
    ):
        check_wide(narrow)


@every_target
def test_a_masked_tail_may_be_narrow(target):
    kernel = compile_loop(target, columns=5001, stride=5008, masked=False)
    check_wide(kernel)
    assert [a.bits for a in kernel.main_accesses] == [128]
    assert min(a.bits for a in kernel.accesses) < 128


@every_target
def test_an_unpadded_odd_stride_is_caught(target):
    with pytest.raises(GateFailure, match="width of the load"):
        check_wide(compile_loop(target, columns=5001, stride=5001, masked=False))


@every_target
def test_one_source_line_is_judged_separately_in_the_loop_and_in_the_tail(target):
    x, y = torch.empty(5001), torch.empty(1024)
    with compiling(target) as compiled:
        helper_kernel[(1,)](x, y, 5001, BLOCK=1024, num_warps=2)
    loads = {a.in_loop: a.bits for a in compiled[0].accesses if a.verb == "load"}
    assert loads == {True: 128, False: 32}


@every_target
def test_asynchronous_copies_of_a_pipelined_loop_are_seen(target):
    kernel = compile_product(target, size=64, depth=64)
    assert {a.verb for a in kernel.main_accesses} == {"load"}
    check_wide(kernel)


@every_target
def test_too_much_shared_memory_is_caught(target):
    check_shared(compile_product(target, size=64, depth=64))
    with pytest.raises(GateFailure, match=f"bytes of shared memory .* {target.shared_limit}"):
        check_shared(compile_product(target, size=128, depth=256))


def test_equal_launches_are_reported_once_and_different_ones_apart():
    x = torch.empty(4, 4096)
    with compiling(SM_80) as compiled:
        scale(x, 2.0)
        scale(x, 3.0)
        scale(x[:, :7].contiguous(), 3.0)  # 28 elements: not a multiple of 16
    assert [k.kernel for k in compiled] == ["scale_kernel"] * 2


def test_the_driver_comes_back():
    run, active = JITFunction.run, driver._active
    with pytest.raises(ZeroDivisionError), compiling(SM_80):
        assert driver.active.get_current_target() == SM_80.triton
        raise ZeroDivisionError
    assert (JITFunction.run, driver._active) == (run, active)
