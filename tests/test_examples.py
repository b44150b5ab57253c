"""The Slurm scripts and the mixture lists say what the paper says, and their commands parse."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_gmai.cli import parse
from megatron_gmai.config import Config
from megatron_gmai.data.sources.mixture import read_uses
from megatron_gmai.layout import Layout

ROOT = Path(__file__).resolve().parents[1]
GPUS = 32  # 4 nodes of 8


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with stand-ins for Slurm's programs: srun prints its arguments, one a line."""
    for name, body in {"srun": 'printf "%s\\n" "$@"', "scontrol": "echo n1; echo n2"}.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    return tmp_path


def submitted(script: str, commands: Path) -> list[str]:
    """What `script` hands to srun when Slurm runs it on 4 nodes."""
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "LLAVA": "base",
        "SHARDS": "shards",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_NODELIST": "n[1-4]",
    }
    path = ROOT / "examples" / "slurm" / script
    done = subprocess.run(
        ["bash", str(path)], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def training(words: list[str]) -> Config:
    return parse(words[words.index("pretrain_gmai_vl.py") + 1 :]).config


# (script, learning rate, micro-batch, frozen: ViT, LLM; start weights)
STAGES = [
    ("stage1.sbatch", 1e-3, 8, (True, True), "base"),
    ("stage2.sbatch", 1e-4, 4, (False, True), "runs/gmai-vl-7b/stage1/checkpoints"),
    ("stage3.sbatch", 1e-5, 4, (False, False), "runs/gmai-vl-7b/stage2/checkpoints"),
]


@pytest.mark.parametrize(("script", "lr", "micro", "frozen", "start"), STAGES)
def test_a_stage_trains_as_the_paper_says(
    script: str, lr: float, micro: int, frozen: tuple[bool, bool], start: str, commands: Path
) -> None:
    config = training(submitted(script, commands))
    train = config.train
    assert (train.lr, train.wd, train.global_batch_size) == (lr, 0, 512)
    assert (train.micro_batch_size, train.epochs, config.data.max_length) == (micro, 1, 2048)
    assert (train.freeze_vit, train.freeze_llm, train.freeze_projector) == (*frozen, False)
    assert (config.run.llava or config.run.load) == start
    assert config.run.resume and config.run.dtype == "bf16"


@pytest.mark.parametrize("script", [stage[0] for stage in STAGES])
def test_a_stage_divides_over_its_gpus(script: str, commands: Path) -> None:
    config = training(submitted(script, commands))
    assert Layout.of(config.parallel, GPUS).micro_batches(config.train) >= 1
    assert config.model.language.num_query_groups % config.parallel.tensor_model_parallel_size == 0


@pytest.mark.parametrize("script", [stage[0] for stage in STAGES])
def test_agents_meet_on_the_first_node(script: str, commands: Path) -> None:
    words = submitted(script, commands)
    assert {"--nnodes=4", "--nproc-per-node=8", "--rdzv-backend=c10d"} <= set(words)
    assert "--rdzv-endpoint=n1:29500" in words


@pytest.mark.parametrize("script", [stage[0] for stage in STAGES])
def test_a_forgotten_folder_is_named(script: str) -> None:
    path = ROOT / "examples" / "slurm" / script
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "folder with the start weights" in done.stderr


def ratios_of(list_file: Path) -> dict[str, float]:
    return {name: use.sample_ratio for name, use in read_uses(list_file).items()}


class TestMixtures:
    def test_stage_3_samples_the_papers_shares(self) -> None:
        ratios = ratios_of(ROOT / "examples" / "recipes" / "stage3_ratios.json")
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

    def test_stages_1_and_2_take_every_image_and_no_text(self) -> None:
        ratios = ratios_of(ROOT / "examples" / "recipes" / "stage12_ratios.json")
        text = {name for name in ratios if "Text" in name}
        assert all(ratio == (0.0 if name in text else 1.0) for name, ratio in ratios.items())
        assert len(text) == 2

    def test_all_stages_name_the_same_sets_so_that_they_share_shards(self) -> None:
        names = [
            set(ratios_of(ROOT / "examples" / "recipes" / f"{stage}_ratios.json"))
            for stage in ("stage12", "stage3")
        ]
        assert names[0] == names[1]
