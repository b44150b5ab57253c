"""The recipes and the mixture lists say what the paper says; the phases follow from each other."""

import json
import sys
from pathlib import Path

import pytest

from megatron_gmai.cli import parse
from megatron_gmai.config import Config
from megatron_gmai.data.sources.mixture import read_uses
from megatron_gmai.layout import Layout
from tests.training.command import ROOT, finish, losses, run
from tests.training.conftest import shards  # noqa: F401

RECIPES = ROOT / "examples" / "recipes"
GPUS = 32  # 4 nodes of 8
LAYOUT = ("--tp", "2", "--sequence-parallel")
# (recipe, learning rate, micro-batch, frozen: ViT, LLM)
PHASES = [
    ("phase1", 1e-3, 8, (True, True)),
    ("phase2", 1e-4, 4, (False, True)),
    ("phase3", 1e-5, 4, (False, False)),
]


def recipe(name: str, *flags: str) -> Config:
    return parse([f"@{RECIPES}/{name}.args", *flags]).config


@pytest.mark.parametrize(("name", "lr", "micro", "frozen"), PHASES)
def test_a_phase_trains_as_the_paper_says(
    name: str, lr: float, micro: int, frozen: tuple[bool, bool]
) -> None:
    config = recipe(name)
    train = config.train
    assert (train.lr, train.wd, train.global_batch_size) == (lr, 0, 512)
    assert (train.micro_batch_size, train.epochs, config.data.max_length) == (micro, 1, 2048)
    assert (train.freeze_vit, train.freeze_llm, train.freeze_projector) == (*frozen, False)
    assert (train.warmup_ratio, train.max_grad_norm, config.run.dtype) == (0.03, 1, "bf16")


@pytest.mark.parametrize("name", [phase[0] for phase in PHASES])
def test_a_phase_packs_tightly_and_divides_over_its_gpus(name: str) -> None:
    config = recipe(name, *LAYOUT)
    assert config.data.dset_pack_level == "best-fit"
    assert Layout.of(config.parallel, GPUS).micro_batches(config.train) >= 1
    assert config.model.language.num_query_groups % config.parallel.tensor_model_parallel_size == 0


def test_a_flag_beside_a_recipe_wins_over_it() -> None:
    assert recipe("phase1", "--lr", "2e-3").train.lr == 2e-3


def test_each_phase_starts_from_the_checkpoints_of_the_one_before_and_nothing_else(
    shards: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The recipes as they are, at the size of the tiny model; only phase 1 is given a tokenizer."""
    tokenizer = (shards / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    names = {name: {"sample_ratio": 1.0} for name in ("samples",)}
    (tmp_path / "ratios.json").write_text(json.dumps(names))
    start: list[str] = ["--tokenizer", str(tokenizer)]
    for name, *_ in PHASES:
        work_dir = tmp_path / name
        command = [sys.executable, "tools/launch.py", "--here", "--gpus-per-node", "1"]
        command += ["--recipe", name, "--work-dir", str(work_dir), *start]
        command += ["--preset", "gmai-vl-tiny", "--device", "cpu", "--max-length", "256"]
        command += ["--global-batch-size", "2", "--micro-batch-size", "1", "--train-iters", "2"]
        command += ["--datasets", str(tmp_path / "ratios.json"), "--dset-cache-dir", str(shards)]
        process = run([*command, "--log-interval", "1", "--num-workers", "0"])
        output = finish(process)
        assert process.returncode == 0, output
        assert list(losses(work_dir)) == [1, 2]
        start = ["--load", str(work_dir / "checkpoints")]
    assert json.loads((tmp_path / "phase3" / "config.json").read_text())["run"]["llava"] is None
    tokenizer.rename(shards / "tokenizer.model")


def ratios_of(list_file: Path) -> dict[str, float]:
    return {name: use.sample_ratio for name, use in read_uses(list_file).items()}


class TestMixtures:
    def test_phase_3_samples_the_papers_shares(self) -> None:
        ratios = ratios_of(RECIPES / "phase3_ratios.json")
        shares = {
            share: {name for name, ratio in ratios.items() if ratio == share}
            for share in (1.0, 0.75, 0.5, 0.3, 0.1, 0.05)
        }
        assert sum(map(len, shares.values())) == len(ratios) == 35
        assert {"GMAI-MM-Caption", "LLaVA-Med", "GMAI-Text-Multi"} <= shares[1.0]
        assert {"AI2D", "DocVQA"} <= shares[0.75]
        assert shares[0.5] == {"ALLaVA", "ShareGPT4V"}
        assert shares[0.3] == {"CheXpertPlus", "MIMIC-CXR", "OpenI"}
        assert {"SLAKE", "VQA-RAD", "PathVQA"} <= shares[0.1]
        assert {"QUILT-1M", "PMC-OA"} <= shares[0.05]

    def test_phases_1_and_2_take_every_image_and_no_text(self) -> None:
        ratios = ratios_of(RECIPES / "phase12_ratios.json")
        text = {name for name in ratios if "Text" in name}
        assert all(ratio == (0.0 if name in text else 1.0) for name, ratio in ratios.items())
        assert len(text) == 2

    def test_all_phases_name_the_same_sets_so_that_they_share_shards(self) -> None:
        names = [
            set(ratios_of(RECIPES / f"{phases}_ratios.json")) for phases in ("phase12", "phase3")
        ]
        assert names[0] == names[1]
