"""Fixtures: a tokenizer, and a small held-out file of every kind of question."""

import json
from pathlib import Path

import pytest

from tests.data.conftest import tokenizer, tokenizer_file
from tests.data.world import picture, record

__all__ = ["tokenizer", "tokenizer_file"]


@pytest.fixture
def held_out_file(tmp_path: Path) -> Path:
    """Nine questions, of which the last two cannot be asked."""
    for name in ("a", "b"):
        picture(seed=ord(name)).save(tmp_path / f"{name}.png")
    several_turns = record("<image>\nwhat is shown", "a lung", "a.png", id="turns")
    several_turns["conversations"] += record("left", "right")["conversations"]
    records = [
        record("<image>\nis a lung shown", "yes", "a.png", question_type="yes_no"),
        record("what is shown here " * 8, "a brain scan", id="text"),
        record("<image><image>\nleft right", "no", ["a.png", "b.png"], id="two"),
        several_turns,
        *(record("<image>\nis" + " a" * n, "yes", "b.png", **{"class": "b"}) for n in (1, 2, 3)),
        record("<image>\nis a lung shown", "yes", "missing.png", id="missing"),
        record("what is shown here " * 400, "no", id="long"),
    ]
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    return tmp_path / "held_out.json"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A checkpoint that two tensor-parallel ranks have written."""
    from tests.evaluate.models import save_from_two_ranks  # other tests need not wait for Megatron
    from tests.parallel.world import run_world

    folder = tmp_path_factory.mktemp("checkpoints")
    run_world(2, save_from_two_ranks, folder, tokenizer_file)
    return folder


@pytest.fixture(scope="session")
def exported(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder."""
    from tools.convert_checkpoint import main as convert

    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert convert(["to-hf", "--load", str(checkpoints), "--output", str(folder)]) == 0
    return folder
