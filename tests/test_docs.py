"""docs/code.md lists every source file by the first sentence of its docstring.

`python -m tests.test_docs` writes it anew.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "code.md"
PAGES = [
    ROOT / "Makefile",
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").glob("*.md"),
]
# Paths of the project in prose, commands and links; not those of what a command is going to write.
NAMED = re.compile(
    r"(?<![\w./-])((?:tests|tools|examples|benchmarks|kernels|megatron_gmai|docs|requirements)"
    r"/[\w/-]+\.(?:py|txt|md|args|json|sbatch|png|svg|toml))\b"
)
FOLDERS = ("megatron_gmai", "kernels", "tools", "examples", "benchmarks")
HEAD = """# The code, a line per file

The first sentence of each file's docstring (`python -m tests.test_docs` writes this page). The
import direction of the packages is in [CONTRIBUTING.md](../CONTRIBUTING.md).
"""


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line; "" without one."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!])\s", paragraph)[0].rstrip(".")


def page() -> str:
    """What docs/code.md should say."""
    lines = [HEAD, "```", f"pretrain_gmai_vl.py  {first_sentence(ROOT / 'pretrain_gmai_vl.py')}"]
    for folder in FOLDERS:
        lines += tree(ROOT / folder, 0)
    return "\n".join([*lines, "```", ""])


def tree(folder: Path, depth: int) -> list[str]:
    files = [path for path in sorted(folder.glob("*.py")) if first_sentence(path)]
    folders = [path for path in sorted(folder.iterdir()) if any(path.rglob("*.py"))]
    width = max((len(path.name) for path in files), default=0)
    pad = "  " * depth
    lines = [f"{pad}{folder.name}/"]
    lines += [f"{pad}  {path.name:{width}}  {first_sentence(path)}" for path in files]
    for inner in folders:
        if inner.is_dir() and inner.name != "__pycache__":
            lines += tree(inner, depth + 1)
    return lines


def test_every_file_has_its_line() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.test_docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    named = set(NAMED.findall(page.read_text(encoding="utf-8")))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
