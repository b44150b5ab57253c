"""House rule: no file over 400 lines, no function over 60, so that each can be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megatron_gmai", "kernels", "tools", "examples", "benchmarks", "tests")
SOURCES = [
    *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))),
    *sorted(ROOT.glob("*.py")),
]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def long_functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LONGEST_FILE
    assert not list(long_functions(source))


def test_a_long_function_is_found() -> None:
    body = "\n".join(["    x = 1"] * LONGEST_FUNCTION)
    assert list(long_functions(f"def f():\n{body}\n")) == ["f: 61 lines"]
