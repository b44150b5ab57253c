"""tools/convert_checkpoint.py: what it keeps, what it refuses, and what it says."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_gmai.config import Config, DataConfig, ModelConfig
from megatron_gmai.convert.carried import CARRIED
from megatron_gmai.convert.distributed import CheckpointWeights
from megatron_gmai.convert.huggingface import open_pretrained
from megatron_gmai.convert.manifest import read_manifest
from megatron_gmai.convert.mapping import leftover_shapes
from megatron_gmai.convert.output import Progress
from megatron_gmai.convert.training_checkpoint import write_training_checkpoint
from tests.convert.conftest import Export
from tests.convert.in_a_layout import change_one_value_on_one_rank, verify_in_a_layout
from tests.parallel.world import run_world
from tools.convert_checkpoint import main

NORM = "language_model.decoder.final_layernorm.weight"


def leftovers_of(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(s, generator=generator) for n, s in leftover_shapes(model).items()}


@pytest.fixture
def source(export: Callable[..., Export], train_sentencepiece: Callable[..., Path]) -> Export:
    """A whole model with CLIP's last layer, and its folder of the transformers flavour."""
    size = export(folder="sizes").model
    return export(folder="source", leftovers=leftovers_of(size))


def from_hf(source: Path, output: Path, *more: str) -> int:
    return main(["from-hf", "--model", str(source), "--output", str(output), *more])


