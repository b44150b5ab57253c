"""The model's weights: one table of name, shape, tensor-parallel cut and place. No torch.

Filling, checkpoints, conversion and freezing read it; nobody else states a name or a cut. Names are
those of the whole model in one process, whichever rank and chunk holds the weight; shapes are of
whole tensors, the vocabulary not padded.

Letters in shapes: `H` language hidden, `Hv` vision hidden, `F` feed-forward, `V` vocabulary,
`P` patches an image, `D` head size.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

from megatron_gmai.config import LoraConfig, ModelConfig
from megatron_gmai.layout import Chunk

Shape = tuple[int, ...]
# How tensor parallelism divides a weight. "rows": dim 0. "columns": dim 1. "gate_up": dim 0 of each
# half, since rank r's activation pairs its own gate and up rows. "vocabulary": padded, then rows.
Cut = Literal["none", "vocabulary", "rows", "columns", "gate_up"]
# The parts of the model that are frozen or trained as a whole.
Tower = Literal["vision_model", "projector", "language_model"]
Place = Literal["vision", "first", "layer", "last", "ends"]

# Where adapters can be, by the words of `--lora-targets`: modules of a layer of either tower.
LORA_TARGETS = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"
VOCABULARY_MULTIPLE = 128  # rows of the embedding on every tensor-parallel rank
_LAYER = re.compile(r"^(language_model\.decoder\.layers\.)(\d+)(\..*)$")


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model."""

    name: str
    shape: Shape
    cut: Cut = "none"
    # Chunks with the towers, the first chunk, the chunk of its decoder layer, the last chunk, or
    # both ends.
    place: Place = "vision"
    layer: int | None = None  # of the decoder

    @property
    def tower(self) -> Tower:
        return cast(Tower, self.name.split(".")[0])

    @property
    def is_adapter(self) -> bool:
        return ".lora." in self.name

    def is_in(self, chunk: Chunk) -> bool:
        """Whether the chunk holds it."""
        if self.place == "layer":
            return self.layer in chunk.layers
        if self.place == "vision":
            return chunk.has_vision
        if self.place == "ends":
            return chunk.is_first or chunk.is_last
        return chunk.is_first if self.place == "first" else chunk.is_last


def weights(model: ModelConfig, lora: LoraConfig = LoraConfig()) -> dict[str, Weight]:  # noqa: B008
    """Every weight that is run, by name, in the order of the model; adapters where there are some.

    CLIP's last layer and final norm never run (`VisionConfig.layers_used`), so they are not here.
    """
    own = (*_vision(model), *_projector(model), *_language(model))
    adapters = (pair for base in own if _has_adapter(base, lora) for pair in _adapter(base, lora))
    return {weight.name: weight for weight in (*own, *adapters)}


def parameters(model: ModelConfig) -> int:
    """Values in all weights that are run."""
    return sum(math.prod(weight.shape) for weight in weights(model).values())


def is_stored(weight: Weight, lora: LoraConfig) -> bool:
    """Whether checkpoints of a run hold it: of a tower with adapters these alone, since its own
    weights never change."""
    return weight.is_adapter == (weight.tower in lora.towers)


def name_in_model(chunk: Chunk, name: str, tied: bool = False) -> str:
    """The name in the whole model of what a chunk calls `name`: layers count on from earlier
    chunks, and a tied output layer is the embedding."""
    if tied and name == OUTPUT:
        return EMBEDDING
    match = _LAYER.match(name)
    if match is None:
        return name
    return f"{match[1]}{chunk.layers[int(match[2])]}{match[3]}"


