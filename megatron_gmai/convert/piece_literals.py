"""Keeps texts like `<0x0A>`, `<unk>` or `<|im_end|>` from becoming the piece of that name.

sentencepiece never looks up the names of its byte, unknown and control pieces in a text. The
tokenizers library does in two places: a unigram model finds every name of its vocabulary, and a BPE
model that ignores merges (which user-defined pieces need) finds the name of a whole pre-token. So
the text is cut inside the name, at a place where sentencepiece cuts it too; where a unigram model
has no such place, the name gets a score that loses against its own characters.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from megatron_gmai.convert.sentencepiece_model import SentencePieceModel


def literal_pattern(
    model: SentencePieceModel, names: Sequence[str], ignores_merges: bool
) -> str | None:
    """Matches the first part of each name, after which to cut; None if no cut is needed.

    `names` are those of all ids, the ones past the pieces among them.
    """
    if model.algorithm == "bpe" and not ignores_merges:
        return None
    literals = list(_unmatched(model, names).values())
    if model.algorithm == "bpe":
        cuts = _bpe_cuts(model, literals)
    else:
        cuts = _unigram_cuts(model, literals)
    rests = defaultdict(list)
    for name, cut in zip(literals, cuts, strict=True):
        if cut:
            rests[name[:cut]].append(re.escape(name[cut:]))
    # BPE finds a name only where it is all of a pre-token; a unigram model finds it anywhere.
    start, end = (r"\A", r"\z") if model.algorithm == "bpe" else ("", "")
    parts = [f"{re.escape(head)}(?=(?:{'|'.join(tails)}){end})" for head, tails in rests.items()]
    return f"{start}(?:{'|'.join(parts)})" if parts else None


def never_best(model: SentencePieceModel, names: Sequence[str]) -> dict[int, float]:
    """Scores for the names that a unigram model cannot be cut inside of: below those of any way to
    spell them.

    A score below all others lowers that of unknown characters too, which changes nothing as long as
    they are in no piece (in a trained model they never are), since then nothing competes with them.

    Raises ValueError where that is not so.
    """
    literals = _unmatched(model, names)
    cuts = _unigram_cuts(model, list(literals.values()))
    uncut = {
        number: name for (number, name), cut in zip(literals.items(), cuts, strict=True) if not cut
    }
    known = {piece.text for piece in model.pieces if piece.kind == "normal"}
    inside = {character for text in known for character in text}
    if uncut and not (inside <= known and set("".join(uncut.values())) <= known):
        raise ValueError(
            f"the unigram model cannot be exported: the texts {sorted(uncut.values())[:8]} would "
            "become the tokens of that name, because it lacks pieces for single characters"
        )
    least = min((piece.score for piece in model.pieces if piece.kind == "normal"), default=0.0)
    return {number: (len(name) + 1) * min(least, -1.0) for number, name in uncut.items()}


def _unmatched(model: SentencePieceModel, names: Sequence[str]) -> dict[int, str]:
    """The ids whose names are not text, and their names."""
    matched = ("normal", "user_defined")
    count = len(model.pieces)
    return {
        number: name
        for number, name in enumerate(names)
        if number >= count or model.pieces[number].kind not in matched
    }


def unknown_to(model: SentencePieceModel) -> Callable[[str], bool]:
    """Tells of a character whether it has no piece: neighbours of this kind share one id."""
    known = {piece.text for piece in model.pieces if piece.kind == "normal"}
    return lambda text: not model.byte_fallback and text not in known


def _bpe_cuts(model: SentencePieceModel, names: list[str]) -> list[int]:
    """For each name the end of a piece of it; a cut there leaves its other pieces as they are."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == "normal"}
    unknown = unknown_to(model)
    cuts = []
    for name in names:
        parts = _bpe(name, scores)
        ends = accumulate(map(len, parts))
        found = [
            end
            for end, (left, right) in zip(ends, pairwise(parts), strict=False)
            if not (unknown(left) and unknown(right))
        ]
        cuts.append(found[0] if found else 0)
    return cuts


def _bpe(text: str, scores: dict[str, float]) -> list[str]:
    """sentencepiece's merging: the neighbours whose union has the best score, leftmost first."""
    parts = list(text)
    while True:
        joins = [
            (scores[left + right], -cut)
            for cut, (left, right) in enumerate(pairwise(parts))
            if left + right in scores
        ]
        if not joins:
            return parts
        cut = -max(joins)[1]
        parts[cut : cut + 2] = [parts[cut] + parts[cut + 1]]


def _unigram_cuts(model: SentencePieceModel, names: list[str]) -> list[int]:
    """For each name a place that no piece can reach across, whatever stands around it."""
    unknown = unknown_to(model)
    joined = {
        pair for piece in model.pieces if piece.kind == "normal" for pair in pairwise(piece.text)
    }
    return [
        next(
            (
                cut
                for cut, (left, right) in enumerate(pairwise(name), start=1)
                if (left, right) not in joined and not (unknown(left) and unknown(right))
            ),
            0,
        )
        for name in names
    ]
