"""Each protocol on the cases that its toolkit's own code was run on."""

import time

import pytest

from megatron_gmai.evaluate.protocols import llava_med, lmms_eval, medevalkit, mmmu, vlmevalkit
from megatron_gmai.evaluate.protocols.registry import PROTOCOLS
from megatron_gmai.evaluate.protocols.verdict import Verdict
from megatron_gmai.evaluate.protocols.words import process_answer, strip_punctuation
from tests.evaluate.tables import OPTIONS, item


def judge(
    protocol: str,
    truth: str,
    answer: str,
    options: dict[str, str] | None = None,
    benchmark: str = "Set",
    answer_type: str = "",
) -> Verdict:
    columns = {"answer_type": answer_type} if answer_type else {}
    verdict = PROTOCOLS[protocol].rule(item(truth, options, **columns), answer, benchmark)
    assert verdict is not None
    return verdict


class TestVLMEvalKit:
    @pytest.mark.parametrize(
        ("answer", "letter"),
        [
            *(
                (answer, "B")
                for answer in (
                    "B",
                    "B.",
                    "(B)",
                    "**B**",
                    "Answer: B",
                    "B. MRI",
                    "MRI",
                    "The image is an MRI",
                    "The best option is B because the signal",
                    "the answer is b",
                )
            ),
            *(
                (answer, None)
                for answer in (
                    "b",
                    '"B"',
                    "'B'",
                    "B$",
                    "A and B",
                    "C, D",
                    "mri or ct",
                    "xray",
                    "The answer is E",
                    "B\n\nExplanation: the image shows the brain in axial plane",
                )
            ),
            ("A patient with lesion", "A"),
            ("This is a chest X-ray, so A chest film", "A"),
            ("answer is C or D", "C"),
            ("The image is a fracture", "A"),
            ("Failed to obtain answer via API", None),
            ("Sorry, I can't help with images of people yet. B", "Z"),
            ("I can't process this file.", "Z"),
            ("I'm sorry, but without the image provided", "Z"),
            ("Cannot determine the answer", "Z"),
            ("Z", "Z"),
            ("B one two three", "B"),
            ("B one two three four", None),
        ],
    )
    def test_an_answer_is_matched_to_an_option(self, answer: str, letter: str | None) -> None:
        assert vlmevalkit.match_option(answer, OPTIONS) == letter

    def test_the_older_release_does_not_know_the_phrase(self) -> None:
        for answer in ("the answer is b", "answer is C or D"):
            assert judge("vlmevalkit-2024", "B", answer, OPTIONS).unanswered
        assert judge("vlmevalkit-2024", "B", "The answer is B", OPTIONS).score == 1

    def test_the_text_of_a_failed_request_is_still_searched(self) -> None:
        options = {"A": "a mass in the left lung", "B": "via API", "C": "an effusion"}
        assert vlmevalkit.match_option("Failed to obtain answer via API C", options) == "B"

    def test_a_long_answer_is_not_searched_for_options(self) -> None:
        assert vlmevalkit.match_option("mri " + "word " * 20, OPTIONS) is None

    def test_options_that_pandas_does_not_see_cannot_be_chosen(self) -> None:
        options = {"A": "mass", "B": "None"}
        assert judge("vlmevalkit", "B", "B", options).unanswered
        assert judge("vlmevalkit", "A", "A", options).score == 1

    def test_an_answer_that_pandas_does_not_see_reads_nan(self) -> None:
        options = {"A": "an", "B": "mass"}
        for answer in ("None", "NA", ""):
            assert judge("vlmevalkit", "A", answer, options).score == 1

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ("There is no lesion", "No"),
            ("normal", "Unknown"),
            ("Yes and no", "Unknown"),
            ("yes/no", "Unknown"),
            ("Yes-definitely", "Yes"),
            ("YES.", "Yes"),
        ],
    )
    def test_yes_or_no(self, answer: str, said: str) -> None:
        assert vlmevalkit.extract_yes_no(answer) == said

    def test_an_open_question_of_mmmu_is_a_choice_of_the_truth_or_others(self) -> None:
        assert judge("vlmevalkit", "7.5", "A", benchmark="MMMU_DEV_VAL").score == 1
        assert judge("vlmevalkit", "7.5", "It is 7.5", benchmark="MMMU_DEV_VAL").score == 1
        assert judge("vlmevalkit", "7.5", "Other Answers", benchmark="MMMU_DEV_VAL").score == 0

    def test_other_open_questions_have_no_rule(self) -> None:
        for truth in ("left lung", "yes"):
            assert PROTOCOLS["vlmevalkit"].rule(item(truth), truth, "PathVQA_TEST") is None


