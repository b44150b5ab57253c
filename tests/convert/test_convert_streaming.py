"""A streamed checkpoint is what training writes, and goes through any layout unchanged."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gmai.config import Config, LanguageConfig, ModelConfig, ParallelConfig, VisionConfig
from megatron_gmai.convert.carried import CARRIED, read_carried
from megatron_gmai.convert.distributed import CheckpointWeights
from megatron_gmai.convert.manifest import read_manifest
from megatron_gmai.convert.mapping import Flavour, leftover_shapes, rows
from megatron_gmai.convert.memory import ReusedMemory
from megatron_gmai.convert.training_checkpoint import write_training_checkpoint
from megatron_gmai.convert.write import export_shapes
from tests.parallel.batches import CONFIG, MODEL
from tests.parallel.cases import Processes
from tests.parallel.world import run_world

FLAVOURS: tuple[Flavour, ...] = ("transformers", "original")
LAYOUT = ParallelConfig(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    num_virtual_stages_per_pipeline_rank=2,
)
# (vision layers, vision hidden, vision heads, layers, hidden, heads, groups, ffn, vocabulary)
SIZES = (
    (2, 8, 1, 4, 32, 2, 2, 6, 7),
    (3, 16, 4, 4, 24, 6, 2, 40, 257),
    (2, 24, 2, 4, 32, 8, 8, 44, 101),
)


def model_of(sizes: tuple[int, ...]) -> ModelConfig:
    vision_layers, vision_hidden, vision_heads, layers, hidden, heads, groups, ffn, words = sizes
    return ModelConfig(
        VisionConfig(vision_layers, vision_hidden, vision_heads, 2 * vision_hidden, 7, 14),
        LanguageConfig(layers, hidden, heads, groups, ffn, words, max_position_embeddings=64),
        image_token_id=words - 1,
    )


def carried_of(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(s, generator=generator) for n, s in leftover_shapes(model).items()}


def table_of(folder: Path) -> dict[str, Any]:
    """Name -> shape, dtype and chunks, of the model's tensors."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if "_extra_state" not in name
    }


def test_it_has_the_names_and_shapes_that_training_writes(
    alone: Processes, tmp_path: Path, random_weights: Callable[[ModelConfig], dict[str, Tensor]]
) -> None:
    from megatron_gmai.training.checkpoint import Position, open_checkpoint, save_checkpoint

    model = alone.model(CONFIG)
    saved = save_checkpoint(tmp_path / "run", Position(), [model], None, CONFIG)
    write_training_checkpoint(tmp_path / "streamed", CONFIG, random_weights(MODEL), {})
    streamed = open_checkpoint(tmp_path / "streamed")
    assert table_of(streamed.path) == table_of(saved)
    assert streamed.config == CONFIG and not streamed.has_optimizer
    assert {path.name for path in streamed.path.iterdir()} == {
        path.name for path in saved.iterdir()
    }


def test_training_loads_it_in_another_dtype(
    alone: Processes, tmp_path: Path, random_weights: Callable[[ModelConfig], dict[str, Tensor]]
) -> None:
    from megatron_gmai.training.checkpoint import load_checkpoint, open_checkpoint

    weights = {name: tensor.bfloat16() for name, tensor in random_weights(MODEL).items()}
    write_training_checkpoint(tmp_path / "bf16", CONFIG, weights, {})
    model = alone.model(CONFIG)
    load_checkpoint(open_checkpoint(tmp_path / "bf16"), [model], None)
    loaded = dict(model.named_parameters())
    name = "vision_model.conv1.weight"
    assert loaded[name].dtype == torch.float32
    assert torch.equal(loaded[name], weights[name].float())


def through_a_layout(folder: Path) -> None:
    """In a world of four: every `N/in` is loaded by a model in LAYOUT and saved as `N/out`."""
    from megatron_gmai.model.gmai_vl import build_chunks
    from megatron_gmai.training.checkpoint import (
        Position,
        load_checkpoint,
        open_checkpoint,
        save_checkpoint,
    )

    processes = Processes()
    for case in sorted(folder.iterdir()):
        checkpoint = open_checkpoint(case / "in")
        config = replace(CONFIG, model=checkpoint.config.model, parallel=LAYOUT)
        chunks = build_chunks(config, processes.world(config))
        load_checkpoint(checkpoint, chunks, None)
        carried = read_carried(checkpoint.path, config.model)
        save_checkpoint(case / "out", Position(1), chunks, None, config, carried)