def to_hf(load: Path, output: Path, *more: str) -> int:
    return main(["to-hf", "--load", str(load), "--output", str(output), *more])


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("flavour", ["transformers", "gmai-vl"])
def test_there_and_back_not_a_byte_changes(source: Export, tmp_path: Path, flavour: str) -> None:
    assert from_hf(source.folder, tmp_path / "checkpoints") == 0
    assert to_hf(tmp_path / "checkpoints", tmp_path / "out", "--flavour", flavour) == 0
    if flavour == "gmai-vl":
        assert from_hf(tmp_path / "out", tmp_path / "again") == 0
        assert to_hf(tmp_path / "again", tmp_path / "transformers") == 0
    last = tmp_path / ("transformers" if flavour == "gmai-vl" else "out")
    for file in source.folder.iterdir():
        assert (last / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_dtype_is_kept_unless_told_otherwise(source: Export, tmp_path: Path) -> None:
    file = source.folder / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    for name, flags, dtype in (
        ("kept", [], torch.bfloat16),
        ("wide", ["--dtype", "fp32"], torch.float32),
    ):
        assert from_hf(source.folder, tmp_path / name, *flags) == 0
        path = read_manifest(tmp_path / name).path
        weights = CheckpointWeights(path, source.model)
        assert weights.dtype == dtype
        assert torch.equal(weights[NORM], source.weights[NORM].bfloat16().to(dtype))
    assert to_hf(tmp_path / "kept", tmp_path / "hf") == 0
    exported, before = load_file(tmp_path / "hf" / "model.safetensors"), load_file(file)
    assert all(torch.equal(exported[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}


def test_a_cast_that_would_make_infinity_is_refused(
    source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = source.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.norm.weight"][3] = -7e4
    save_file(tensors, file)
    assert from_hf(source.folder, tmp_path / "start") == 0
    for convert, start in ((from_hf, source.folder), (to_hf, tmp_path / "start")):
        assert convert(start, tmp_path / "cast", "--dtype", "fp16") == 2
        assert "norm.weight holds values up to 7e+04, more than float16" in capsys.readouterr().err
        assert not (tmp_path / "cast").exists()


def test_a_training_run_is_not_taken_over(
    source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    (run / "latest").write_text("iter_0000700")
    assert from_hf(source.folder, run) == 2
    assert "exists already and is not empty" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["latest"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_half_written(
    source: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(Progress, "__call__", lambda self, count: os.kill(os.getpid(), number))
    before = sorted(tmp_path.iterdir())
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        from_hf(source.folder, tmp_path / "checkpoints")
    assert sorted(tmp_path.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_killed_conversion_is_not_whole_and_starts_again(source: Export, tmp_path: Path) -> None:
    output = tmp_path / "checkpoints"
    child = os.fork()
    if child == 0:
        Progress.__call__ = lambda self, count: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
        from_hf(source.folder, output)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not output.exists()
    assert from_hf(source.folder, output) == 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("file", ["__0_0.distcp", CARRIED, ".metadata"])
def test_a_flipped_bit_is_told_and_not_exported(
    source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    assert from_hf(source.folder, tmp_path / "checkpoints") == 0
    path = tmp_path / "checkpoints" / "iter_0000000" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert to_hf(tmp_path / "checkpoints", tmp_path / "out") == 2
    assert main(["verify", str(tmp_path / "checkpoints"), str(source.folder)]) == 2
    assert capsys.readouterr().err.count("is damaged: ") == 2
    assert {p.name for p in tmp_path.iterdir()} == {
        "sizes",
        "source",
        "tokenizer.model",
        "checkpoints",
    }


def test_a_tokenizer_of_another_model_is_refused(
    source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str) -> None:
        assert from_hf(source.folder, tmp_path / "checkpoints") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "checkpoints").exists()

    config = source.folder / "config.json"
    edit_json(config, lambda content: content.update(image_token_index=7))
    refused(f"<image> is {source.model.image_token_id} in the tokenizer, 7 in config.json")
    (source.folder / "tokenizer.model").write_bytes(b"garbage" * 9)
    refused("is not a sentencepiece model")


def test_a_tokenizer_with_more_ids_than_rows_is_refused(
    source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = source.folder / "tokenizer_config.json"
    more = {"999": {"content": "<|more|>"}}
    edit_json(added, lambda content: content["added_tokens_decoder"].update(more))  # type: ignore
    assert from_hf(source.folder, tmp_path / "checkpoints") == 2
    said = capsys.readouterr().err
    assert f"has 1000 ids, the embedding only {source.model.language.vocab_size} rows" in said


def test_what_training_never_runs_goes_along(source: Export, tmp_path: Path) -> None:
    assert from_hf(source.folder, tmp_path / "checkpoints") == 0
    path = read_manifest(tmp_path / "checkpoints").path
    assert load_file(path / CARRIED).keys() == leftover_shapes(source.model).keys()
    source.folder.rename(tmp_path / "moved")
    assert to_hf(
        tmp_path / "checkpoints", tmp_path / "hf",
        "--tokenizer", str(tmp_path / "moved" / "tokenizer.model"),
    ) == 0  # fmt: skip
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in leftovers_of(source.model).items():
        assert torch.equal(exported[name], tensor)


def test_each_phase_of_training_hands_it_to_the_next(source: Export, tmp_path: Path) -> None:
    from megatron_gmai.training.checkpoint import open_checkpoint
    from megatron_gmai.training.setup import Start

    expected = leftovers_of(source.model)
    assert from_hf(source.folder, tmp_path / "checkpoints") == 0
    checkpoint = open_checkpoint(tmp_path / "checkpoints")
    published = open_pretrained(source.folder)
    for start in (Start(pretrained=published), Start(load=checkpoint), Start(resume=checkpoint)):
        carried = start.carried()
        assert all(torch.equal(carried[name], tensor) for name, tensor in expected.items())
    assert Start().carried() == {}


@pytest.fixture
def bare(source: Export, tmp_path: Path) -> Path:
    """A checkpoint that carries nothing, of a run whose start weights have moved."""
    config = Config(
        model=source.model, data=DataConfig(tokenizer=str(source.folder / "tokenizer.model"))
    )
    config = replace(config, run=replace(config.run, llava="/nowhere/base"))
    write_training_checkpoint(tmp_path / "bare", config, source.weights, {})
    return tmp_path / "bare"


def test_start_weights_that_moved_are_told(
    bare: Path, source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_hf(bare, tmp_path / "hf") == 0
    said = capsys.readouterr().err
    assert "/nowhere/base, which training began with, is gone" in said and "--llava" in said
    assert to_hf(bare, tmp_path / "filled", "--llava", str(source.folder)) == 0
    exported = load_file(tmp_path / "filled" / "model.safetensors")
    assert all(torch.equal(exported[n], t) for n, t in leftovers_of(source.model).items())


def test_another_clip_is_refused(
    bare: Path, export: Callable[..., Export], source: Export, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other"
    source.folder.rename(other)
    edit_json(other / "config.json", lambda c: c["vision_config"].update(layer_norm_eps=1e-4))  # type: ignore
    tokenizer = ["--tokenizer", str(other / "tokenizer.model")]
    assert to_hf(bare, tmp_path / "hf", "--llava", str(other), *tokenizer) == 2
    assert "has another vision tower than" in capsys.readouterr().err


def test_nan_in_a_checkpoint_is_named(
    source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {**source.weights, NORM: torch.full_like(source.weights[NORM], float("nan"))}
    config = Config(
        model=source.model, data=DataConfig(tokenizer=str(source.folder / "tokenizer.model"))
    )
    write_training_checkpoint(tmp_path / "bad", config, weights, {})
    assert to_hf(tmp_path / "bad", tmp_path / "hf") == 2
    assert f"{NORM} holds NaN or infinity in 48 of 48 places" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("flags", [[], ["--llm", "a"], ["--model", "a", "--vision", "b"]])
def test_sources_that_do_not_go_together_are_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["from-hf", *flags, "--output", str(tmp_path / "out")]) == 2
    assert "give --model DIR, or both --llm DIR and --vision DIR" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--model nowhere", "--llm nowhere --vision clip"])
def test_a_source_that_is_not_there_is_told(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["from-hf", *flags.split(), "--output", str(tmp_path / "out")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


class TestVerify:
    def test_a_checkpoint_and_both_flavours_agree(
        self, source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert from_hf(source.folder, tmp_path / "ck") == 0
        assert to_hf(tmp_path / "ck", tmp_path / "original", "--flavour", "gmai-vl") == 0
        assert main(["verify", str(tmp_path / "ck"), str(source.folder)]) == 0
        assert main(["verify", str(source.folder), str(tmp_path / "original")]) == 0
        said = capsys.readouterr().out
        assert said.count("the same\n") == 2 and "48 of 48" in said
        card = json.loads((source.folder / "card.json").read_text())
        assert card["largest_difference"] == 0 and card["tolerance"] == 0
        assert card["run"]["logits_difference"] < 1e-5 * card["run"]["largest_logit"]
        assert [side["kind"] for side in card["compared"]] == [
            "training checkpoint", "transformers"
        ]  # fmt: skip
        assert all(len(h) == 64 for h in card["compared"][1]["sha256"].values())
        assert card["versions"]["torch"]

    def test_a_run_that_saves_beside_its_own_configuration_is_no_hugging_face_folder(
        self, source: Export, tmp_path: Path
    ) -> None:
        assert from_hf(source.folder, tmp_path / "run") == 0
        (tmp_path / "run" / "config.json").write_text(Config(model=source.model).to_json())
        assert main(["verify", str(tmp_path / "run"), str(source.folder)]) == 0

    def test_ranks_of_a_layout_hold_and_say_what_the_folders_do(
        self, source: Export, tmp_path: Path
    ) -> None:
        assert from_hf(source.folder, tmp_path / "ck") == 0
        run_world(4, verify_in_a_layout, tmp_path / "ck", source.folder)
        card = json.loads((source.folder / "card.json").read_text())
        assert card["compared"][0]["kind"] == "training checkpoint, held by TP 2 x PP 2"
        assert card["largest_difference"] == 0 and card["run"]["same"]
        assert card["run"]["greedy_tokens_agreeing"] == "48 of 48"

    def test_a_value_that_one_rank_holds_otherwise_is_found(self, source: Export) -> None:
        run_world(2, change_one_value_on_one_rank, source.folder)

    def test_one_changed_value_is_found_and_measured(
        self, source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert from_hf(source.folder, tmp_path / "ck") == 0
        tensors = load_file(source.folder / "model.safetensors")
        tensors["language_model.model.layers.1.mlp.down_proj.weight"][3, 4] += 0.25
        save_file(tensors, source.folder / "model.safetensors")
        capsys.readouterr()
        words = ["verify", str(tmp_path / "ck"), str(source.folder)]
        assert main(words) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" 0.25")]
        (line,) = lines
        assert line.startswith("language_model.decoder.layers.*.mlp.linear_fc2.weight")
        assert main([*words, "--tolerance", "0.2"]) == 1
        assert main([*words, "--tolerance", "0.3"]) == 0

    def test_what_only_one_side_has_is_told(
        self, source: Export, bare: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["verify", str(source.folder), str(bare)]) == 0
        assert "bare/iter_0000000 carries no last CLIP layer" in capsys.readouterr().out

    def test_a_cast_is_compared_after_rounding(self, source: Export, tmp_path: Path) -> None:
        assert from_hf(source.folder, tmp_path / "ck") == 0
        assert to_hf(tmp_path / "ck", tmp_path / "half", "--dtype", "bf16") == 0
        assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "half")]) == 0
        card = json.loads((tmp_path / "half" / "card.json").read_text())
        assert card["groups"][0]["dtypes"] == ["float32", "bfloat16"]
        assert card["run"].startswith("not run: the weights differ, or one side was cast")

    @pytest.mark.parametrize("card", [".", "missing/card.json", "/dev/null"])
    def test_a_card_that_cannot_be_written_is_told_before_the_comparison(
        self, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], card: str
    ) -> None:
        assert main(["verify", str(bare), str(bare), "--card", str(tmp_path / card)]) == 2
        said = capsys.readouterr()
        assert "cannot be written; name another file with --card" in said.err and not said.out

    def test_other_models_are_refused(
        self, source: Export, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        edit_json(source.folder / "config.json", lambda c: c["text_config"].update(rope_theta=7))  # type: ignore
        assert main(["verify", str(bare), str(source.folder)]) == 2
        assert "language.rope_theta: 1000000.0 and 7.0" in capsys.readouterr().err