class TestWords:
    @pytest.mark.parametrize(
        ("text", "stripped"),
        [
            ("x-ray", "x ray"),
            ("1,000 mm", "1000 mm"),
            ("3.5 cm.", "3.5 cm"),
            ("e.g. no.", "eg no"),
            ("a." * 40, "a" * 32 + "a." * 8),
        ],
    )
    def test_punctuation(self, text: str, stripped: str) -> None:
        assert strip_punctuation(text) == stripped

    @pytest.mark.parametrize(
        ("text", "normal"),
        [
            ("The Left Lung.", "left lung"),
            ("None", "0"),
            ("A 1,000", "1000"),
            ("T1-weighted, axial", "t1 weighted axial"),
            ("it isnt\tthe two", "it isn't 2"),
            ("wouldntve wouldn'tve", "wouldntve wouldn't've"),
        ],
    )
    def test_a_short_answer(self, text: str, normal: str) -> None:
        assert process_answer(text) == normal


class TestMedEvalKit:
    @pytest.mark.parametrize(
        ("answer", "letter", "fallback"),
        [
            ("B) MRI", "B", True),
            ("I think it is B", "A", True),
            ("", "A", True),
            ("none", "D", True),
            ("b", "B", False),
            ("B\n\nbecause of the signal", "B", False),
            ("The signal is bright.\n\nB.", "B", False),
            ("The answer is B.", "B", False),
            ("Answer: MRI. Not CT", "B", False),
            ("**Answer**: x-ray", "C", False),
            ("so \\boxed{B}", "B", False),
            ("<answer>PET</answer>", "D", False),
        ],
    )
    def test_a_choice(self, answer: str, letter: str, fallback: bool) -> None:
        verdict = judge("medevalkit", letter, answer, OPTIONS)
        assert (verdict.score, verdict.parsed, verdict.fallback) == (1, letter, fallback)
        assert not verdict.unanswered

    @pytest.mark.parametrize(
        ("truth", "answer", "score"),
        [
            ("no", "normal", 1),
            ("no", "unknown", 1),
            ("yes", "yes, there is", 1),
            ("yes", "yes and no", 0),
            ("yes", "there is", 0),
            ("Yes", "YES", 1),
        ],
    )
    def test_yes_or_no_is_found_inside_of_words(
        self, truth: str, answer: str, score: float
    ) -> None:
        assert judge("medevalkit", truth, answer, benchmark="VQA-RAD").score == score

    def test_slake_knows_only_lower_case_truths_as_yes_or_no(self) -> None:
        for truth, answer, score in (
            ("Yes", "yes, it is", 0),
            ("Yes", "Yes.", 1),
            ("yes", "yes, it is", 1),
        ):
            verdict = judge("medevalkit", truth, answer, None, "SLAKE", "CLOSED")
            assert verdict.score == score

    def test_an_open_answer_must_be_equal(self) -> None:
        assert judge("medevalkit", "Left lung", "LEFT LUNG").score == 1
        assert judge("medevalkit", "Left lung", "left lung.").score == 0
        assert judge("medevalkit", "Left lung", "the answer is left lung").score == 0
        assert judge("medevalkit", " left lung", "Answer:left lung").score == 1

    def test_options_of_omnimedvqa_are_compared_with_their_letters(self) -> None:
        assert judge("medevalkit", "B", "B. MRI", OPTIONS, "OmniMedVQA").score == 1
        assert medevalkit.choose(["A. CT", "B. MRI"], "b. mri") == (1, False)
        assert medevalkit.choose(["A. CT", "B. MRI"], "mri") == (1, True)

    def test_open_answers_of_mmmu_are_never_right(self) -> None:
        assert judge("medevalkit", "7.5", "7.5", benchmark="MMMU_Health_Medicine").score == 0

    def test_the_last_box_counts_and_braces_nest(self) -> None:
        assert medevalkit.boxed("\\boxed{A} or \\boxed{x{y}z }") == "x{y}z"
        assert medevalkit.boxed("\\boxed{open") == medevalkit.boxed("none") == "None"


