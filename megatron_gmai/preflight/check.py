"""A check's result, and how those of many ranks become one table."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

PASS, WARN, FAIL = "pass", "warn", "fail"
ORDER = (PASS, WARN, FAIL)


class Check(NamedTuple):
    """One row of the table."""

    name: str
    status: str
    found: str
    remedy: str = ""  # empty where nothing is to be done


def guarded(name: str, check: Callable[[], Iterable[Check]], remedy: str) -> list[Check]:
    """The results of `check`; an error in it is a result too, since the others must still be told.

    Collectives do not belong in here: a rank that left one early would leave the others waiting.
    """
    try:
        return list(check())
    except (OSError, ValueError, RuntimeError) as error:
        return [Check(name, FAIL, f"{type(error).__name__}: {str(error)[:200]}", remedy)]


def merge(by_rank: Sequence[Sequence[Check]]) -> list[Check]:
    """One row for each name, in the order of the first rank that has it: the worst result, and how
    many ranks share its status."""
    found: dict[str, list[tuple[int, Check]]] = {}
    for rank, checks in enumerate(by_rank):
        for check in checks:
            found.setdefault(check.name, []).append((rank, check))
    merged = []
    for results in found.values():
        rank, worst = max(results, key=lambda result: ORDER.index(result[1].status))
        same = {r for r, check in results if check.status == worst.status}
        if worst.status != PASS and len(by_rank) > 1:
            others = f" and {len(same) - 1} more" if len(same) > 1 else ""
            worst = worst._replace(found=f"{worst.found} (rank {rank}{others})")
        merged.append(worst)
    return merged


def table(checks: Sequence[Check]) -> str:
    """Lines for a terminal; a remedy stands below its row."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status}  {check.name:<{width}}  {check.found}")
        if check.remedy and check.status != PASS:
            lines.append(f"{'':4}  {'':<{width}}  -> {check.remedy}")
    counts = ", ".join(f"{sum(c.status == s for c in checks)} {s}" for s in ORDER)
    return "\n".join([*lines, counts])
