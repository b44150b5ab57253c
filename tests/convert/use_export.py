"""Uses an export as a stranger does, with whichever transformers runs this file.

    python use_export.py FOLDER

Text and images, single and batched, `generate(**inputs)` and `pipeline`; prints what it saw as one
line of JSON. Imports nothing of ours, so that an environment with another transformers can run it.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

NEW_TOKENS = 8
QUESTIONS = ["what is the modality of this image?", "brain MR", "is there a fracture? yes, in the"]


def picture(seed: int) -> Any:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def prompts(processor: Any, with_images: bool) -> list[str]:
    parts: list[dict[str, str]] = [{"type": "image"}] if with_images else []
    return [
        processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in QUESTIONS
    ]


def answers(model: Any, processor: Any, texts: list[str], images: list[Any] | None) -> list[Any]:
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return made[:, inputs["input_ids"].shape[1] :].tolist()


def main(folder: str) -> dict[str, Any]:
    local = {"local_files_only": True, "trust_remote_code": False}
    processor = transformers.AutoProcessor.from_pretrained(folder, **local)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **local).eval()
    seen: dict[str, Any] = {"version": transformers.__version__}
    for with_images in (False, True):
        texts = prompts(processor, with_images)
        images = [picture(n) for n in range(len(texts))] if with_images else None
        batched = answers(model, processor, texts, images)
        single = [
            answers(model, processor, [text], images and [images[n]])[0]
            for n, text in enumerate(texts)
        ]
        seen["images" if with_images else "text"] = {"batched": batched, "single": single}
    ask = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    message = [{"role": "user", "content": [
        {"type": "image", "image": picture(0)}, {"type": "text", "text": QUESTIONS[0]}
    ]}]  # fmt: skip
    said = ask(text=message, max_new_tokens=NEW_TOKENS, return_full_text=False)
    seen["pipeline"] = said[0]["generated_text"]
    seen["decoded"] = processor.decode(seen["images"]["single"][0], skip_special_tokens=True)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