class TestLLaVAMed:
    @pytest.mark.parametrize(
        ("truth", "answer", "score"),
        [
            ("Yes", "yes, there is one", 1),
            ("no", "normal", 1),
            ("no", "unknown", 1),
            ("yes", "yes or no", 1),
            ("yes", "there is one", 0),
        ],
    )
    def test_closed(self, truth: str, answer: str, score: float) -> None:
        assert judge("llava-med", truth, answer).score == score

    def test_closed_that_is_not_yes_or_no_needs_one_of_the_words(self) -> None:
        assert judge("llava-med", "Left", "left", answer_type="CLOSED").unanswered
        assert judge("llava-med", "Left", "No, the left one", answer_type="CLOSED").score == 1

    @pytest.mark.parametrize(
        ("truth", "answer", "score"),
        [
            ("left lung", "it is the left side", 0.5),
            ("left lung", "a lung, the left lung", 1),
            ("left lung", "", 0),
            ("two masses", "2 masses", 1),
            ("left lung", "left left left", 0.75),
        ],
    )
    def test_open_is_recall_of_words(self, truth: str, answer: str, score: float) -> None:
        assert judge("llava-med", truth, answer).score == pytest.approx(score)

    def test_full_stops_after_digits_go_too(self) -> None:
        assert llava_med.normalise("3.5 cm, 3.") == "3.5 cm 3"

    def test_options_have_no_rule(self) -> None:
        assert PROTOCOLS["llava-med"].rule(item("A", OPTIONS), "A", "Set") is None


class TestOmniMedVQA:
    @pytest.mark.parametrize(
        ("answer", "letter"),
        [("MRI", "B"), ("x-ray image", "C"), ("The image is a PET", "D"), ("It is CT", "A")],
    )
    def test_the_most_similar_option_is_taken(self, answer: str, letter: str) -> None:
        assert judge("omnimedvqa", letter, answer, OPTIONS).score == 1

    def test_a_letter_is_compared_with_texts(self) -> None:
        assert judge("omnimedvqa", "B", "B", OPTIONS).unanswered
        assert judge("omnimedvqa", "B", "C", OPTIONS).parsed == "A"

    def test_the_fifth_option_does_not_exist(self) -> None:
        verdict = judge("omnimedvqa", "E", "echo", OPTIONS | {"E": "echo"})
        assert verdict.score == 0 and verdict.parsed != "E"

    def test_options_of_the_same_text_are_one(self) -> None:
        assert judge("omnimedvqa", "B", "MR", {"A": "MR", "B": "MR"}).score == 1


class TestMMMU:
    @pytest.mark.parametrize(
        ("answer", "letter"),
        [
            ("(A) or (B)", "B"),
            ("A and B then A", "A"),
            ("B", "B"),
            (" B. ", "B"),
            ("MRI", None),
            ("I would say that this is mri, not x-ray", "C"),
            ("this is certainly not one of them", None),
            ("b", None),
        ],
    )
    def test_a_choice(self, answer: str, letter: str | None) -> None:
        assert mmmu.parse_choice(answer, OPTIONS) == letter

    def test_where_an_option_is_drawn_the_expectation_is_the_score(self) -> None:
        verdict = judge("mmmu", "B", "MRI", OPTIONS)
        assert (verdict.score, verdict.unanswered, verdict.fallback) == (0.25, True, True)

    @pytest.mark.parametrize(
        ("truth", "answer", "score"),
        [
            ("7.5", "so the result is 7.50", 1),
            ("1,000", "It is 1000.", 1),
            ("left lung", "The answer is the left lung", 1),
            ("['left', 'right']", "it is right", 1),
            ("7.5", "75", 0),
            ("x", "the value x = 3", 0),
        ],
    )
    def test_an_open_answer(self, truth: str, answer: str, score: float) -> None:
        assert judge("mmmu", truth, answer).score == score

    def test_an_answer_of_nothing_but_digits_takes_no_quadratic_time(self) -> None:
        begun = time.process_time()
        assert judge("mmmu", "7", "7" * 20_000).score == 0
        assert time.process_time() - begun < 4


class TestLmmsEval:
    @pytest.mark.parametrize(
        ("text", "normal"),
        [
            ("X-Ray.", "xray"),
            ("Left (lung)  lobe!", "left lobe"),
            ("是的。", "yes"),
            ("没有", "no"),
            ("Nope", "no"),
            ("肺（左）", "肺"),
        ],
    )
    def test_normal_form(self, text: str, normal: str) -> None:
        assert lmms_eval.normalise(text) == normal

    def test_answers_are_right_if_equal_in_it(self) -> None:
        assert judge("lmms-eval", "Yes", "true").score == 1
        assert judge("lmms-eval", "left lung", "the left lung").score == 0
        assert judge("lmms-eval", "left lung", "...").unanswered
