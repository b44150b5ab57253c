"""The command line of GMAI-VL's README starts a run on data files in GMAI-VL's own form."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_gmai.convert.huggingface import write_pretrained
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.presets import preset
from tests.training.command import finish, launcher, losses, run

FLAGS = """
    --freeze-llm --freeze-vit --llava {folder}/base_model/ --chat-template internlm2
    --datasets {folder}/examples/example_list.json --num-workers 1 --mirco-batch-size 1
    --global-batch-size 2 --lr 1e-3 --wd 0 --dset-pack-level soft --shard-strategy 'zero2'
    --group-by-length --resume --max-length 512 --checkpoint-interval 500 --log-interval 1
    --work-dir {folder}/work/ --dset-cache-dir {folder}/work/cache/ --dset-from-cache
"""


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """Start weights in the transformers flavour, and example files in GMAI-VL's form."""
    tokenizer_model = shards / "tokenizer.model"
    tokenizer = load_tokenizer(tokenizer_model)
    model = preset("gmai-vl-tiny").model
    language = dataclasses.replace(model.language, vocab_size=tokenizer.vocab_size)
    model = dataclasses.replace(model, language=language, image_token_id=tokenizer.image_token_id)
    write_pretrained(
        tmp_path / "base_model",
        model,
        SeededWeights(model, 1),
        tokenizer_model=tokenizer_model,
        special_tokens=tokenizer.special_tokens,
        reserved=tokenizer.reserved,
        chat_template="internlm2",
        dtype=torch.float32,
    )
    examples = tmp_path / "examples"
    examples.mkdir()
    Image.linear_gradient("L").convert("RGB").save(examples / "example.tif")
    sample = {
        "image": "example.tif",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat does the slide show?"},
            {"from": "gpt", "value": "A gradient from black to white."},
        ],
        "id": 0,
        "width": 256,
        "height": 256,
    }
    (examples / "example_data.json").write_text(json.dumps([sample] * 4))
    entry = {
        "image_dir": str(examples),
        "annotations": str(examples / "example_data.json"),
        "sample_ratio": 1.0,
        "length": 38276,
        "data_augment": True,
    }
    # The published list file ends its only entry with a comma, which is not JSON.
    (examples / "example_list.json").write_text(f'{{"FILE1": {json.dumps(entry)},\n}}')
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_published_command_trains(folder: Path, ranks: int) -> None:
    flags = shlex.split(FLAGS.format(folder=folder))
    process = run([*launcher(ranks), "pretrain_gmai_vl.py", *flags, "--device", "cpu"])
    output = finish(process)
    assert process.returncode == 0, output
    assert "--shard-strategy zero2 -> --use-distributed-optimizer" in output
    assert "no checkpoint in" in output and "trailing comma" in output
    assert losses(folder / "work")
    newest = (folder / "work" / "checkpoints" / "latest").read_text()
    carried = folder / "work" / "checkpoints" / newest / "carried.safetensors"
    assert carried.is_file()  # CLIP's last layer goes from phase to phase
