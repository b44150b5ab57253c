"""Small benchmarks in the layouts that their authors and the Hub publish."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from tests.evaluate.tables import cell, png, write_tsv


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def hub(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A Parquet file of the Hub, images as structures of bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def embedded(seed: int) -> dict[str, Any]:
    return {"bytes": png(seed), "path": None}


def vqa_rad_of_the_authors(folder: Path) -> None:
    image(folder / "VQA_RAD Image Folder" / "synpic1.jpg", 1)
    shared = {"image_name": "synpic1.jpg", "image_organ": "CHEST"}
    write_json(
        folder / "VQA_RAD Dataset Public.json",
        [
            {
                "qid": "0",
                "phrase_type": "freeform",
                "question": "a training question",
                "answer": "yes",
                "answer_type": "CLOSED",
                **shared,
            },
            {
                "qid": "1",
                "phrase_type": "test_freeform",
                "question": "Is there a mass?",
                "question_type": "PRES",
                "answer": "Yes",
                "answer_type": "CLOSED ",
                **shared,
            },
            {
                "qid": "2",
                "phrase_type": "test_para",
                "question": "How many ribs?",
                "question_type": "COUNT",
                "answer": 12,
                "answer_type": "OPEN",
                **shared,
            },
            {
                "qid": "3",
                "phrase_type": "test_freeform",
                "question": "q",
                "answer": "no",
                "answer_type": "CLOSED",
                "image_name": "../../secret.png",
            },
        ],
    )


def image_question_answer(folder: Path) -> None:
    """The Hub's copies of VQA-RAD and PathVQA."""
    rows = [
        {"image": embedded(1), "question": "is there a mass?", "answer": "no"},
        {"image": embedded(1), "question": "what is shown?", "answer": "a mass"},
        {"image": {"bytes": b"broken", "path": None}, "question": "q", "answer": "a"},
    ]
    hub(folder / "data" / "test-00000-of-00001-abc.parquet", rows)


def slake(folder: Path) -> None:
    image(folder / "imgs" / "xmlab1" / "source.jpg", 1)
    shared = {
        "img_name": "xmlab1/source.jpg",
        "location": "Lung",
        "modality": "X-Ray",
        "content_type": "Organ",
    }
    write_json(
        folder / "test.json",
        [
            {
                "qid": 1,
                "q_lang": "en",
                "question": "Is it a lung?",
                "answer": "Yes",
                "answer_type": "CLOSED",
                **shared,
            },
            {
                "qid": 2,
                "q_lang": "zh",
                "question": "图中是肺吗?",
                "answer": "是",
                "answer_type": "CLOSED",
                **shared,
            },
        ],
    )


def pmc_vqa_2(folder: Path) -> None:
    image(folder / "figures" / "PMC1_F1.jpg", 1)
    names = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split"
    choices = [" A:CT ", " B: MRI", "C. a:b", " D:None"]
    write_csv(
        folder / "test_2.csv",
        names.split(","),
        [
            [7, "PMC1_F1.jpg", "caption, long", "Which?", *choices, "B", "test"],
            [8, "PMC9_F9.jpg", "", "Which?", *choices, "B", "test"],
            [9, "PMC1_F1.jpg", "", "Which?", "A:", *choices[1:], "B", "test"],
        ],
    )


def pmc_vqa_1(folder: Path) -> None:
    image(folder / "images" / "PMC1_F1.jpg", 1)
    names = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label"
    choices = [" A: CT ", " B: MRI", " C: US", " D: PET"]
    rows = [["PMC1_F1.jpg", "Which?", "US", *choices, "C"]]
    write_csv(folder / "test.csv", names.split(","), rows)


def omnimedvqa(folder: Path) -> None:
    image(folder / "Images" / "Chest CT" / "a.png", 1)
    shared = {
        "dataset": "Chest CT",
        "question": "Which modality?",
        "question_type": "Modality Recognition",
        "gt_answer": "CT",
        "image_path": "Images/Chest CT/a.png",
        "option_A": "MR",
        "option_B": "CT",
    }
    four = {"option_C": "X-ray", "option_D": "US"}
    write_json(
        folder / "QA_information" / "Open-access" / "Chest CT.json",
        [
            {"question_id": "Chest_CT_0", "modality_type": "CT", **shared, **four},
            {"question_id": "Chest_CT_1", "modality": "CT", **shared},
            {"question_id": "Chest_CT_2", "modality_type": "CT", **shared, "gt_answer": "PET"},
        ],
    )


def mmmu(folder: Path, subjects: Sequence[str]) -> None:
    for number, subject in enumerate(subjects):
        rows: list[dict[str, Any]] = [
            {
                "id": f"validation_{subject}_1",
                "question": "Compare <image 1> with <image 2>. Which?",
                "options": "['<image 1>', \"the second's\"]",
                "answer": "B",
                "question_type": "multiple-choice",
                "img_type": "['CT']",
                "image_1": embedded(number),
                "image_2": embedded(number + 50),
            },
            {
                "id": f"validation_{subject}_2",
                "question": "How many in <image 1>?",
                "options": "[]",
                "answer": "['3', 'three']",
                "question_type": "open",
                "img_type": "['CT']",
                "image_1": embedded(number),
                "image_2": None,
            },
        ]
        hub(folder / subject / "validation-00000-of-00001.parquet", rows)


def gmai_mmbench(folder: Path) -> None:
    row = {
        "question": "Which?",
        "A": "CT",
        "B": "MR",
        "D": "None",
        "category": "c",
        "l2-category": "l",
        "split": "VAL",
        "clinical VQA task": "Disease Diagnosis",
        "department": "Cardiology",
        "perceptual granularity": "Image Level",
    }
    write_tsv(
        folder / "GMAI-MMBench_VAL.tsv",
        [
            {"index": 11, "image": cell(png(1)), **row, "answer": "B"},
            {"index": 12, "image": cell(png(2)), **row, "answer": "D"},
        ],
    )
    for part in (1, 2, 10):
        path = folder / f"GMAI_mm_bench_TEST_part_{part}.tsv"
        write_tsv(path, [{"index": 100 * part, "image": cell(png(part)), **row}])
