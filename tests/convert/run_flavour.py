"""Runs a folder of either flavour under whichever transformers runs this file.

    python run_flavour.py FOLDER SAMPLES RESULT

SAMPLES (`torch.save`) lists what is asked: `tokens` [L] with every position of an image, and
normalised `pixels` [n, 3, I, I]; RESULT gets logits [L, V] and greedy ids of each, and the version.
The original flavour runs FOLDER's own modelling code. Imports nothing of ours, so that an
environment with another transformers can run it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def load(folder: str) -> tuple[Any, bool]:
    """The model in fp32, and whether it is of the original flavour."""
    config = json.loads((Path(folder) / "config.json").read_text())
    settings: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32}
    if config["model_type"] == "llava":
        return transformers.LlavaForConditionalGeneration.from_pretrained(folder, **settings), False
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **settings)
    return model, True


def one_a_picture(tokens: torch.Tensor, image: int) -> torch.Tensor:
    """A single token in the place of each run of image tokens, as the original code wants it."""
    repeated = (tokens[1:] == image) & (tokens[:-1] == image)
    return tokens[torch.cat([torch.tensor([True]), ~repeated])]


@torch.no_grad()
def main(folder: str, samples: str, result: str) -> None:
    asked = torch.load(samples)
    model, is_original = load(folder)
    model.eval().generation_config.eos_token_id = None
    answers = []
    for sample in asked["samples"]:
        tokens = sample["tokens"]
        if is_original:
            tokens = one_a_picture(tokens, model.config.image_token_index)
        batch = {"attention_mask": torch.ones_like(tokens)[None]}
        if len(sample["pixels"]):
            batch |= {"input_ids": tokens[None], "pixel_values": sample["pixels"]}
        else:  # transformers 4.46 takes no ids without images
            batch["inputs_embeds"] = model.get_input_embeddings()(tokens[None])
        logits = model(**batch).logits[0]
        new = asked["new_tokens"]
        made = model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                              pad_token_id=0)  # fmt: skip
        answers.append({"logits": logits, "greedy": made[0, -new:].tolist()})
    torch.save({"version": transformers.__version__, "answers": answers}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
