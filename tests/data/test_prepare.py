"""The first start of a run: one rank builds, the others watch the file system."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.config import DataConfig
from megatron_gmai.data import prepare
from megatron_gmai.data.lock import building
from megatron_gmai.data.prepare import prepare_data
from tests.data.world import VISION, mixed_records, open_list, record


@pytest.fixture
def data(tmp_path: Path, tokenizer_file: Path) -> DataConfig:
    (tmp_path / "a.json").write_text(json.dumps(mixed_records(tmp_path, 6)))
    entry = {"annotations": str(tmp_path / "a.json"), "image_dir": str(tmp_path)}
    (tmp_path / "LIST.json").write_text(json.dumps({"A": entry}))
    return DataConfig(
        datasets=str(tmp_path / "LIST.json"), tokenizer=str(tokenizer_file), max_length=128
    )


class Waiting(threading.Thread):
    """A rank that does not build."""

    def __init__(self, data: DataConfig, cache: Path, run: str) -> None:
        super().__init__(daemon=True)
        self.given, self.cache, self.run_id = data, cache, run
        self.lines: list[str] = []
        self.result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.result = prepare_data(
                self.given, VISION, self.cache, False, self.run_id, self.lines.append
            )
        except ValueError as error:
            self.result = str(error)


def test_the_others_wait_with_a_message_and_find_everything_ready(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "MESSAGE_S", 0.2)
    waiting = Waiting(data, tmp_path / "cache", "run 2")
    with building(tmp_path / "cache", lambda line: None) as holder:
        holder.tell("7 of 9 records")
        time.sleep(1.5)
        assert waiting.is_alive()
    # The end of another run's building says nothing about this one's.
    prepare_data(data, VISION, tmp_path / "cache", True, "run 1")
    time.sleep(1.2)
    assert waiting.is_alive()
    built = prepare_data(data, VISION, tmp_path / "cache", True, "run 2")
    waiting.join(20)
    assert waiting.result == built
    assert any("waiting for the data" in line and "7 of 9" in line for line in waiting.lines)


def test_an_error_of_the_builder_ends_all_with_its_message(
    data: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    waiting = Waiting(data, tmp_path / "cache", "run")
    (tmp_path / "LIST.json").write_text("{}")
    with pytest.raises(ValueError, match="one data set or more") as error:
        prepare_data(data, VISION, tmp_path / "cache", True, "run")
    waiting.join(20)
    assert waiting.result == str(error.value)


def test_a_builder_of_whom_nothing_is_heard_is_given_up(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "SILENCE_S", 0.5)
    waiting = Waiting(data, tmp_path / "cache", "run")
    waiting.join(20)
    assert "nobody has worked" in waiting.result and "share this folder" in waiting.result


def test_a_wrong_tokenizer_is_noticed_before_anything_is_built(
    data: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "bad.model").write_bytes(b"no model")
    wrong = DataConfig(datasets=data.datasets, tokenizer=str(tmp_path / "bad.model"))
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        prepare_data(wrong, VISION, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_samples_that_are_too_long_end_with_the_length_that_would_do(
    data: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([record("what", "yes " * 200)] * 7))
    with pytest.raises(ValueError) as error:
        open_list(tmp_path / "LIST.json", Path(str(data.tokenizer)), max_length=128)
    message = str(error.value)
    assert "7 of 7 samples cannot be used" in message and "and 2 more" in message
    longest = int(message.split("--max-length 128")[0].split()[-4])
    assert f"the longest takes --max-length {longest}" in message
    opened = open_list(tmp_path / "LIST.json", Path(str(data.tokenizer)), max_length=longest)
    assert not opened.rejected
