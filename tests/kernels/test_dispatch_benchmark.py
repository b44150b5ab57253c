"""The kernel benchmark starts on a machine without a GPU, and says what it could not measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


def test_the_gpu_part_explains_itself_without_a_gpu(tmp_path):
    output = tmp_path / "kernels.json"
    subprocess.run(
        [sys.executable, BENCHMARK, "--parts", "gpu", "--output", output],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        check=True,
    )
    result = json.loads(output.read_text())
    assert result["figures"] == []
    assert "no GPU is visible" in result["notes"][0]
