"""Sources that were read as something else before they were refused."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_gmai.convert.huggingface import open_pretrained
from megatron_gmai.weights import EMBEDDING
from tests.convert.conftest import edit_config

OUTPUT = "language_model.lm_head.weight"


def test_another_output_layer_of_a_tied_model_is_not_lost(saved: Path) -> None:
    edit_config(saved, lambda config: config["text_config"].update(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=f"{OUTPUT} is not the embedding.* tie_word_embeddings"):
        open_pretrained(saved).weights[EMBEDDING]
    tensors = load_file(saved / "model.safetensors")
    tensors[OUTPUT] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, saved / "model.safetensors")
    assert len(open_pretrained(saved).weights[EMBEDDING]) == 101


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_file_of_tensors_is_to_be_downloaded_again(
    saved: Path, name: str, content: bytes
) -> None:
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a whole .*: download it again") as told:
        open_pretrained(saved)
    assert "\n" not in str(told.value) and "mmap" not in str(told.value)
