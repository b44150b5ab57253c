"""OmniMedVQA's own question-answering score (Multi-Modality-Arena bd2999a, 2024-04-21).

The option most like the answer by difflib's ratio is taken, of the first four, whatever the answer
says: a bare letter is compared with the options' texts too.
"""

from megatron_gmai.evaluate.benchmarks.table import Item
from megatron_gmai.evaluate.protocols.similarity import most_similar
from megatron_gmai.evaluate.protocols.verdict import Protocol, Verdict

_MOST_OPTIONS = 4


def _rule(item: Item, answer: str, benchmark: str) -> Verdict | None:
    if not item.options:
        return None
    options = dict(list(item.options.items())[:_MOST_OPTIONS])
    position = most_similar(list(options.values()), answer)
    if position is None:
        return Verdict.none()
    letter = list(options)[position]
    return Verdict.of(options[letter] == item.options.get(item.answer), letter)


OMNIMEDVQA = Protocol("omnimedvqa", "Multi-Modality-Arena bd2999a, question-answering score", _rule)
