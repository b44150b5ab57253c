"""One line of the result."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A number that was measured, and whether it is as it should be."""

    check: str
    name: str
    value: float
    unit: str
    bar: str = ""  # what it has to be
    holds: bool | None = None  # None where nothing was promised
    note: str = ""


def at_most(check: str, name: str, value: float, unit: str, bar: float) -> Finding:
    return Finding(check, name, value, unit, f"at most {bar:g}", value <= bar)


def failed(check: str, name: str, reason: str) -> Finding:
    """A check that came to no number."""
    return Finding(check, name, float("nan"), "", "runs", False, reason)
