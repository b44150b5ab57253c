"""The import direction of the packages, read from the sources without importing them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_gmai"

# What stands above the packages: plain settings and arithmetic. Modules in here may use each other.
CONFIG = {
    "config",
    "presets",
    "layout",
    "layout_rules",
    "weights",
    "chat_formats",
    "tokenizer_file",
    "validation",
    "cli",
}
# layer -> layers it may import, besides itself and the configuration
ALLOWED = {
    "config": set[str](),
    "gmai_kernels": set[str](),
    "runtime": set[str](),
    "model": {"gmai_kernels", "runtime"},
    "data": set[str](),
    "convert": set[str](),
    "planner": set[str](),
    "observe": set[str](),
    "training": {"model", "data", "convert", "runtime", "planner", "observe"},
    "dry_run": {"gmai_kernels", "training", "model", "data", "runtime", "planner"},
    "evaluate": {"model", "data", "runtime"},
    "verification": {"evaluate", "training", "model", "convert", "runtime"},
    "report": {"data", "planner"},
    "gpu_check": {"training", "model", "data", "convert", "runtime", "planner", "dry_run"},
    "preflight": {"data", "convert", "runtime", "planner"},
}
# The rooms of data/, each with the rooms it may import besides itself and the files on top.
DATA_ROOMS = {
    "plan": set[str](),
    "text": set[str](),
    "sources": {"text"},
    "images": {"text"},
    "shards": {"plan", "text", "sources", "images"},
    "loading": {"plan", "text", "images", "sources", "shards"},
    "inspection": {"text", "images", "sources", "shards"},
}
DATA_TOP = {"files", "ledger", "lock", "pool", "progress", "schema"}
MEGATRON_LAYERS = {"runtime", "model", "training", "evaluate", "dry_run"}
MEGATRON_LAYERS |= {"gpu_check", "verification"}


def layer_of(module: str) -> str | None:
    """`megatron_gmai.data.images.decode` -> `data`; None for modules that are not ours."""
    parts = module.split(".")
    if parts[0] == "gmai_kernels":
        return "gmai_kernels"
    if parts[0] != "megatron_gmai" or len(parts) == 1:
        return None
    return "config" if parts[1] in CONFIG else parts[1]


def imported(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Every name that a source of `package` imports, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    parts = path.parent.relative_to(ROOT).parts
    return ".".join(["gmai_kernels", *parts[1:]] if parts[0] == "kernels" else parts)


def imports_of(path: Path) -> set[str]:
    return set(imported(ast.parse(path.read_text()), package_of(path)))


def sources() -> list[tuple[str, Path]]:
    found = [("gmai_kernels", path) for path in sorted((ROOT / "kernels").rglob("*.py"))]
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        layer = layer_of(".".join(parts))
        if layer is not None and parts[1:] != ("__init__",):
            found.append((layer, path))
    return found


SOURCES = sources()
IDS = [str(path.relative_to(ROOT)) for _, path in SOURCES]


@pytest.mark.parametrize(("layer", "path"), SOURCES, ids=IDS)
def test_a_module_imports_only_from_layers_above_it(layer: str, path: Path) -> None:
    assert layer in ALLOWED, f"{path} lies in no known layer"
    may = ALLOWED[layer] | {layer} | ({"config"} if layer != "gmai_kernels" else set())
    used = {name: layer_of(name) for name in imports_of(path)}
    wrong = [name for name, target in used.items() if target is not None and target not in may]
    assert not wrong, f"{layer} may import {sorted(may)}"


@pytest.mark.parametrize("room", DATA_ROOMS)
def test_a_room_of_data_imports_only_from_the_rooms_before_it(room: str) -> None:
    may = DATA_ROOMS[room] | {room} | DATA_TOP
    for path in sorted((PACKAGE / "data" / room).rglob("*.py")):
        names = [name.split(".") for name in imports_of(path)]
        wrong = [n for n in names if n[:2] == ["megatron_gmai", "data"] and n[2] not in may]
        assert not wrong, f"{path.name}: data/{room} may import {sorted(may)}"


@pytest.mark.parametrize(("layer", "path"), SOURCES, ids=IDS)
def test_megatron_is_imported_where_models_are_built_and_nowhere_else(
    layer: str, path: Path
) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert "megatron" not in roots or layer in MEGATRON_LAYERS


@pytest.mark.parametrize(("layer", "path"), SOURCES, ids=IDS)
def test_nobody_imports_the_programs(layer: str, path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & {"tools", "examples", "tests", "pretrain_gmai_vl"}


@pytest.mark.parametrize(
    "path", [path for layer, path in SOURCES if layer in {"data", "convert"}], ids=str
)
def test_data_and_conversion_know_no_process_groups(path: Path) -> None:
    # The checkpoint format of torch.distributed is read from files, without a process group.
    groups = [
        name
        for name in imports_of(path)
        if name.startswith("torch.distributed")
        and not name.startswith("torch.distributed.checkpoint")
    ]
    assert not groups


@pytest.mark.parametrize(
    "path", [path for layer, path in SOURCES if layer in {"config", "planner"}], ids=str
)
def test_configuration_and_planner_read_instantly(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & {"torch", "numpy", "megatron", "transformers"}


@pytest.mark.parametrize(("layer", "path"), SOURCES, ids=IDS)
def test_transformers_is_never_needed_to_import_a_module(layer: str, path: Path) -> None:
    """It belongs to the `hf` extra: optional paths import it inside the function that uses it."""
    top = [node for node in ast.parse(path.read_text()).body if not _is_code(node)]
    names = {name.split(".")[0] for node in top for name in imported(node)}
    assert "transformers" not in names


def _is_code(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


class TestTheReader:
    """The checks above can fail: what they read is what is written."""

    def test_imports_inside_functions_and_of_submodules_are_seen(self) -> None:
        tree = ast.parse("def f():\n    from megatron_gmai import data\nimport megatron.core")
        assert set(imported(tree)) == {"megatron_gmai.data", "megatron.core"}

    def test_relative_imports_are_resolved(self) -> None:
        tree = ast.parse("from . import a\nfrom ..model import b")
        assert set(imported(tree, "megatron_gmai.data")) == {
            "megatron_gmai.data.a",
            "megatron_gmai.model.b",
        }

    def test_layers_are_told_apart(self) -> None:
        assert layer_of("megatron_gmai.data.images.decode") == "data"
        assert layer_of("megatron_gmai.validation.validate") == "config"
        assert layer_of("gmai_kernels.rmsnorm") == "gmai_kernels"
        assert layer_of("torch.nn") is None
