"""From a stored sample to tokens: template, tokenizer and limits in one object."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gmai.chat_formats import ChatFormat, chat_format
from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import parse_conversation
from megatron_gmai.data.text.template import Rendered, fit, render
from megatron_gmai.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """Turns stored samples into tokens. With `cut=True` (hard packing) samples may be longer than
    `max_length`, since the packer cuts them."""

    tokenizer: Tokenizer
    template: ChatFormat
    tokens_per_image: int
    max_length: int
    cut: bool = False
    max_images: int | None = None  # in a pack, so in a sample too

    @property
    def fingerprint(self) -> str:
        """Changes whenever a sample's tokens could."""
        parts = [
            self.tokenizer.fingerprint,
            self.template.name,
            self.tokens_per_image,
            self.max_length,
            self.cut,
            self.max_images,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def encode(self, record: Mapping[str, Any], num_images: int) -> Rendered:
        """Raises BadSample if the sample cannot be used at this length."""
        if self.max_images is not None and num_images > self.max_images:
            raise BadSample(f"{num_images} images, more than --max-images-per-pack")
        conversation = parse_conversation(record, num_images)
        rendered = render(conversation, self.template, self.tokenizer, self.tokens_per_image)
        if not self.cut:
            return fit(rendered, self.max_length)
        if rendered.images_end > self.max_length:
            raise BadSample(
                f"the images end at token {rendered.images_end}, more than --max-length "
                f"{self.max_length}, and an image is never cut"
            )
        return rendered


def make_encoder(data: DataConfig, tokenizer: Tokenizer, vision: VisionConfig) -> Encoder:
    """How `data` wants samples turned into tokens."""
    return Encoder(
        tokenizer,
        chat_format(data.chat_template),
        vision.tokens_per_image,
        data.max_length,
        cut=data.dset_pack_level == "hard",
        max_images=data.max_images_per_pack,
    )