def published(model: ModelConfig, flavour: Flavour) -> dict[str, Tensor]:
    """All tensors of a random model, as a folder of that flavour names them."""
    generator = torch.Generator().manual_seed(3)
    shapes = export_shapes(model, flavour)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def merged(model: ModelConfig, flavour: Flavour) -> dict[str, Tensor]:
    """The same under our names; CLIP's unused parts apart."""
    tensors = published(model, flavour)
    return {
        row.canonical: row.rule.merge([tensors[source] for source in row.sources], ReusedMemory())
        for row in rows(model, flavour)
    }


def test_published_weights_come_back_from_tp_2_pp_2_and_vpp_2_bit_by_bit(tmp_path: Path) -> None:
    cases = [(model_of(sizes), flavour) for sizes in SIZES for flavour in FLAVOURS]
    for number, (model, flavour) in enumerate(cases):
        tensors = published(model, flavour)
        carried = {name: tensors[name] for name in leftover_shapes(model)}
        folder = tmp_path / str(number) / "in"
        write_training_checkpoint(folder, Config(model=model), merged(model, flavour), carried)
    run_world(4, through_a_layout, tmp_path)
    for number, (model, flavour) in enumerate(cases):
        path = read_manifest(tmp_path / str(number) / "out").path
        found, expected = CheckpointWeights(path, model), published(model, flavour)
        again = read_carried(path, model)
        for row in rows(model, flavour):
            again |= zip(row.sources, row.rule.split(found[row.canonical]), strict=True)
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_dtypes_are_kept_or_cast(
    tmp_path: Path, random_weights: Callable[[ModelConfig], dict[str, Tensor]]
) -> None:
    weights = random_weights(MODEL)
    mixed = {n: t.bfloat16() if n.startswith("language") else t for n, t in weights.items()}
    write_training_checkpoint(tmp_path / "kept", CONFIG, mixed, {})
    kept = CheckpointWeights(read_manifest(tmp_path / "kept").path, MODEL)
    assert all(kept[name].dtype == tensor.dtype for name, tensor in mixed.items())
    assert kept.dtype == torch.float32  # the one that holds them all
    write_training_checkpoint(tmp_path / "cast", CONFIG, mixed, {}, dtype=torch.float16)
    cast = CheckpointWeights(read_manifest(tmp_path / "cast").path, MODEL)
    assert cast.dtype == torch.float16
    assert all(torch.equal(cast[name], tensor.half()) for name, tensor in mixed.items())


def test_a_carried_file_of_another_model_is_refused(
    tmp_path: Path, random_weights: Callable[[ModelConfig], dict[str, Tensor]]
) -> None:
    write_training_checkpoint(tmp_path / "c", CONFIG, random_weights(MODEL), carried_of(MODEL))
    path = read_manifest(tmp_path / "c").path
    deeper = replace(MODEL, vision=replace(MODEL.vision, num_layers=5))
    with pytest.raises(ValueError, match="does not belong to this model"):
        read_carried(path, deeper)
    (path / CARRIED).write_bytes(b"\0" * 99)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_carried(path, MODEL)
    with pytest.raises(ValueError, match=f"is damaged: {CARRIED} should have"):
        read_manifest(tmp_path / "c")


MEASURE = """
import json, resource, sys
sys.argv[0] = "convert_checkpoint.py"
sys.path.insert(0, "tools")
import convert_checkpoint
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert convert_checkpoint.main(sys.argv[1:]) == 0
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024))
"""


def test_memory_is_that_of_a_few_tensors_both_ways(
    export: Callable[..., Any], tmp_path: Path
) -> None:
    # 8 layers of 48 MB, the largest tensor of 21 MB.
    language = LanguageConfig(8, 1024, 16, 16, 2560, max_position_embeddings=512)
    written = export(language=language, max_shard_bytes=1 << 40)
    size = (written.folder / "model.safetensors").stat().st_size
    assert size > 300e6
    for words in (
        ["from-hf", "--model", str(written.folder), "--output", str(tmp_path / "checkpoints")],
        ["to-hf", "--load", str(tmp_path / "checkpoints"), "--output", str(tmp_path / "hf")],
    ):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout.splitlines()[-1]) < 120e6, done.stdout
