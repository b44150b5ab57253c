"""Counts what a program does with a device: memory, products, launches, collectives, waits.

It stands between the program and its tensors, real or fake, and sees every operator.
"""

import contextlib
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from megatron_gmai.dry_run.collectives import Call, answer

aten = torch.ops.aten
# Products of two matrices -> the places of the two among the arguments.
PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2)}
PRODUCTS |= {aten.addmm_: (1, 2), aten.baddbmm_: (1, 2), aten.convolution: (0, 1)}
READS = {aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal}


@dataclass
class Block:
    """Device memory behind one or more tensors, from its allocation to its end."""

    bytes: int
    kind: str
    shape: tuple[int, ...]
    dtype: str
    operator: str
    place: str
    born: int  # number of the event
    died: int | None = None


@dataclass(frozen=True)
class Wait:
    """A place in the program where the host waits for the device."""

    what: str
    file: str
    line: int


class DeviceCounter(TorchDispatchMode):
    """Counts the operators run inside it. `kind` and `place` say what they are for.

    fake: the mode that computes shapes, if tensors of `device` have no data; None to count around
    real tensors.
    """

    def __init__(self, device: torch.device, fake: FakeTensorMode | None) -> None:
        super().__init__()
        self.device, self.fake = device, fake
        self.kind, self.place = "weights", "build"
        self.events = self.launches = 0
        self.blocks: list[Block] = []
        self.flops: Counter[str] = Counter()
        self.calls: dict[tuple[str, str], Call] = {}
        self.waits: Counter[Wait] = Counter()
        self.single_precision: Counter[Wait] = Counter()  # matrix products in fp32
        self.group_names: dict[tuple[int, ...], str] = {}
        self._known: dict[int, tuple[weakref.ref, Block]] = {}  # by the storage's address

    @contextlib.contextmanager
    def during(self, kind: str, place: str) -> Iterator[None]:
        """What is allocated and computed in this block is for `kind`, at `place`."""
        before, self.kind, self.place = (self.kind, self.place), kind, place
        try:
            yield
        finally:
            self.kind, self.place = before

    def wrap(self, kind: str, place: str, function: Callable) -> Callable:
        """`function`, its work counted for `kind` at `place`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.during(kind, place):
                return function(*args, **kwargs)

        return counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a tensor what it is
            return func(*args, **kwargs)
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs, tensors)
        self._note_wait(func, args, kwargs, tensors)
        if self._is_on_host(tensors, kwargs):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            if self.device.type != "cpu":
                return out
        elif self.fake is None:
            out = func(*args, **kwargs)
        else:
            out = self._run_fake(func, args, kwargs, tensors)
        self._note_work(func, args, kwargs, out)
        self._note_memory(func, out)
        return out

    def _is_on_host(self, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        """Whether real host tensors alone take part: the host computes with them."""
        if self.fake is None or any(isinstance(x, FakeTensor) for x in tensors):
            return False
        device = kwargs.get("device")
        if self.device.type != "cpu":
            return device is None or torch.device(device).type == "cpu"
        return bool(tensors)  # where the CPU is the device, what is made anew is made on it

    def _run_fake(self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        fake = self.fake
        assert fake is not None
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return _one(args[0].dtype)
        if packet is aten.nonzero:  # every element might be
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if packet in (aten.equal, aten.is_nonzero):
            return True
        if any(not isinstance(x, FakeTensor) for x in tensors):
            to_fake = lambda x: x if isinstance(x, FakeTensor) else fake.from_tensor(x)  # noqa: E731
            args, kwargs = tree_map_only(Tensor, to_fake, (args, kwargs))
        return func(*args, **kwargs)

    def _communicate(self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        group = next(x for x in args if isinstance(x, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        key = (self.group_names.get(ranks, f"{len(ranks)} ranks"), func.overloadpacket.__name__)
        call = self.calls.setdefault(key, Call(ranks=len(ranks)))
        call.calls += 1
        call.bytes += max(
            sum(_bytes(x) for x in tree_iter(arg) if isinstance(x, Tensor)) for arg in args
        )
        if self.fake is None:
            return func(*args, **kwargs)
        return answer(func, args)

    def _note_wait(self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
        packet = func.overloadpacket
        if packet in READS:
            if any(self._is_on_device(x) for x in tensors):
                self.waits[place_outside_torch(packet.__name__)] += 1
        elif packet in (aten._to_copy, aten.copy_) and not _is_asynchronous(packet, args, kwargs):
            ends = [self._is_on_device(x) for x in tensors]
            target = kwargs.get("device")
            if target is not None:
                ends.append(torch.device(target).type == self.device.type)
            if self.device.type != "cpu" and any(ends) and not all(ends):
                self.waits[place_outside_torch("copy between host and device")] += 1

    def note_synchronize(self, *unused: Any) -> None:
        """torch.cuda.synchronize was called."""
        self.waits[place_outside_torch("synchronize")] += 1

    def _note_work(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        packet = func.overloadpacket
        if not func.is_view and packet not in _NO_LAUNCH:
            self.launches += 1
        if packet in PRODUCTS:
            left, right = (args[index] for index in PRODUCTS[packet])
            if packet is aten.convolution:
                self.flops[self.kind] += 2 * out.numel() * math.prod(right.shape[1:])
            else:
                self.flops[self.kind] += 2 * left.numel() * right.shape[-1]
            if torch.float32 in (left.dtype, right.dtype):
                self.single_precision[place_outside_torch(packet.__name__)] += 1
        elif packet in flop_registry:
            self.flops[self.kind] += flop_registry[packet](*args, **kwargs, out_val=out)

    def _note_memory(self, func: Any, out: Any) -> None:
        for tensor in tree_iter(out):
            if not isinstance(tensor, Tensor) or not self._is_on_device(tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            # A view of unknown memory shows what was there before: a batch, say.
            if self._block_of(storage) is not None:
                continue
            if func.is_view and func.overloadpacket not in _MADE:
                continue
            self.events += 1
            block = Block(
                storage.nbytes(),
                self.kind,
                tuple(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
                func.overloadpacket.__name__,
                self.place,
                self.events,
            )
            self.blocks.append(block)
            self._known[key] = weakref.ref(storage), block
            weakref.finalize(storage, self._forget, key, block)

    def _forget(self, key: int, block: Block) -> None:
        self.events += 1
        block.died = self.events
        # Another storage may lie at its address by now.
        if key in self._known and self._known[key][1] is block:
            del self._known[key]

    def _block_of(self, storage: torch.UntypedStorage) -> Block | None:
        known = self._known.get(storage._cdata)
        return known[1] if known is not None and known[0]() is storage else None

    def _is_on_device(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type

    def block_of(self, tensor: Tensor) -> Block | None:
        """The memory that holds a tensor, if it was allocated under this counter."""
        return self._block_of(tensor.untyped_storage())


_MADE = {aten.lift_fresh}  # how torch.tensor hands out what it has made
_NO_LAUNCH = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach}
_NO_LAUNCH |= {aten.set_, aten.resize_, aten._local_scalar_dense, aten.new_empty_strided}


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_asynchronous(packet: Any, args: tuple, kwargs: dict) -> bool:
    place = 2  # copy_(self, src, non_blocking)
    given = args[place] if packet is aten.copy_ and len(args) > place else None
    return bool(given or kwargs.get("non_blocking"))


def place_outside_torch(what: str) -> Wait:
    """The innermost line of the running program that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        ours = f"{__package__.replace('.', '/')}/" if __package__ else ""
        inside = "/torch/" in file or ours in file or file.endswith("/runtime/cpu.py")
        if not inside and not file.startswith("<"):
            break
        frame = frame.f_back
    parts = frame.f_code.co_filename.split("/")
    roots = [i for i, part in enumerate(parts) if part in ("megatron", "megatron_gmai", "kernels")]
    return Wait(what, "/".join(parts[roots[-1] if roots else -1 :]), frame.f_lineno)
