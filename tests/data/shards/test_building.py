"""Making shards as a job of hours: killed, continued, changed in between, by several at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.data.ledger import read_ledger
from megatron_gmai.data.pool import Report
from megatron_gmai.data.shards import build, inputs, units
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.index import MANIFEST_FILE
from megatron_gmai.data.shards.lengths import token_lengths
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.encoder import Encoder
from megatron_gmai.data.text.tokenizer import Tokenizer
from tests.data.world import mixed_records, picture, record
from tools.make_shards import main


def die_at_the_second_record(
    output: Path, encoder: Encoder | None, unit: units.Unit, report: Report
) -> None:
    report(1, 0)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def three_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "RECORDS_PER_SHARD", 3)


@pytest.fixture
def list_file(tmp_path: Path, write_list: Callable, three_a_shard: None) -> Path:
    return write_list(A=mixed_records(tmp_path, 12))


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


class TestProcesses:
    def test_a_worker_killed_by_memory_is_named_with_its_record(
        self, list_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build, "write_unit", die_at_the_second_record)
        with pytest.raises(ValueError, match=r"memory runs out.* record \d+ of .*A\.json \(A/0"):
            build_shards(list_file, tmp_path / "shards", workers=2)

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    def test_a_stop_is_one_line_and_the_same_command_goes_on(
        self, list_file: Path, tmp_path: Path, how: signal.Signals
    ) -> None:
        for number in range(12):
            picture(2000, 2000, number).save(tmp_path / f"{number}.png")
        command = [sys.executable, "tools/make_shards.py", "--datasets", str(list_file)]
        command += ["--output", str(tmp_path / "shards"), "--workers", "2"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for _ in range(600):
            if list(tmp_path.glob("shards/*.partial")):
                break
            time.sleep(0.05)
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 128 + how
        assert error == "make_shards: interrupted; the same command goes on from here\n"
        assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
        assert len(Shards(tmp_path / "shards")) == 12

    def test_two_builders_at_once_make_one_set_of_shards(
        self, list_file: Path, tmp_path: Path
    ) -> None:
        command = [sys.executable, "tools/make_shards.py", "--datasets", str(list_file)]
        command += ["--output", str(tmp_path / "shards"), "--workers", "0"]
        both = [
            subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        errors = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], errors
        assert sum("reused" in error for error in errors) == 1

    def test_a_wrong_tokenizer_is_noticed_before_anything_is_built(
        self, list_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bad.model").write_bytes(b"no model")
        flags = ["--datasets", str(list_file), "--output", str(tmp_path / "shards")]
        assert main([*flags, "--tokenizer", str(tmp_path / "bad.model")]) == 2
        assert "not a sentencepiece model" in capsys.readouterr().err
        assert not (tmp_path / "shards").exists()


class TestProgress:
    def test_large_images_make_smaller_shards(
        self, tmp_path: Path, write_list: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(8):
            picture(200, 200, number).save(tmp_path / f"{number}.png")
        records = [record("<image>", "yes", f"{number}.png") for number in range(8)]
        list_file = write_list(A=records)
        size = (tmp_path / "0.png").stat().st_size
        monkeypatch.setattr(units, "BYTES_PER_SHARD", 2 * size)
        assert len(build_shards(list_file, tmp_path / "shards").shards) == 4

    def test_bytes_and_time_left_are_told(
        self, list_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("megatron_gmai.data.progress.INTERVAL_S", 0.0)
        lines: list[str] = []
        build_shards(list_file, tmp_path / "shards", log=lines.append)
        assert any(
            line.startswith("making shards: 6 of 12, ") and " MB/s, " in line and "s left" in line
            for line in lines
        )


class TestChanges:
    """Nothing stale is returned, nothing that is unchanged is made again, and both are told."""

    def build(self, list_file: Path, **options: Any) -> list[str]:
        lines: list[str] = []
        build_shards(list_file, list_file.parent / "shards", log=lines.append, **options)
        return lines

    def test_unchanged_inputs_are_reused_and_said_so(self, list_file: Path, tmp_path: Path) -> None:
        self.build(list_file)
        before = times(tmp_path / "shards")
        assert any("reused" in line for line in self.build(list_file))
        assert times(tmp_path / "shards") == before

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_replaced_image_costs_its_shard_alone(
        self, list_file: Path, tmp_path: Path, workers: int
    ) -> None:
        self.build(list_file)
        before = times(tmp_path / "shards")
        picture(seed=99).save(tmp_path / "0.png")
        lines = self.build(list_file, workers=workers)
        assert any("images changed" in line for line in lines)
        assert any("3 of 4 kept" in line for line in lines)
        after = times(tmp_path / "shards")
        assert sum(after[name] != before[name] for name in before) == 1
        content = (tmp_path / "0.png").read_bytes()
        shards = Shards(tmp_path / "shards")
        assert sum(content in shards.read(row).images for row in range(len(shards))) == 1

    def test_an_image_that_came_back_is_taken(self, list_file: Path, tmp_path: Path) -> None:
        content = (tmp_path / "3.png").read_bytes()
        (tmp_path / "3.png").unlink()
        self.build(list_file)
        assert len(Shards(tmp_path / "shards")) == 11
        (tmp_path / "3.png").write_bytes(content)
        self.build(list_file)
        assert len(Shards(tmp_path / "shards")) == 12
        assert not read_ledger(tmp_path / "shards" / "rejected.jsonl")

    def test_a_new_reader_gives_rejected_images_another_chance(
        self, list_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "0.png").write_bytes(b"no image yet")
        self.build(list_file)
        before = times(tmp_path / "shards")
        monkeypatch.setattr(inputs, "_version", lambda package: "9.9")
        lines = self.build(list_file)
        assert any("pydicom: 3" in line and "9.9 now" in line for line in lines)
        assert any("3 of 4 kept" in line for line in lines)
        assert sum(times(tmp_path / "shards")[name] != before[name] for name in before) == 1

    def test_a_data_set_that_is_added_or_taken_out_costs_no_other(
        self, list_file: Path, tmp_path: Path
    ) -> None:
        self.build(list_file)
        before = times(tmp_path / "shards")
        entries = json.loads(list_file.read_text())
        (tmp_path / "B.json").write_text(json.dumps([record("what", "yes")]))
        new = {"B": {"annotations": str(tmp_path / "B.json")}, **entries}
        list_file.write_text(json.dumps(new))
        lines = self.build(list_file)
        assert any("data set B is new" in line for line in lines)
        shards = Shards(tmp_path / "shards")
        assert [source.samples for source in shards.manifest.sources] == [1, 12]
        assert [shards.source_name(0), shards.source_name(1)] == ["B", "A"]
        list_file.write_text(json.dumps(entries))
        assert any("data set B is gone" in line for line in self.build(list_file))
        assert times(tmp_path / "shards") == before

    def test_an_interrupted_change_is_continued(
        self, list_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.build(list_file)
        before = times(tmp_path / "shards")
        picture(seed=99).save(tmp_path / "0.png")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(build, "write_unit", interrupted)
            self.build(list_file)
        assert not (tmp_path / "shards" / MANIFEST_FILE).exists()
        self.build(list_file)
        assert len(Shards(tmp_path / "shards")) == 12
        after = times(tmp_path / "shards")
        assert sum(after[name] != before[name] for name in before) == 1


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


class TestLengths:
    def test_are_measured_while_shards_are_made(
        self,
        list_file: Path,
        tmp_path: Path,
        tokenizer: Tokenizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        encoder = Encoder(tokenizer, chat_format("internlm2"), 4, 40)
        build_shards(list_file, tmp_path / "alone")
        alone, rejected = token_lengths(Shards(tmp_path / "alone"), encoder)
        build_shards(list_file, tmp_path / "both", workers=2, encoder=encoder)
        monkeypatch.setattr("megatron_gmai.data.shards.lengths._measure_shard", interrupted)
        both, also_rejected = token_lengths(Shards(tmp_path / "both"), encoder)
        assert both.tolist() == alone.tolist() and also_rejected == rejected
        assert 0 in both["length"] and not list((tmp_path / "both").glob(".lengths-*"))

    def test_an_interrupted_measuring_goes_on_where_it_was(
        self,
        list_file: Path,
        tmp_path: Path,
        tokenizer: Tokenizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        encoder = Encoder(tokenizer, chat_format("internlm2"), 4, 128)
        build_shards(list_file, tmp_path / "shards")
        shards = Shards(tmp_path / "shards")
        measured: list[int] = []
        measure = vars(sys.modules[token_lengths.__module__])["_measure_shard"]

        def twice_only(shards: Shards, encoder: Encoder, shard: int, report: Report) -> None:
            if len(measured) == 2:
                raise KeyboardInterrupt
            measured.append(shard)
            measure(shards, encoder, shard, report)

        monkeypatch.setattr("megatron_gmai.data.shards.lengths._measure_shard", twice_only)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                token_lengths(shards, encoder)
        measured.clear()
        token_lengths(shards, encoder)
        assert len(measured) == 2, "the other two were kept"


class TestLedger:
    def test_lines_name_list_file_record_and_image_and_are_never_one_for_two(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "bad.png").write_text("no image")
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "good.png")
        lines = [
            json.dumps(record("what", "yes")),
            "",
            json.dumps(record("<image><image>", "yes", ["good.png", "bad.png"], id="case 7")),
        ]
        entries = {}
        for name in ("眼底", "胸片", "a b", "a_b", "a-b"):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
            entries[name] = {"annotations": str(tmp_path / f"{name}.jsonl")}
        (tmp_path / "LIST.json").write_text(json.dumps(entries))
        manifest = build_shards(tmp_path / "LIST.json", tmp_path / "shards")
        ledger = read_ledger(tmp_path / "shards" / "rejected.jsonl")
        assert len({line.key for line in ledger}) == manifest.rejected == 5
        assert {line.source for line in ledger} == entries.keys()
        assert {(line.record, line.id, line.image) for line in ledger} == {(3, "case 7", "bad.png")}
        assert ledger[0].file == str(tmp_path / "眼底.jsonl")
        assert ledger[0].list_file == str(tmp_path / "LIST.json")
        shards = Shards(tmp_path / "shards")
        assert len({shards.read(row).key for row in range(5)}) == 5


class TestWhatWasMade:
    """Inputs are as they were, and what was made of them is not."""

    @pytest.fixture
    def made(self, list_file: Path, tmp_path: Path) -> Path:
        build_shards(list_file, tmp_path / "shards")
        return tmp_path / "shards"

    def again(self, list_file: Path, made: Path) -> list[str]:
        lines: list[str] = []
        build_shards(list_file, made, log=lines.append)
        shards = Shards(made)
        assert len({shards.read(row).key for row in range(len(shards))}) == 12
        return lines

    def test_a_tar_file_that_went_is_made_again_alone(self, list_file: Path, made: Path) -> None:
        before = times(made)
        (made / "A-00000.tar").unlink()
        (made / "A-00001.tar").write_bytes(b"")
        told = "\n".join(self.again(list_file, made))
        assert "A-00000.tar is gone or was changed" in told and "2 of 4 kept" in told
        assert "images changed" not in told
        assert {name for name in before if times(made)[name] == before[name]} == {
            "A-00002.tar",
            "A-00003.tar",
        }

    @pytest.mark.parametrize("content", [None, b"", b"\x93NUMPY"])
    def test_without_their_index_all_are_made_anew(
        self, list_file: Path, made: Path, content: bytes | None
    ) -> None:
        (made / "index.npy").unlink()
        if content is not None:
            (made / "index.npy").write_bytes(content)
        assert "all are made anew" in "\n".join(self.again(list_file, made))

    def test_another_ratio_is_taken_over(self, list_file: Path, made: Path) -> None:
        entries = json.loads(list_file.read_text())
        entries["A"] |= {"sample_ratio": 2.5, "data_augment": True}
        list_file.write_text(json.dumps(entries))
        told = "\n".join(self.again(list_file, made))
        assert "reused" in told and "A: ratio 1 before, 2.5 now" in told
        (source,) = Shards(made).manifest.sources
        assert (source.sample_ratio, source.data_augment) == (2.5, True)
