"""The option that is most like an answer, by difflib's ratio."""

from collections.abc import Sequence
from difflib import SequenceMatcher


def most_similar(options: Sequence[str], answer: str) -> int | None:
    """Index of the first option with the highest ratio; None if no option has anything in common.

    The ratio depends on the order of its arguments; the toolkits compare option with answer.
    """
    matcher = SequenceMatcher(None, "", answer)
    best, highest = None, 0.0
    for position, option in enumerate(options):
        matcher.set_seq1(option)
        # Upper bounds first: most options need no comparison of blocks.
        if matcher.real_quick_ratio() <= highest or matcher.quick_ratio() <= highest:
            continue
        ratio = matcher.ratio()
        if ratio > highest:
            best, highest = position, ratio
    return best
