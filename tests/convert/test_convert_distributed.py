"""Training checkpoints are read tensor by tensor, by torch alone."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.distributed import CheckpointWeights

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture
def checkpoint(
    tmp_path: Path,
    model_config: ModelConfig,
    random_weights: Callable[[ModelConfig], dict[str, Tensor]],
) -> tuple[Path, dict[str, Tensor]]:
    """A folder with padded vocabularies and optimizer state, and the weights in it."""
    weights = random_weights(model_config)
    stored = dict(weights)
    for name in weights:
        if name.endswith(VOCABULARY):
            stored[name] = torch.cat([weights[name], torch.full((27, 48), 9.0)])
        stored[f"optimizer.state.exp_avg.{name}"] = torch.zeros(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(stored, checkpoint_id=tmp_path / "it", no_dist=True)
    return tmp_path / "it", weights


def test_weights_come_out_whole_and_without_padding(
    checkpoint: tuple[Path, dict[str, Tensor]], model_config: ModelConfig
) -> None:
    folder, weights = checkpoint
    found = CheckpointWeights(folder, model_config)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_reading_is_silent(
    checkpoint: tuple[Path, dict[str, Tensor]], model_config: ModelConfig
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CheckpointWeights(checkpoint[0], model_config)["projector.linear_fc1.bias"].sum()


def test_another_model_is_refused(
    checkpoint: tuple[Path, dict[str, Tensor]], model_config: ModelConfig
) -> None:
    wider = replace(model_config.language, ffn_hidden_size=96)
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \(160, 48\), not \(192, 48"):
        CheckpointWeights(checkpoint[0], replace(model_config, language=wider))
    deeper = replace(model_config.language, num_layers=3)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attention\.linear_qkv\.weight is mis"):
        CheckpointWeights(checkpoint[0], replace(model_config, language=deeper))
    larger = replace(model_config.language, vocab_size=500)
    with pytest.raises(ValueError, match=r"word_embeddings.weight has shape \(128, 48\), not"):
        CheckpointWeights(checkpoint[0], replace(model_config, language=larger))


def test_a_damaged_file_is_told_with_the_tensor(
    checkpoint: tuple[Path, dict[str, Tensor]], model_config: ModelConfig
) -> None:
    folder, weights = checkpoint
    for file in folder.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    found = CheckpointWeights(folder, model_config)
    name = next(iter(weights))
    with pytest.raises(ValueError, match=rf"distcp is damaged: {name} cannot be read"):
        found[name]


def test_a_flipped_bit_is_told_with_the_tensor(
    checkpoint: tuple[Path, dict[str, Tensor]], model_config: ModelConfig
) -> None:
    folder, weights = checkpoint
    name = "language_model.decoder.final_layernorm.weight"
    value = weights[name].numpy().tobytes()[:8]
    for file in folder.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        if (position := content.find(value)) >= 0:
            content[position] ^= 1  # of the lowest bits of a mantissa: still a number
            file.write_bytes(content)
    found = CheckpointWeights(folder, model_config)
    with pytest.raises(ValueError, match=rf"distcp is damaged: {name} cannot .*Bad CRC-32"):
        found[name]
    assert all(torch.equal(found[other], weights[other]) for other in weights if other != name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_numbers_that_are_no_weights_are_refused(
    tmp_path: Path,
    model_config: ModelConfig,
    random_weights: Callable[[ModelConfig], dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    weights = random_weights(model_config)
    name = next(iter(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = weights | {name: weights[name].to(dtype)}
        dcp.save(stored, checkpoint_id=tmp_path / "it", no_dist=True)
    with pytest.raises(ValueError, match=rf"{name} is torch\."):
        CheckpointWeights(tmp_path / "it", model_config)
