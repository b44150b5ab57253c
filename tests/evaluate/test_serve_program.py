"""tools/serve.py, started as a user starts it."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import openai
import pytest

from megatron_gmai.runtime.processes import free_port
from tests.training.command import ROOT, launcher
from tools.serve import KEY, main


@pytest.mark.parametrize(("kind", "ranks"), [("checkpoints", 2), ("exported", 1)])
def test_a_model_is_served_to_the_openai_client(
    kind: str, ranks: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    load, log = str(request.getfixturevalue(kind)), tmp_path / "log"
    port = str(free_port())
    program = [*launcher(ranks), str(ROOT / "tools" / "serve.py"), "--load", load]
    program += ["--tp", str(ranks)]
    words = [*program, "--port", port, "--name", "tiny", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
    try:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        )
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                assert [model.id for model in client.models.list()] == ["tiny"]
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "is a lung shown"}],
            max_tokens=5,
        )
        assert answer.usage is not None and answer.usage.completion_tokens <= 5
        assert answer.choices[0].finish_reason in ("stop", "length")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    assert re.search(r"(iter_\d+|hf) as tiny: http://127.0.0.1:" + port, log.read_text())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], f"set \\${KEY} to a key"),
        (["--batch-size", "0"], "at least 1"),
        (["--port", "70000"], "from 1 to 65535"),
        (["--examples", "none"], "no such folder"),
        ([], "not a whole checkpoint"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(
    tmp_path: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ValueError, match=message):
        main(["--load", str(tmp_path), *flags])


@pytest.mark.parametrize("key", ["clé", "from a file\n"])
def test_a_key_that_no_client_can_send_is_refused(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, key)
    with pytest.raises(ValueError, match="printable ASCII"):
        main(["--load", str(tmp_path)])
