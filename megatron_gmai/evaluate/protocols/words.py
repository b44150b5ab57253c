"""Normalisation of short answers, as VQA's evaluation does it (Antol et al. 2015) and many copies.

The copies differ in a pattern for full stops; both delete 32 of them at most, because a flag stands
where the count belongs, and scores follow from that.
"""

import re

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Full stops: not beside a digit (VLMEvalKit), or not before one (LLaVA-Med).
LONE_STOP = re.compile(r"(?<!\d)\.(?!\d)")
STOP_NOT_BEFORE_DIGIT = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32
_ARTICLES = {"a", "an", "the"}
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(value) for value, word in enumerate(_DIGITS.split())} | {"none": "0"}
# What is missing an apostrophe gets it back; contractions that are words without it are left out.
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've"""
# The original table has these the wrong way round.
_ODD = {
    "twas": "'twas",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, sign in enumerate(word) if sign == "'"]


CONTRACTIONS = {
    damaged: word for word in _CONTRACTIONS.split() for damaged in _without_one_apostrophe(word)
} | _ODD


def strip_punctuation(text: str, stops: re.Pattern[str] = LONE_STOP) -> str:
    """Each sign is deleted if it stands beside a space anywhere, else replaced by a space."""
    comma = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for sign in _SIGNS:
        beside_space = f"{sign} " in text or f" {sign}" in text
        stripped = stripped.replace(sign, "" if beside_space or comma else " ")
    return stops.sub("", stripped, count=_MOST_STOPS)


def normalise_words(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes restored."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def process_answer(text: str) -> str:
    """VLMEvalKit's normal form of a short answer."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return normalise_words(strip_punctuation(text))
