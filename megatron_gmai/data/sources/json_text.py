"""What people write by hand and JSON does not allow."""

import re

# A string without an end goes to the end of the text: each of its quotes tried as a beginning would
# take time that grows with the square of its length.
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]++|\\.)*+"?)|,(?=\s*[}\]])', re.DOTALL)


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
