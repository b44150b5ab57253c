"""The quick start's data set: real images, true answers, disjoint splits, the same every time."""

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
from PIL import Image

from examples.quickstart import run, sources
from examples.quickstart.build import DataSet, Sizes, build, guess_accuracy
from examples.quickstart.crops import HELD_OUT, KINDS, SINGLE_IMAGES, TRAIN, crops
from examples.quickstart.questions import YES_NO
from examples.quickstart.steps import StepFailed, Steps, command
from examples.quickstart.tokenizer import SPECIAL_TOKENS
from megatron_gmai.data.sources.mixture import read_list

SMALL = Sizes(train=16, held_out=48, text=32, train_pairs=6, held_out_pairs=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return build(tmp_path_factory.mktemp("small"), SMALL)


def read(path: Path) -> Any:
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def training_samples(made: DataSet) -> dict[str, list[dict[str, Any]]]:
    folder = made.list_file.parent
    return {name: read(folder / e["annotations"]) for name, e in read(made.list_file).items()}


def answer(sample: dict[str, Any]) -> str:
    return str(sample["conversations"][-1]["value"])


class TestSizes:
    """What `make train` uses: enough of each class. Only the arithmetic, nothing is rendered."""

    def test_each_class_has_150_training_and_40_held_out_questions(self) -> None:
        assert len(KINDS) >= 6
        assert Sizes().train >= 150
        assert Sizes().held_out >= 40


class TestSamples:
    def test_every_class_is_in_both_splits(self, made: DataSet) -> None:
        held_out = Counter(sample["class"] for sample in read(made.held_out))
        assert held_out == {**dict.fromkeys(KINDS, SMALL.held_out), "several": 4}
        counts = {name: len(samples) for name, samples in training_samples(made).items()}
        assert counts == {**dict.fromkeys(KINDS, SMALL.train), "pairs": 6, "text_only": 32}

    def test_the_list_file_is_read_by_the_trainer(self, made: DataSet) -> None:
        listed = {source.name: source.sample_ratio for source in read_list(made.list_file)}
        assert listed == {**dict.fromkeys(KINDS, 1.0), "pairs": 1.0, "text_only": 0.5}

    def test_turns_alternate_and_images_match_their_placeholders(self, made: DataSet) -> None:
        everything = [s for samples in training_samples(made).values() for s in samples]
        for sample in [*everything, *read(made.held_out)]:
            turns = sample["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            names = sample.get("image", [])
            names = [names] if isinstance(names, str) else names
            placeholders = [turn["value"].count("<image>") for turn in turns]
            assert placeholders == [len(names)] + [0] * (len(turns) - 1)
            assert all((made.list_file.parent / name).is_file() for name in names)

    def test_there_are_multi_turn_multi_image_and_text_only_samples(self, made: DataSet) -> None:
        samples = training_samples(made)
        assert any(len(s["conversations"]) > 2 for s in samples["brain_mr"])
        assert all(len(s["image"]) == 2 for s in samples["pairs"])
        assert all("image" not in s for s in samples["text_only"])

    def test_multiple_choice_answers_name_a_true_option(self, made: DataSet) -> None:
        truth = {"brain_mr": {"MR", "brain"}, "fundus": {"fundus photography", "retina"}}
        checked = 0
        for sample in read(made.held_out):
            if sample["question_type"] == "multiple_choice" and sample["class"] in truth:
                lines = sample["conversations"][0]["value"].splitlines()
                options = dict(line.split(". ", 1) for line in lines if line[1:3] == ". ")
                right = [k for k, option in options.items() if option in truth[sample["class"]]]
                assert len(options) == 4
                assert [answer(sample)] == right
                checked += 1
        assert checked >= 8

    def test_yes_is_the_answer_exactly_when_the_question_is_true(self, made: DataSet) -> None:
        asked = [s for s in read(made.held_out) if s["question_type"] == "yes_no"]
        assert {answer(sample) for sample in asked} == {"yes", "no"}
        for sample in asked:
            prompt = sample["conversations"][0]["value"].removeprefix("<image>\n")
            assert (answer(sample) == "yes") == (sample["class"] in YES_NO[prompt])


class TestGuessing:
    def test_counts_the_commonest_answer_of_each_type(self) -> None:
        samples = [
            {"question_type": name, "conversations": [{"value": "?"}, {"value": value}]}
            for name, value in [("a", "x"), ("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")]
        ]
        assert guess_accuracy(samples) == {"overall": 3 / 5, "a": 2 / 3, "b": 1 / 2}

    def test_guessing_scores_less_than_035(self, made: DataSet) -> None:
        assert made.guess_accuracy < 0.35


class TestSplits:
    def test_train_and_held_out_crops_share_no_pixel(self, made: DataSet) -> None:
        places = read(made.list_file.parent / "data_set.json")["crops"]
        for kind in KINDS:
            train, held_out = (
                [(p["section"], p["box"]) for p in places if (p["class"], p["split"]) == (kind, s)]
                for s in (TRAIN, HELD_OUT)
            )
            assert train and held_out
            for section, box in train:
                for other_section, other in held_out:
                    apart = box[2] <= other[0] or other[2] <= box[0]
                    apart = apart or box[3] <= other[1] or other[3] <= box[1]
                    assert apart or section != other_section

    @pytest.mark.parametrize("kind", SINGLE_IMAGES)
    def test_regions_of_the_splits_do_not_overlap(self, kind: str) -> None:
        regions = SINGLE_IMAGES[kind].regions
        for train in regions[TRAIN]:
            for held_out in regions[HELD_OUT]:
                rows = train.rows[1] <= held_out.rows[0] or held_out.rows[1] <= train.rows[0]
                columns = train.columns[1] <= held_out.columns[0]
                assert rows or columns or held_out.columns[1] <= train.columns[0]


class TestDeterminism:
    def test_a_second_build_writes_the_same_bytes(self, made: DataSet, tmp_path: Path) -> None:
        def digests(folder: Path) -> dict[str, str]:
            files = [path for path in folder.rglob("*") if path.is_file()]
            return {
                str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in files
            }

        build(tmp_path, SMALL)
        assert digests(tmp_path) == digests(made.list_file.parent)


class TestImages:
    def test_formats_are_mixed_and_some_are_16_bits_deep(self, made: DataSet) -> None:
        files = sorted((made.list_file.parent / "images").iterdir())
        modes = Counter((path.suffix, Image.open(path).mode) for path in files)
        assert {(".jpg", "L"), (".jpg", "RGB"), (".png", "RGB"), (".png", "I;16")} <= set(modes)

    @pytest.mark.parametrize("kind", KINDS)
    def test_crops_have_contrast_and_stay_in_range(self, kind: str) -> None:
        for crop in islice(crops(kind, HELD_OUT, seed=0), 5):
            assert 0 <= crop.pixels.min() < crop.pixels.max() <= 1
            assert crop.pixels.std() > 0.02

    def test_bone_is_bright_in_the_radiograph(self) -> None:
        chest = sources.chest_xray()
        spine, lung = chest[900:1000, 880:960], chest[500:600, 350:450]
        assert spine.mean() > lung.mean() + 0.2

    def test_a_missing_package_is_named_with_its_remedy(self) -> None:
        with pytest.raises(ValueError, match="nilearn is installed but holds no nowhere.nii"):
            sources.package_file("nilearn", "nowhere.nii")


class TestTokenizer:
    def test_special_tokens_are_one_piece_and_text_survives(self, made: DataSet) -> None:
        model = spm.SentencePieceProcessor(model_file=str(made.tokenizer))
        assert (model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2)
        for token in SPECIAL_TOKENS:
            assert model.encode(f"a{token}b", out_type=str)[1] == token
        for text in ("<|im_start|>user\nWhich organ?  ", "\n\n", "Zürich 心"):
            assert model.decode(model.encode(text)) == text


class TestSteps:
    def test_a_complete_step_is_not_done_again(self, tmp_path: Path) -> None:
        steps, product, calls = Steps(tmp_path / "steps"), tmp_path / "product", []

        def work() -> None:
            calls.append(1)
            product.write_text("made")

        for inputs in (["a"], ["a"], ["b"]):
            steps.run("work", inputs, [product], work)
        assert len(calls) == 2
        product.unlink()
        steps.run("work", ["b"], [product], work)
        assert len(calls) == 3

    @pytest.mark.parametrize(
        ("inputs", "continues", "kept"),
        [("a", True, True), ("b", True, False), ("a", False, False)],
    )
    def test_an_interrupted_step_goes_on_where_its_inputs_are_the_same(
        self, tmp_path: Path, inputs: str, continues: bool, kept: bool
    ) -> None:
        steps, product = Steps(tmp_path / "steps"), tmp_path / "product"

        def half() -> None:
            product.write_text("half")
            raise KeyboardInterrupt

        def rest() -> None:
            assert product.exists() == kept
            product.write_text("whole")

        with pytest.raises(KeyboardInterrupt):
            steps.run("work", ["a"], [product], half, continues)
        steps.run("work", [inputs], [product], rest, continues)
        assert product.read_text() == "whole"
        steps.run("work", [inputs], [product], half, continues)  # complete: not done again

    def test_a_failed_command_gives_one_message_and_leaves_the_step_undone(
        self, tmp_path: Path
    ) -> None:
        steps, product = Steps(tmp_path / "steps"), tmp_path / "product"
        with pytest.raises(StepFailed, match="exit status 3.*\n.*false_program"):
            command(["bash", "-c", "exit 3", "false_program"], tmp_path)
        with pytest.raises(StepFailed, match="did not make"):
            steps.run("work", ["a"], [product], lambda: None)
        assert not (tmp_path / "steps" / "work.json").exists()

    def test_stages_freeze_what_the_recipe_freezes_and_start_from_the_one_before(self) -> None:
        folders = run.Folders(Path("out"))
        one, two, three = (run.training_command(folders, index, gpus=0) for index in range(3))
        assert {"--freeze-vit", "--freeze-llm"} <= set(one) and "--load" not in one
        assert "--freeze-llm" in two and "--freeze-vit" not in two
        assert not {"--freeze-llm", "--freeze-vit"} & set(three)
        assert three[three.index("--load") + 1] == "out/phase2/checkpoints"

    @pytest.mark.parametrize(
        ("gpus", "processes"), [(0, 4), (1, 1), (2, 2), (3, 2), (4, 4), (8, 4)]
    )
    def test_the_layout_fits_the_devices(self, gpus: int, processes: int) -> None:
        count, flags = run.layout(gpus)
        sizes = [int(word) for word in flags if word.isdigit()]
        assert count == processes == np.prod(sizes, dtype=int)
