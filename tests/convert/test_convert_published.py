"""Both flavours say what the training model says, in transformers then and now.

The original flavour's code is GMAI-VL's, not part of this project, and needs an older transformers:

    git clone https://github.com/uni-medical/GMAI-VL
    GMAI_VL=GMAI-VL GMAI_VL_PYTHON=build python -m pytest -m published tests/convert

GMAI_VL_PYTHON is an interpreter with transformers 4.46 and einops, or `build`: a new environment.
"""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gmai.config import Config
from megatron_gmai.convert.export_configs import REMOTE_CODE
from megatron_gmai.evaluate.agreement import (
    NEW_TOKENS,
    Ran,
    difference,
    run_megatron,
    run_transformers,
    samples,
)
from megatron_gmai.model.vit import CLIP_MEAN, CLIP_STD
from tests.convert.conftest import Export
from tests.parallel.cases import Processes

PACKAGES = ("torch", "transformers==4.46.3", "numpy<2", "einops", "sentencepiece", "pillow")
CODE = "xtuner/_lite/modelings/llava"

pytestmark = pytest.mark.published


@pytest.fixture(scope="module")
def code() -> Path:
    checkout = os.environ.get("GMAI_VL")
    if checkout is None:
        pytest.skip("GMAI_VL names no checkout of github.com/uni-medical/GMAI-VL")
    return Path(checkout) / CODE


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with transformers 4.46."""
    named = os.environ.get("GMAI_VL_PYTHON")
    if named is None:
        pytest.skip("GMAI_VL_PYTHON names no interpreter with transformers 4.46 (`build` makes it)")
    if named != "build":
        return named
    folder = tmp_path_factory.mktemp("transformers-4.46")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def ran_by(python: str, folder: Path, asked: Any, work: Path) -> tuple[Ran, str]:
    """What a folder says under another interpreter, and the version of its transformers."""
    torch.save(asked, work / "asked.pt")
    script = Path(__file__).with_name("run_flavour.py")
    words = [python, str(script), str(folder), str(work / "asked.pt"), str(work / "said.pt")]
    settings = {**os.environ, "HF_MODULES_CACHE": str(work / "modules")}
    done = subprocess.run(words, capture_output=True, text=True, env=settings, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    said = torch.load(work / "said.pt")
    answers = said["answers"]
    return Ran([a["logits"] for a in answers], [a["greedy"] for a in answers]), said["version"]


def test_training_model_and_both_flavours_agree_then_and_now(
    export: Callable[..., Export], alone: Processes, code: Path, old_python: str, tmp_path: Path
) -> None:
    new, original = export(folder="new"), export(folder="original", flavour="original")
    for name in REMOTE_CODE:
        shutil.copyfile(code / name, original.folder / name)
    prompts = samples(new.model)
    assert [len(prompt.pixels) for prompt in prompts] == [0, 1, 2]
    model = alone.model(Config(model=new.model), new.weights)
    expected = run_megatron(model.requires_grad_(False).eval(), prompts)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    asked = {
        "new_tokens": NEW_TOKENS,
        "samples": [{"tokens": p.tokens, "pixels": (p.pixels / 255 - mean) / std} for p in prompts],
    }
    ran = {
        "transformers flavour, this transformers": run_transformers(new.folder, prompts),
        "transformers flavour, 4.46": ran_by(old_python, new.folder, asked, tmp_path)[0],
    }
    ran["GMAI-VL's own code, 4.46"], version = ran_by(old_python, original.folder, asked, tmp_path)
    assert version.startswith("4.46.")
    scale = max(float(logits.abs().max()) for logits in expected.logits)
    for name, found in ran.items():
        largest, agreeing, tokens = difference(expected, found)
        print(f"{name}: {largest:.2g} of {scale:.3g}, {agreeing} of {tokens} tokens",
              file=sys.stderr)  # fmt: skip
        assert largest <= 1e-5 * max(1.0, scale), name
        assert agreeing == tokens == 3 * NEW_TOKENS, name
