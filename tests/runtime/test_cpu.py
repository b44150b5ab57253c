"""The emulation of torch.cuda on a CPU: complete, reversible, and told when it is out of date."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from megatron.core.tensor_parallel import random
from torch.overrides import _get_current_function_mode_stack

import megatron_gmai.training.loop  # noqa: F401  (imports every Megatron module that a run uses)
from megatron_gmai.runtime import cpu

PATCHED: tuple[ModuleType, ...] = (
    *(torch.cuda, torch.cuda.nvtx, random),
    *(module for module, _ in cpu.plain_megatron()),
)

# Names of torch.cuda in Megatron's modules that the emulation leaves alone, and why.
GRAPHS = "CUDA graphs are for GPUs; the graph-safe random state belongs to them"
INFERENCE = "memory reports of dynamic inference, which is not used"
POOLS = "memory pools of NCCL user buffers and of dynamic inference are not used"
STRAGGLERS = "the straggler detector of GPUs is not used"
LEFT_ALONE = {
    "is_available": "answers False by itself",
    "is_initialized": "answers False by itself",
    "device_count": "answers 0 by itself",
    "FloatTensor": "a type to compare with; Tensor.type() answers its name",
    "HalfTensor": "a type to compare with; Tensor.type() answers its name",
    "BFloat16Tensor": "a type to compare with; Tensor.type() answers its name",
    "OutOfMemoryError": "an exception class; needs no GPU",
    "amp.custom_fwd": "decorators; need no GPU",
    "amp.custom_bwd": "decorators; need no GPU",
    "get_device_properties": "asked by FSDP and by kernels of inference, which are not used",
    "get_device_capability": GRAPHS,
    "CUDAGraph": GRAPHS,
    "default_generators": GRAPHS,
    "graph": GRAPHS,
    "graph_pool_handle": GRAPHS,
    "random.get_rng_state": "of the graph-safe state only; the other goes through a patched name",
    "_sleep": GRAPHS,
    "device_memory_used": INFERENCE,
    "memory_snapshot": INFERENCE,
    "MemPool": POOLS,
    "use_mem_pool": POOLS,
    "clock_rate": STRAGGLERS,
    "power_draw": STRAGGLERS,
    "temperature": STRAGGLERS,
    "utilization": STRAGGLERS,
}


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    yield
    cpu.uninstall()


def snapshot() -> list[dict[str, object]]:
    return [dict(vars(module)) for module in PATCHED]


def test_uninstall_gives_torch_back_exactly() -> None:
    before = snapshot()
    cpu.install()
    assert snapshot() != before
    assert cpu.installed()
    cpu.uninstall()
    assert snapshot() == before
    assert _get_current_function_mode_stack() == []
    assert not cpu.installed()


def test_installing_twice_is_installing_once() -> None:
    before = snapshot()
    cpu.install()
    cpu.install()
    assert len(_get_current_function_mode_stack()) == 1
    cpu.uninstall()
    cpu.uninstall()
    assert snapshot() == before


def test_a_name_that_this_version_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.setitem(cpu.TORCH_CUDA, "teleport", lambda: None)
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.teleport does not exist"):
        cpu.install()
    assert not cpu.installed()
    assert snapshot() == before


def test_what_is_meant_for_a_gpu_lands_on_the_cpu() -> None:
    cpu.install()
    tensor = torch.ones(2, device="cuda")
    assert tensor.device.type == "cpu"
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert tensor.cuda() is tensor
    assert tensor.to("cuda:1").device.type == "cpu"
    assert tensor.to(device=torch.device("cuda", 0)).device.type == "cpu"
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"


def test_random_state_is_that_of_the_cpu() -> None:
    cpu.install()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(4, generator=torch.Generator().manual_seed(3)), first)


def test_streams_and_events_do_nothing_and_need_no_gpu() -> None:
    cpu.install()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    event = stream.record_event()
    event.wait(stream)
    event.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
    assert event.query()
    assert stream.query()


def test_every_name_that_megatron_uses_is_handled_or_known() -> None:
    used = {name: module.__name__ for module in megatron_modules() for name in cuda_names(module)}
    assert len(used) > 10  # the walk finds something
    unknown = {name: place for name, place in used.items() if not handled(name)}
    assert unknown == {}


def handled(name: str) -> bool:
    first, _, rest = name.partition(".")
    if first == "nvtx" and rest:
        return rest in cpu.TORCH_CUDA_NVTX
    return first in cpu.TORCH_CUDA or name in LEFT_ALONE


def megatron_modules() -> list[ModuleType]:
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("megatron.core")
        and str(getattr(module, "__file__", None)).endswith(".py")
    ]


def cuda_names(module: ModuleType) -> set[str]:
    """X of every `torch.cuda.X` in a module, the longest form: `nvtx.range_push`."""
    nodes = list(ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    return {
        dotted(node).removeprefix("torch.cuda.")
        for node in nodes
        if isinstance(node, ast.Attribute)
        and id(node) not in inner
        and dotted(node).startswith("torch.cuda.")
    }


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
