"""Questions and answers about a crop, from what is known of it; answers are one to ten words.

Each question type has one right answer that the image shows. The types `plane`, `window`,
`zone`, `stain`, `channel` and `probe` exist only for the kinds that have the detail.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.quickstart.crops import CHANNELS, CT_WINDOWS, PROBE_SIDES, Crop


@dataclass(frozen=True)
class Facts:
    """What is true of every crop of a kind."""

    modality: str
    organ: str
    caption: str  # with the detail's value where `{}` stands


FACTS = {
    "brain_mr": Facts("MR", "brain", "T1-weighted MR of the brain in the {} plane."),
    "echo": Facts("ultrasound", "heart", "Ultrasound of the heart, transducer at the {}."),
    "abdominal_ct": Facts("CT", "abdomen", "CT of the abdomen shown in a {} window."),
    "chest_xray": Facts("X-ray", "chest", "Chest X-ray with ribs and lung."),
    "colon_histology": Facts("histology", "colon", "Stained section of colon glands."),
    "fundus": Facts("fundus photography", "retina", "Photograph of the retina with vessels."),
    "nuclei": Facts("fluorescence microscopy", "cell nuclei", "Fluorescence of cell nuclei in {}."),
}
MODALITIES = tuple(dict.fromkeys(facts.modality for facts in FACTS.values()))
ORGANS = tuple(facts.organ for facts in FACTS.values())
# Question type -> the question and all its answers.
DETAILS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plane": ("In which plane is this slice?", ("axial", "coronal", "sagittal")),
    "window": ("Which display window is used?", tuple(CT_WINDOWS)),
    "zone": ("Which zone of the chest is shown?", ("upper", "lower")),
    "stain": ("Which stain colour prevails?", ("brown", "blue")),
    "channel": ("In which colour is the channel displayed?", tuple(CHANNELS)),
    "probe": ("On which side of the image is the transducer?", PROBE_SIDES),
}
# A yes/no question, and the kinds of crop for which the answer is yes.
YES_NO = {
    "Was this image taken through a microscope?": ("colon_histology", "nuclei"),
    "Was ionising radiation used for this image?": ("abdominal_ct", "chest_xray"),
    "Does the image show a part of the head?": ("brain_mr", "fundus"),
    "Was this image made with sound waves?": ("echo",),
}
_OPEN = {
    "modality": ("Which imaging modality is this?", "How was this image acquired?"),
    "organ": ("What does the image show?", "Which organ or body part is this?"),
    "caption": ("Describe the image in one sentence.", "Write a short caption."),
}
_LETTERS = "ABCD"

# What a text-only sample asks, and its answer.
TEXT_FACTS = (
    ("Which modality uses sound waves?", "ultrasound"),
    ("Which modality uses a strong magnet?", "MR"),
    ("Which modality turns an X-ray tube around the patient?", "CT"),
    ("Which modality projects the body onto one plane with X-rays?", "X-ray"),
    ("Which modality looks at stained tissue?", "histology"),
    ("Which modality takes a picture of the eye?", "fundus photography"),
    ("Which modality makes marked cells glow?", "fluorescence microscopy"),
    ("Which organ thinks?", "brain"),
    ("Which organ pumps blood?", "heart"),
    ("Which part of the eye sees light?", "retina"),
    ("Which part of the body holds the liver and the kidneys?", "abdomen"),
    ("Which part of the body holds the lungs?", "chest"),
    ("Which organ takes up water from food?", "colon"),
    ("Where is the DNA of a cell?", "cell nuclei"),
)


@dataclass(frozen=True)
class Question:
    """One turn of a conversation; `kind` is the question type that accuracy is reported for."""

    kind: str
    prompt: str
    answer: str


def question_types(crop: Crop) -> tuple[str, ...]:
    """The types that can be asked of this crop."""
    common = ("modality", "organ", "yes_no", "multiple_choice", "caption")
    return (*common, *crop.details)


def ask(question_type: str, crop: Crop, rng: np.random.Generator) -> Question:
    """A question about a crop.

    Args:
        question_type: one of `question_types(crop)`.
        crop: what is asked about.
        rng: chooses among wordings and wrong options.
    """
    facts = FACTS[crop.kind]
    if question_type == "yes_no":
        return _yes_no(crop.kind, rng)
    if question_type == "multiple_choice":
        return _about_image(facts, rng)
    if question_type in DETAILS:
        return Question(question_type, DETAILS[question_type][0], crop.details[question_type])
    answers = {"modality": facts.modality, "organ": facts.organ, "caption": _caption(crop)}
    prompts = _OPEN[question_type]
    return Question(question_type, prompts[int(rng.integers(len(prompts)))], answers[question_type])


def text_only(index: int, rng: np.random.Generator) -> list[Question]:
    """A text-only exchange; every second one is multiple choice."""
    prompt, answer = TEXT_FACTS[index % len(TEXT_FACTS)]
    if (index // len(TEXT_FACTS)) % 2:
        pool = MODALITIES if answer in MODALITIES else ORGANS
        return [choose(prompt, answer, pool, rng)]
    return [Question("text", prompt, answer)]


def pair(first: str, second: str) -> Question:
    """Which organs two images show, in order; the arguments are kinds of crop."""
    answer = f"{FACTS[first].organ}, then {FACTS[second].organ}"
    return Question("pair", "What do the two images show, in order?", answer)


def choose(prompt: str, answer: str, pool: Sequence[str], rng: np.random.Generator) -> Question:
    """A multiple-choice question of four neighbours in the pool; the answer is a letter.

    The options keep the pool's order, or stand in reverse: a small model learns in minutes what a
    list of options means, but not to look up words in any list.
    """
    count = len(_LETTERS)
    start = min(pool.index(answer) // count * count, len(pool) - count)
    options = list(pool[start : start + count])
    if rng.random() < 0.5:
        options.reverse()
    lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    text = "\n".join([prompt, *lines, "Answer with the letter."])
    return Question("multiple_choice", text, _LETTERS[options.index(answer)])


def _about_image(facts: Facts, rng: np.random.Generator) -> Question:
    if rng.random() < 0.5:
        return choose("Which modality is this?", facts.modality, MODALITIES, rng)
    return choose("What is shown?", facts.organ, ORGANS, rng)


def _yes_no(kind: str, rng: np.random.Generator) -> Question:
    """Yes and no are equally often right."""
    positive = bool(rng.random() < 0.5)
    fitting = [prompt for prompt, kinds in YES_NO.items() if (kind in kinds) == positive]
    return Question("yes_no", str(rng.choice(fitting)), "yes" if positive else "no")


def _caption(crop: Crop) -> str:
    template = FACTS[crop.kind].caption
    if "{}" not in template:
        return template
    value = next(iter(crop.details.values()))
    return template.format(value)
