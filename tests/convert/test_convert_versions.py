"""An export is used alike by every transformers from 4.49 on.

GMAI_PYTHONS lists interpreters (`:` between them) of environments with other versions of
transformers; the one that runs the tests is always tried.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.convert.conftest import Export

PYTHONS = [sys.executable, *filter(None, os.environ.get("GMAI_PYTHONS", "").split(":"))]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["plain rope", "dynamic rope"])
def test_text_and_images_single_and_batched_and_the_pipeline(
    export: Callable[..., Export], python: str, dynamic: bool
) -> None:
    folder = export(rope_scaling_factor=2.0 if dynamic else 1.0).folder
    script = Path(__file__).with_name("use_export.py")
    done = subprocess.run(
        [python, str(script), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    for kind in ("text", "images"):
        assert seen[kind]["batched"] == seen[kind]["single"], seen["version"]
    assert len({str(answer) for answer in seen["images"]["single"]}) > 1
    assert seen["pipeline"] == seen["decoded"]
