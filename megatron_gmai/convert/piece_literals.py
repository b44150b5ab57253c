"""Keeps the text `<0x0A>` or `<unk>` from becoming the piece of that name.

sentencepiece never looks up the names of its byte and unknown pieces in a text. The tokenizers
library does in two places: a unigram model finds every name of its vocabulary, and a BPE model that
ignores merges (which user-defined pieces need) finds the name of a whole pre-token. So the text is
cut inside the name, at a place where sentencepiece cuts it too.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate, pairwise

from megatron_gmai.convert.sentencepiece_model import SentencePieceModel


def literal_pattern(model: SentencePieceModel, ignores_merges: bool) -> str | None:
    """Matches the first part of each name, after which to cut; None if no cut is needed.

    A name that sentencepiece may join with any neighbour at every place is left alone.
    """
    if model.algorithm == "bpe" and not ignores_merges:
        return None
    names = [piece.text for piece in model.pieces if piece.kind in ("byte", "unknown")]
    cuts = _bpe_cuts(model, names) if model.algorithm == "bpe" else _unigram_cuts(model, names)
    rests = defaultdict(list)
    for name, place in zip(names, cuts, strict=True):
        if place:
            rests[name[:place]].append(re.escape(name[place:]))
    # BPE finds a name only where it is all of a pre-token; a unigram model finds it anywhere.
    start, end = (r"\A", r"\z") if model.algorithm == "bpe" else ("", "")
    parts = [f"{re.escape(head)}(?=(?:{'|'.join(tails)}){end})" for head, tails in rests.items()]
    return f"{start}(?:{'|'.join(parts)})" if parts else None


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
        places = [
            end
            for end, (left, right) in zip(ends, pairwise(parts), strict=False)
            if not (unknown(left) and unknown(right))
        ]
        cuts.append(places[0] if places else 0)
    return cuts


def _bpe(text: str, scores: dict[str, float]) -> list[str]:
    """sentencepiece's merging: the neighbours whose union has the best score, leftmost first."""
    parts = list(text)
    while True:
        joins = [
            (scores[left + right], -place)
            for place, (left, right) in enumerate(pairwise(parts))
            if left + right in scores
        ]
        if not joins:
            return parts
        place = -max(joins)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def _unigram_cuts(model: SentencePieceModel, names: list[str]) -> list[int]:
    """For each name a place that no piece can reach across, whatever stands around it."""
    unknown = unknown_to(model)
    joined = {
        pair for piece in model.pieces if piece.kind == "normal" for pair in pairwise(piece.text)
    }
    return [
        next(
            (
                place
                for place, (left, right) in enumerate(pairwise(name), start=1)
                if (left, right) not in joined and not (unknown(left) and unknown(right))
            ),
            0,
        )
        for name in names
    ]
