"""Triton kernels on CPU tensors, through their real launchers, without environment variables.

Inside `with interpret():` every launch of a `@triton.jit` function runs in Triton's own interpreter
(numpy, one program after another). Outside nothing has changed. Three things differ from the stock
interpreter, which `TRITON_INTERPRET=1` would start:

- bfloat16 is exact: values are held as float32 and rounded to nearest even whenever a bfloat16
  value comes into being. The stock interpreter holds the bit pattern as an integer and computes
  with it.
- floats and loop variables are Triton scalars, as they are when compiled.
- a `Memory` stands between the kernel and the tensors, and may watch or refuse each access.

The interpreter is not a public interface of Triton: what differs between the versions in use is
taken as it comes, and a part that is missing is named.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.compiler.code_generator  # noqa: F401 (see below)
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, mangle_type

# The compiler keeps the `min` and `max` that it finds when it is first imported. Triton imports it
# late: inside `interpret()` it would find, and keep, the interpreter's.

_MISSING = object()


@dataclass(frozen=True)
class Launch:
    """One kernel launch: name, number of programs, tensor arguments by parameter name."""

    kernel: str
    programs: int
    tensors: dict[str, torch.Tensor]


class Memory:
    """What lies behind the pointers of a kernel. This one is the tensors themselves, unwatched.

    `load`, `store` and `atomic` receive the addresses of all lanes, the mask, and the bytes of an
    element, and return the real addresses to access.
    """

    def begin(self, launch: Launch) -> None:
        """A kernel is about to run."""

    def pointer(self, tensor: torch.Tensor, argument: str) -> int:
        """The address that the kernel is given for a tensor argument."""
        return tensor.data_ptr()

    def program(self, index: int) -> None:
        """Program `index` of the launch is about to run."""

    def load(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        return addresses

    def store(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        return addresses

    def atomic(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        return addresses

    def end(self) -> None:
        """The kernel has finished."""


@contextmanager
def interpret(memory: Memory | None = None) -> Iterator[None]:
    """Run every Triton launch in the block on CPU, through `memory`. Not re-entrant.

    Raises RuntimeError if the installed Triton lacks a part of its interpreter that is needed here.
    """
    machine = _Machine(memory or Memory())
    with ExitStack() as patches:

        def patch(owner: Any, name: str, value: Any, new: bool = False) -> None:
            patches.enter_context(patched(owner, name, value, new))

        patch(stock, "interpreter_builder", machine.builder)
        patch(stock, "interpreter_semantic", TritonSemantic(machine.builder))
        patch(stock, "_get_np_dtype", partial(_numpy_dtype, stock._get_np_dtype))
        patch(stock, "_validate_np_data_size", partial(_fits, stock._validate_np_data_size))
        patch(stock.TensorHandle, "__post_init__", _checked(stock.TensorHandle.__post_init__))
        patch(JITFunction, "run", lambda kernel, *a, **k: machine.launch(kernel, *a, **k))
        patch(JITFunction, "__call__", lambda kernel, *a, **k: machine.function(kernel)(*a, **k))
        patch(JITFunction, "__get__", _bind_to_tensor, new=True)
        patch(driver, "_active", AbsentDevice("interpreter", GPUTarget("cuda", 90, 32)))
        # The scope is taken once, not per launch: nothing but kernels uses the patched language.
        language = stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        patches.callback(language.restore)
        patch(tl, "range", _scalar_range)
        patch(tl.core, "range", _scalar_range, new=True)
        patches.enter_context(np.errstate(all="ignore"))
        yield


@contextmanager
def patched(owner: Any, name: str, value: Any, new: bool = False) -> Iterator[None]:
    """Set `owner.name` in the block. Raises RuntimeError if it is absent and not declared new."""
    original = vars(owner).get(name, _MISSING)
    if original is _MISSING and not new:
        where = getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(f"this Triton has no {where}.{name}: install the pinned version")
    setattr(owner, name, value)
    try:
        yield
    finally:
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


class AbsentDevice:
    """As much of a Triton driver as launchers and compilation ask for: which chip it is.

    Triton caches by device: a name of its own for every target keeps them apart.
    """

    def __init__(self, name: str, target: GPUTarget) -> None:
        self.name = name
        self.target = target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _Machine:
    """Runs launches; rewrites each kernel for the interpreter once."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.builder = _Builder(memory)
        self._functions: dict[str, Callable[..., Any]] = {}

    def function(self, kernel: JITFunction) -> Callable[..., Any]:
        """The Python function of a kernel, its assignments made to yield Triton values."""
        key = f"{kernel.module}.{kernel.__qualname__}"
        if key not in self._functions:
            tree = stock.FunctionRewriter.ast_transformer.visit(kernel.parse())
            namespace = {
                name: _patched_builtin(value) for name, value in kernel.__globals__.items()
            }
            # The rewritten code calls these; only newer versions rewrite comparisons.
            helpers = ("interpreter_semantic", "_InterpreterComparison")
            namespace |= {name: getattr(stock, name) for name in helpers if hasattr(stock, name)}
            namespace["range"] = _scalar_range
            code = compile(ast.fix_missing_locations(tree), inspect.getfile(kernel.fn), "exec")
            exec(code, namespace)
            self._functions[key] = namespace[kernel.fn.__name__]
        return self._functions[key]

    def launch(
        self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        """Run all programs of one launch, in order of their linear index."""
        kwargs = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        bound = inspect.getcallargs(kernel.fn, *args, **kwargs)
        grid = grid(bound) if callable(grid) else grid
        x, y, z = (*grid, 1, 1)[:3]
        tensors = {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}
        self.memory.begin(Launch(kernel.__name__, x * y * z, tensors))
        constants = {kernel.arg_names[i] for i in kernel.constexprs}
        arguments = {
            name: value if name in constants else self._argument(value, name)
            for name, value in bound.items()
        }
        function = self.function(kernel)
        self.builder.set_grid_dim(x, y, z)
        for index in range(x * y * z):
            self.memory.program(index)
            # Axis 0 runs fastest, as on a GPU.
            self.builder.set_grid_idx(index % x, index // x % y, index // (x * y))
            function(**arguments)
        self.memory.end()

    def _argument(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            dtype = tl.str_to_ty(mangle_type(value), None)
            address = np.array([self.memory.pointer(value, name)], dtype=np.uint64)
            return tl.tensor(stock.TensorHandle(address, dtype), dtype)
        if isinstance(value, float):
            return _scalar(value, np.float32, tl.float32)
        return stock._implicit_cvt(value)


class _Builder(stock.InterpreterBuilder):
    """Triton's interpreter with bfloat16 held as float32, and memory behind an observer.

    Hints about caches, whose number differs between versions, mean nothing here.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def create_masked_load(self, ptrs, mask, other, *hints, **named_hints):
        dtype = ptrs.get_element_ty()
        addresses = self.memory.load(ptrs.data, mask.data, _bytes(dtype))
        numpy_dtype = np.dtype(np.uint16) if dtype == tl.bfloat16 else stock._get_np_dtype(dtype)
        if other is None:
            fill = np.zeros_like(addresses, dtype=numpy_dtype)
        else:
            fill = _to_bits(other.data) if dtype == tl.bfloat16 else other.data
        values = stock._interpreter.load(addresses, mask.data, fill, numpy_dtype)
        return stock.TensorHandle(_from_bits(values) if dtype == tl.bfloat16 else values, dtype)

    def create_masked_store(self, ptrs, value, mask, *hints, **named_hints):
        dtype = ptrs.get_element_ty()
        addresses = self.memory.store(ptrs.data, mask.data, _bytes(dtype))
        data = _to_bits(value.data) if dtype == tl.bfloat16 else value.data
        return stock._interpreter.store(addresses, data, mask.data)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        addresses = self.memory.atomic(ptr.data, mask.data, _bytes(ptr.get_element_ty()))
        ptr = stock.TensorHandle(addresses, ptr.dtype)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        every = np.ones_like(ptr.data, dtype=bool)
        addresses = self.memory.atomic(ptr.data, every, _bytes(ptr.get_element_ty()))
        return super().create_atomic_cas(
            stock.TensorHandle(addresses, ptr.dtype), cmp, val, sem, scope
        )

    def cast_impl(self, src, dst_type):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            data = src.data.astype(stock._get_np_dtype(dst_type))
            return stock.TensorHandle(data, dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_bitcast(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16:
            bits = _to_bits(src.data).view(stock._get_np_dtype(dst_type))
            return stock.TensorHandle(bits, dst_type.scalar)
        if dst_type.scalar == tl.bfloat16:
            return stock.TensorHandle(_from_bits(src.data.view(np.uint16)), tl.bfloat16)
        return super().create_bitcast(src, dst_type)

    def get_bf16(self, value):
        return stock.TensorHandle(np.array([value], dtype=np.float32), tl.bfloat16)

    def create_fabs(self, arg):
        if arg.dtype.scalar == tl.bfloat16:
            return self.unary_op(arg, np.abs)
        return super().create_fabs(arg)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bfloat16, ties to even, still float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(
        0xFFFF0000
    )
    # Adding to a NaN's mantissa could carry it into infinity.
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), rounded)
    return rounded.astype(np.uint32).view(np.float32).reshape(np.shape(values))


def _to_bits(values: np.ndarray) -> np.ndarray:
    rounded = round_to_bfloat16(values)
    return (rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bytes(dtype: Any) -> int:
    return max(1, dtype.primitive_bitwidth // 8)


def _numpy_dtype(original: Callable[[Any], np.dtype], dtype: Any) -> np.dtype:
    return np.dtype(np.float32) if dtype.scalar == tl.bfloat16 else original(dtype)


def _fits(original: Callable[[Any, Any], bool], data: np.ndarray, dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16 or original(data, dtype)


def _checked(original_check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Post-init of a value: bfloat16 is rounded here, so no operation can forget to."""

    def post_init(handle: Any) -> None:
        if handle.data.dtype == np.bool_:
            # Comparisons are declared with the dtype of their operands: broadcasting would widen
            # them.
            handle.dtype = tl.int1
        elif handle.dtype.scalar == tl.bfloat16:
            handle.data = round_to_bfloat16(handle.data)
        original_check(handle)

    return post_init


def _scalar(value: Any, numpy_dtype: Any, dtype: Any) -> Any:
    return tl.tensor(stock.TensorHandle(np.array([value], dtype=numpy_dtype), dtype), dtype)


def _scalar_range(start: Any, stop: Any = None, step: Any = 1, **hints: Any) -> Iterator[Any]:
    """`range` whose variable is a Triton integer, as wide as its widest bound."""
    if stop is None:
        start, stop = 0, start
    wide = any(isinstance(b, tl.tensor) and b.dtype == tl.int64 for b in (start, stop, step))
    numpy_dtype, dtype = (np.int64, tl.int64) if wide else (np.int32, tl.int32)
    for value in range(start, stop, step):
        yield _scalar(value, numpy_dtype, dtype)


def _patched_builtin(value: Any) -> Any:
    """Functions that a kernel's module imported by name, exchanged for the interpreted ones."""
    if isinstance(value, ModuleType | JITFunction):
        return value
    if getattr(value, "__module__", None) in (tl.math.__name__, "triton.language.extra.libdevice"):
        return getattr(tl, value.__name__, value)
    return value


def _bind_to_tensor(kernel: JITFunction, instance: Any, owner: Any = None) -> Any:
    """Triton hangs its own jitted functions on tensors: make `x.sum(0)` mean `sum(x, 0)`."""
    return partial(kernel, instance) if isinstance(instance, tl.tensor) else kernel
