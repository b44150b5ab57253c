"""Columns of numbers as pandas reads and VLMEvalKit then writes them: "07" as "7", and every number
of a column with a gap or a fraction as a float, "1" as "1.0"."""

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_gmai.evaluate.benchmarks.table import Item
from megatron_gmai.evaluate.benchmarks.write import PANDAS_MISSING

_WHOLE = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def as_pandas_reads(answered: Sequence[tuple[Item, str]]) -> list[tuple[Item, str]]:
    """Questions and answers with their options, truths and answers as texts of what is read."""
    letters = sorted({letter for item, _ in answered for letter in item.options})
    options = {
        letter: read_column([item.options.get(letter, "") for item, _ in answered])
        for letter in letters
    }
    truths = read_column([item.answer for item, _ in answered])
    said = read_column([answer for _, answer in answered])
    return [
        (_item(item, {letter: options[letter][row] for letter in letters}, truths[row]), said[row])
        for row, (item, _) in enumerate(answered)
    ]


def _item(item: Item, options: dict[str, str], truth: str) -> Item:
    options = {letter: text for letter, text in options.items() if text}
    same = options == item.options and truth == item.answer
    return item if same else replace(item, options=options, answer=truth)


def read_column(cells: Sequence[str]) -> list[str]:
    """The cells as texts of what pandas makes of them; missing ones stay as they are."""
    there = [cell for cell in cells if not _missing(cell)]
    if not there or not all(_NUMBER.fullmatch(cell.strip()) for cell in there):
        return list(cells)
    whole = all(_WHOLE.fullmatch(cell.strip()) for cell in there)
    if whole and any(abs(int(cell)) >= 2**63 for cell in there):
        return list(cells)  # which pandas keeps as text
    if whole and len(there) == len(cells):
        return [str(int(cell)) for cell in cells]
    return [cell if _missing(cell) else str(float(cell)) for cell in cells]


def _missing(cell: str) -> bool:
    return cell == "" or cell in PANDAS_MISSING
