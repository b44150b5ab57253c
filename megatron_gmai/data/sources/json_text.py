"""What people write by hand and JSON does not allow, or leaves open."""

import re
from collections import Counter
from typing import Any

# A string without an end goes to the end of the text: each of its quotes tried as a beginning would
# take time that grows with the square of its length.
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]++|\\.)*+"?)|,(?=\s*[}\]])', re.DOTALL)


class Repeated(ValueError):
    """A name that stands twice in one object."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, as json's `object_pairs_hook`. JSON leaves open what two entries
    of one name mean, and Python loses the first. Raises Repeated."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise Repeated(f"{name[:80]!r} stands twice")
    return found


def without_trailing_commas(text: str, instead: str = "") -> tuple[str, int]:
    """Puts `instead` in the place of commas before a closing bracket, but not of those inside
    strings. Returns the text and their number."""
    count = 0

    def keep(match: re.Match[str]) -> str:
        nonlocal count
        if match.group(1) is None:
            count += 1
            return instead
        return match.group(1)

    return _TRAILING_COMMA.sub(keep, text), count
