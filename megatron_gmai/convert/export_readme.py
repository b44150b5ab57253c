"""README.md of an export: how to load it, and how its images must be prepared."""

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.export_configs import REMOTE_CODE
from megatron_gmai.convert.mapping import Flavour

_TRANSFORMERS = """\
Loads offline and without remote code in transformers 4.49 to 5.x (`LlavaForConditionalGeneration`
over Llama and CLIP), and in vLLM and SGLang as a LLaVA model:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER)
model = AutoModelForImageTextToText.from_pretrained(FOLDER, torch_dtype="auto")
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=[image], return_tensors="pt")
answer = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Messages go through the chat template: in it the name of a special token is spelled out like any
other text (a mark, U+FDD0, breaks it up, and the tokenizer takes the mark out again), as in
training. In a text that reaches the tokenizer without the template, such a name is the token.

The model alone also loads in transformers 4.46 to 4.48, which cannot read the image processor.
"""

_ORIGINAL = """\
This is GMAI-VL's own flavour (`model_type: enhanced_llava`, InternLM2 names). Its classes are not
part of transformers and not part of this folder. Copy these files here from a GMAI-VL release, or
from `xtuner/_lite/modelings/llava/` of https://github.com/uni-medical/GMAI-VL, read them, and load
with transformers 4.46 to 4.49, `einops` installed and `trust_remote_code=True`:

{files}

```python
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
image_processor = AutoImageProcessor.from_pretrained(FOLDER)
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True, torch_dtype="auto")
```

That code puts the features of an image in the place of one `<image>` token.
"""

_PADDED = """\
Pad to a square with CLIP's mean colour (122, 116, 104), then resize to {side} × {side}, bicubic.
The image processor in this folder does so (`LlavaImageProcessor`: transformers 4.49 or newer).
"""
_TO_PAD = """\
Training padded each image to a square with CLIP's mean colour and resized it to {side} × {side},
bicubic. The image processor in this folder does not pad, because the transformers that this
flavour needs has none that does. Pad before:

```python
from PIL import Image

def pad(image):
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
```
"""
_CROPPED = """\
Resize the shorter side to {side}, bicubic, then cut out the middle {side} × {side}, as CLIP does.
The image processor in this folder does so.
"""

# The same map as data/images/decode.py:window_to_8_bits; a test compares the two.
_DEEP = """\
Images of 16 bits, or of floats, must become 8 bits **before** the processor sees them: its own
conversion to RGB clips nearly all of their values to white. Training windows them so:

```python
import numpy as np
from PIL import Image

def to_8_bits(image):
    if image.mode not in ("I", "F", "I;16", "I;16L", "I;16B", "I;16N"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float32)
    finite = values[np.isfinite(values)]
    least, most = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=least, posinf=most, neginf=least)
    if least == most:
        grey = np.full(values.shape, 128, np.uint8)
    else:
        low, high = np.percentile(values, (0.5, 99.5))
        low, high = (low, high) if low < high else (least, most)
        inputs, levels = [low, high], [8.0 * (least < low), 255.0 - 8.0 * (most > high)]
        if least < low:
            inputs, levels = [least, *inputs], [0.0, *levels]
        if most > high:
            inputs, levels = [*inputs, most], [*levels, 255.0]
        grey = np.rint(np.interp(values, inputs, levels)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
```

Values inside the 0.5 and 99.5 percentiles spread over levels 8 to 247, the rest over the ends.
DICOM files with a window of their own use that window instead of the percentiles.
"""


def readme(model: ModelConfig, flavour: Flavour, pad_to_square: bool, has_leftovers: bool) -> str:
    """The text of README.md.

    Args:
        pad_to_square: whether training padded images to a square.
        has_leftovers: whether CLIP's last layer and final norm are the source's.
    """
    files = "\n".join(f"- `{name}`" for name in REMOTE_CODE)
    loading = _TRANSFORMERS if flavour == "transformers" else _ORIGINAL.format(files=files)
    padded = _PADDED if flavour == "transformers" else _TO_PAD
    images = (padded if pad_to_square else _CROPPED).format(side=model.vision.image_size)
    last = model.vision.num_layers - 1
    unused = (
        "are those of the CLIP that training began with."
        if has_leftovers
        else "are an identity: training began without them."
    )
    scaling = ""
    if model.language.rope_scaling_factor != 1.0:
        scaling = " Beyond, dynamic-NTK RoPE takes over, which training never saw."
    parts = (
        "# GMAI-VL, exported by megatron_gmai\n",
        loading,
        "## Images\n",
        images,
        _DEEP,
        "## What is in the weights\n",
        f"Features are taken before CLIP's last layer: layer {last} and `post_layernorm` never\n"
        f"run. Here they {unused}\n",
        f"Trained for up to {model.language.max_position_embeddings} tokens.{scaling}\n",
    )
    return "\n".join(parts)
