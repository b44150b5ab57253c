"""Memory safety of Triton kernels: out-of-bounds accesses, unwritten outputs, races.

`with guarded():` runs launches in the interpreter and raises `GuardError` at the first fault:

- **Out of bounds.** Each tensor argument gets an address window of its own, 2**44 bytes wide, which
  no memory lies behind. An access is translated to the real tensor only if it falls exactly on an
  element of that argument's view. The padding between strided rows is out of bounds, and so is any
  other tensor, however near it lies in real memory.
- **Unwritten.** Memory from `torch.empty` and its kin is followed until kernels or torch operations
  have written it. To read it before, or to leave any of it unwritten at the end, is a fault.
- **Races.** Programs of a launch may run in any order and at once. If one touches an element that
  another writes, the result depends on chance. Two lanes of one store with the same address count
  as well. Atomic operations are refused: their order, and with floating point their result, is not
  fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .inside import InsideMode
from .interpreter import Launch, Memory, interpret

_WINDOW_BITS = 44
_NOBODY, _MANY = -1, -2


class GuardError(AssertionError):
    """A kernel did what it must not; the message names kernel, argument, program and element."""


@contextmanager
def guarded() -> Iterator[list[str]]:
    """Run every launch in the block under guard; the list takes the names of the kernels that ran.

    Raises GuardError inside the block at a bad access, and at its end if an element of a tensor
    that was allocated in the block and handed to a kernel is still unwritten.
    """
    guard = _Guard()
    with guard.allocations, interpret(guard):
        yield guard.launched
    guard.check_all_written()


class _Storage:
    """What is known about the bytes of one torch storage."""

    def __init__(self, tensor: torch.Tensor, fresh: bool) -> None:
        storage = tensor.untyped_storage()
        self.keep_alive = storage  # its address must not be given to another tensor
        self.address = storage.data_ptr()
        self.written = np.full(storage.nbytes(), not fresh)
        self.outputs: dict[str, np.ndarray] = {}

    def start_launch(self) -> None:
        self.writer = np.full(len(self.written), _NOBODY, dtype=np.int32)
        self.reader = np.full(len(self.written), _NOBODY, dtype=np.int32)


class _Argument:
    """A tensor argument: its window of addresses and the bytes of its elements in the storage."""

    def __init__(self, name: str, tensor: torch.Tensor, storage: _Storage, number: int) -> None:
        self.name = name
        self.storage = storage
        self.size = tensor.element_size()
        middle = (number << _WINDOW_BITS) + (1 << (_WINDOW_BITS - 1))
        offset = tensor.data_ptr() - storage.address
        # Alignment is kept, since kernels and descriptors may rely on it.
        self.base = middle + tensor.data_ptr() % 256
        self.shift = self.base - offset  # window address of the storage's first byte
        self.starts = _element_offsets(tensor)
        self.is_element = np.zeros(len(storage.written), dtype=bool)
        self.is_element[self.starts] = True


class _Guard(Memory):
    def __init__(self) -> None:
        self.allocations = _Allocations()
        self.launched: list[str] = []
        self.launch = Launch("", 0, {})
        self.arguments: dict[int, _Argument] = {}
        self.current = 0

    def begin(self, launch: Launch) -> None:
        self.launch = launch
        self.launched.append(launch.kernel)
        self.arguments = {}
        for number, (name, tensor) in enumerate(launch.tensors.items(), start=1):
            storage = self.allocations.find(tensor)
            storage.start_launch()
            argument = _Argument(name, tensor, storage, number)
            storage.outputs[f"{name} of {launch.kernel}"] = argument.is_element
            self.arguments[number] = argument

    def pointer(self, tensor: torch.Tensor, argument: str) -> int:
        return next(a.base for a in self.arguments.values() if a.name == argument)

    def program(self, index: int) -> None:
        self.current = index

    def load(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        real, storage, offsets, name = self._translate("load", addresses, mask, size)
        if storage is not None:
            unwritten = ~storage.written[offsets]
            if unwritten.any():
                self._fail(f"reads {unwritten.sum()} unwritten element(s) of {name}")
            writer = storage.writer[offsets]
            self._refuse_race(writer, (writer >= 0) & (writer != self.current), "reads", name)
            reader = storage.reader[offsets]
            known = (reader == _NOBODY) | (reader == self.current)
            storage.reader[offsets] = np.where(known, self.current, _MANY)
        return real

    def store(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        real, storage, offsets, name = self._translate("store", addresses, mask, size)
        if storage is not None:
            if len(np.unique(offsets)) != len(offsets):
                self._fail(f"stores twice to one element of {name} in one instruction")
            for touched, verb in ((storage.writer, "wrote"), (storage.reader, "reads")):
                other = touched[offsets]
                taken = (other != _NOBODY) & (other != self.current)
                self._refuse_race(other, taken, "writes", name, verb)
            storage.writer[offsets] = self.current
            _mark(storage.written, offsets, size)
        return real

    def atomic(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        self._fail("uses an atomic operation, whose order is not fixed")
        return addresses

    def check_all_written(self) -> None:
        """Raise GuardError if a kernel's argument holds elements that nothing has written."""
        for storage in self.allocations.storages.values():
            for name, is_element in storage.outputs.items():
                missing = is_element & ~storage.written
                if missing.any():
                    raise GuardError(
                        f"{name}: {missing.sum()} of {is_element.sum()} elements never written, "
                        f"the first at byte {int(missing.argmax())} of its storage"
                    )

    def _translate(self, verb: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> Any:
        """(real addresses of all lanes, storage, byte offsets of active lanes, argument name)."""
        active = np.broadcast_to(mask, addresses.shape).astype(bool)
        chosen = addresses[active].astype(np.int64)
        real = np.zeros_like(addresses)
        if not len(chosen):
            return real, None, chosen, ""
        numbers = np.unique(chosen >> _WINDOW_BITS)
        argument = self.arguments.get(int(numbers[0]))
        if argument is None or len(numbers) > 1:
            self._fail(f"{verb}s through a pointer that belongs to no single argument")
        assert argument is not None
        offsets = chosen - argument.shift
        inside = (offsets >= 0) & (offsets < len(argument.is_element))
        inside[inside] = argument.is_element[offsets[inside]]
        if size != argument.size or not inside.all():
            worst = (chosen[~inside] - argument.base) // argument.size
            where = (
                f"from element {worst.min()} to {worst.max()}" if len(worst) else "of wrong size"
            )
            self._fail(f"{verb}s {len(worst)} element(s) out of bounds of {argument.name}: {where}")
        real[active] = (offsets + argument.storage.address).astype(addresses.dtype)
        return real, argument.storage, offsets, argument.name

    def _refuse_race(
        self, others: np.ndarray, bad: np.ndarray, verb: str, name: str, theirs: str = "wrote"
    ) -> None:
        if bad.any():
            other = int(others[bad][0])
            who = "several programs" if other == _MANY else f"program {other}"
            self._fail(f"{verb} {bad.sum()} element(s) of {name} that {who} also {theirs}")

    def _fail(self, what: str) -> None:
        raise GuardError(f"{self.launch.kernel}, program {self.current}: {what}")


class _Allocations(InsideMode):
    """Follows `torch.empty` and its kin, and torch operations that write into their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, _Storage] = {}

    def find(self, tensor: torch.Tensor) -> _Storage:
        """The record of a tensor's storage; memory from outside the block counts as written."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self.storages:
            self.storages[address] = _Storage(tensor, fresh=False)
        return self.storages[address]

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if "empty" in func.name():
            self.storages[result.untyped_storage().data_ptr()] = _Storage(result, fresh=True)
        else:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                self._note_write(argument, value)
            for argument in func._schema.arguments:
                self._note_write(argument, kwargs.get(argument.name))
        return result

    def _note_write(self, argument: Any, value: Any) -> None:
        if argument.is_write and isinstance(value, torch.Tensor):
            storage = self.storages.get(value.untyped_storage().data_ptr())
            if storage is not None:
                _mark(storage.written, _element_offsets(value), value.element_size())


def _element_offsets(tensor: torch.Tensor) -> np.ndarray:
    """Byte offset in the storage of every element of a view, int64 [numel]."""
    offsets = np.full(1, tensor.storage_offset(), dtype=np.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(length, dtype=np.int64) * stride).ravel()
    return offsets * tensor.element_size()


def _mark(flags: np.ndarray, starts: np.ndarray, size: int) -> None:
    for byte in range(size):
        flags[starts + byte] = True