def in_words(towers: Iterable[str]) -> str:
    """As `the vision tower and the projector`, for messages."""
    words = {"vision_model": "vision tower"}
    return " and ".join(f"the {words.get(tower, tower.replace('_', ' '))}" for tower in towers)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and output layer inside the model: they must divide over the ranks."""
    multiple = VOCABULARY_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def local_shape(weight: Weight, tp_size: int) -> Shape:
    """Shape of one tensor-parallel rank's part."""
    if weight.cut == "none":
        return weight.shape
    rows, *rest = weight.shape
    if weight.cut == "vocabulary":
        rows = padded_vocab_size(rows, tp_size)
    if weight.cut == "columns":
        return (rows, rest[0] // tp_size, *rest[1:])
    return (rows // tp_size, *rest)


def _vision(model: ModelConfig) -> Iterator[Weight]:
    vision, hidden = model.vision, model.vision.hidden_size
    tower = "vision_model"
    yield Weight(f"{tower}.class_token", (1, 1, hidden))
    yield Weight(f"{tower}.conv1.weight", (hidden, 3, vision.patch_size, vision.patch_size))
    positions = (vision.tokens_per_image + 1, hidden)
    yield Weight(f"{tower}.position_embeddings.weight", positions)
    yield from _affine(f"{tower}.ln_pre", (hidden,))
    for layer in range(vision.layers_used):
        prefix = f"{tower}.decoder.layers.{layer}"
        yield from _affine(f"{prefix}.self_attention.linear_qkv", (3 * hidden, hidden))
        yield from _affine(f"{prefix}.self_attention.linear_proj", (hidden, hidden))
        yield from _affine(f"{prefix}.input_layernorm", (hidden,))
        yield from _affine(f"{prefix}.pre_mlp_layernorm", (hidden,))
        yield from _affine(f"{prefix}.mlp.linear_fc1", (vision.ffn_hidden_size, hidden))
        yield from _affine(f"{prefix}.mlp.linear_fc2", (hidden, vision.ffn_hidden_size))


def _projector(model: ModelConfig) -> Iterator[Weight]:
    inside, outside = model.vision.hidden_size, model.language.hidden_size
    yield from _affine("projector.linear_fc1", (outside, inside))
    yield from _affine("projector.linear_fc2", (outside, outside))


def _language(model: ModelConfig) -> Iterator[Weight]:
    language, hidden = model.language, model.language.hidden_size
    vocabulary = (language.vocab_size, hidden)
    tied = language.tie_word_embeddings
    yield Weight(EMBEDDING, vocabulary, "vocabulary", "ends" if tied else "first")
    for layer in range(language.num_layers):
        yield from _decoder_layer(model, layer)
    yield Weight("language_model.decoder.final_layernorm.weight", (hidden,), "none", "last")
    if not tied:
        yield Weight(OUTPUT, vocabulary, "vocabulary", "last")


def _decoder_layer(model: ModelConfig, layer: int) -> Iterator[Weight]:
    language, hidden = model.language, model.language.hidden_size
    heads, ffn = language.num_attention_heads, language.ffn_hidden_size
    head = hidden // heads
    qkv = (heads + 2 * language.num_query_groups) * head
    table: tuple[tuple[str, Shape, Cut], ...] = (
        ("self_attention.linear_qkv", (qkv, hidden), "rows"),
        ("self_attention.linear_proj", (hidden, heads * head), "columns"),
        ("mlp.linear_fc1", (2 * ffn, hidden), "gate_up"),
        ("mlp.linear_fc2", (hidden, ffn), "columns"),
        ("input_layernorm", (hidden,), "none"),
        ("pre_mlp_layernorm", (hidden,), "none"),
    )
    for name, shape, cut in table:
        yield Weight(f"{_decoder(layer)}.{name}.weight", shape, cut, "layer", layer)


def _decoder(layer: int) -> str:
    return f"language_model.decoder.layers.{layer}"


def _has_adapter(weight: Weight, lora: LoraConfig) -> bool:
    targets = lora.targets_in(weight.tower)
    return weight.name.endswith(tuple(f".{LORA_TARGETS[target]}.weight" for target in targets))


def _adapter(base: Weight, lora: LoraConfig) -> Iterator[Weight]:
    """A [r, in] and B [out, r] of one linear: the side that the linear divides is divided."""
    rank, (out, inside) = lora.lora_rank, base.shape
    stem = f"{base.name.removesuffix('.weight')}.lora"
    is_row_parallel = base.cut == "columns"
    cut_of_a, cut_of_b = ("columns", "none") if is_row_parallel else ("none", base.cut)
    yield Weight(f"{stem}.a", (rank, inside), cast(Cut, cut_of_a), base.place, base.layer)
    yield Weight(f"{stem}.b", (out, rank), cast(Cut, cut_of_b), base.place, base.layer)


def _affine(name: str, shape: Shape) -> Iterator[Weight]:
    """A weight and a bias over its first dimension."""
    yield Weight(f"{name}.weight", shape)
    yield Weight(f"{name}.bias", shape[:1])
