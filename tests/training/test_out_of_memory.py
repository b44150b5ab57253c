"""Out of memory: one message that names the micro-batch, on the rank that it happened to."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_gmai.training.out_of_memory import OutOfMemory, describe
from tests.parallel.batches import global_batch, join
from tests.parallel.cases import Case, Processes, Trainer
from tests.training.command import finish, start
from tests.training.faulty import faulty


def test_the_micro_batch_that_does_not_fit_is_named(alone: Processes) -> None:
    """The second of two micro-batches, in its forward pass."""
    trainer = Trainer(Case("run", micro_batch_size=2), alone)
    batch = join(global_batch(0)[2:])
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the page")
    exact, calls = trainer.chunks[0].forward, [0]

    def forward(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise full
        return exact(*arguments, **options)

    with (
        mock.patch.object(trainer.chunks[0], "forward", forward),
        pytest.raises(OutOfMemory, match=r"rank 0 ran out of memory with a micro-batch") as raised,
    ):
        trainer.step(0)
    text = str(raised.value)
    assert describe(batch) in text
    assert "3 images and 128 tokens, in segments of 20, 24, 20, 20, 24, 20 tokens" in text
    assert "Tried to allocate 2.00 GiB.\nLower --micro-batch-size" in text


def test_the_message_stands_alone_and_ends_the_run(shards: Path, tmp_path: Path) -> None:
    fault = (
        "from megatron_gmai.training import step\n"
        "import torch\n"
        "def full(*arguments, **options):\n"
        "    next(arguments[0])\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "step.forward_step = full"
    )
    program = faulty(tmp_path / "program.py", fault)
    process = start(shards, tmp_path / "work", 1, program=program)
    output = finish(process)
    assert process.returncode == 2
    assert output.count("error: rank 0 ran out of memory with a micro-batch of") == 1, output
    assert "samples: samples/" in output
    assert "Traceback" not in output
