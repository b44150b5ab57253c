"""Hugging Face folders -> canonical weights, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_gmai.config import Config, ModelConfig
from megatron_gmai.convert.configs import Described, read_config, read_separate_configs
from megatron_gmai.convert.files import TensorFolder, weight_files
from megatron_gmai.convert.mapping import Flavour, Row, leftover_shapes, rows
from megatron_gmai.convert.memory import ReusedMemory
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.weights import EMBEDDING, OUTPUT, Shape

_SHOWN = 8  # problems listed in one message
_PROJECTOR = "projector."
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@dataclass(frozen=True)
class Pretrained:
    """Weights found in a folder.

    `weights` and `leftovers` read and convert a tensor each time it is asked for, in the dtype of
    the file, so a model larger than memory can be streamed. `leftovers` are the parts of CLIP that
    never run (last layer, final norm); they are kept so that an export is complete, and are empty
    when the source lacks any of them.
    """

    model: ModelConfig
    flavour: Flavour
    weights: Mapping[str, Tensor]
    leftovers: Mapping[str, Tensor]
    num_bytes: int  # of the source's weight files


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made by its function when it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def open_pretrained(folder: str | Path) -> Pretrained:
    """Open a GMAI-VL checkpoint in either flavour (found out from its config.json).

    Reading a tensor raises ValueError if it is quantised or holds NaN or infinity.

    Raises:
        ValueError: no such folder, a config that this model cannot express, a file that is
            missing, broken or outside the folder, or tensors that are missing, of another shape,
            or unknown; the message names them.
    """
    folder = existing_folder(folder)
    described = read_config(folder)
    tensors = TensorFolder(folder)
    table = rows(described.model, described.flavour)
    _check(f"{folder} is not a whole {described.flavour} checkpoint", described, table, tensors)
    memory = ReusedMemory()
    makers = {row.canonical: _maker(row, tensors, memory) for row in table}
    _expect_tied(makers, described, tensors)
    return _pretrained(described, makers, tensors, [folder])


def open_separate(
    llm: str | Path, vision: str | Path, vocab_size: int, image_token_id: int, seed: int
) -> Pretrained:
    """Open a language model and a CLIP that lie in two folders, and join them by a new projector.

    Args:
        llm: InternLM2, or Llama and what is built like it.
        vision: CLIP, with or without its text tower.
        vocab_size: ids of the tokenizer with `<image>`; rows that the language model lacks are
            added, each the mean of all rows, so that a new id is as likely as an average one.
        image_token_id: id of `<image>`.
        seed: of the projector's weights, which have the dtype of the language model.

    Raises:
        ValueError: as `open_pretrained`.
    """
    llm, vision = existing_folder(llm), existing_folder(vision)
    described = read_separate_configs(llm, vision)
    tensors = TensorFolder(llm, "language_model.")
    tensors.join(TensorFolder(vision, "vision_tower."))
    whole = rows(described.model, described.flavour)
    table = tuple(row for row in whole if not row.canonical.startswith(_PROJECTOR))
    _check(f"{llm} and {vision} do not hold both models", described, table, tensors)
    rows_given = described.model.language.vocab_size
    language = replace(described.model.language, vocab_size=max(rows_given, vocab_size))
    model = replace(described.model, language=language, image_token_id=image_token_id)
    memory = ReusedMemory()
    makers = {row.canonical: _maker(row, tensors, memory) for row in table}
    _expect_tied(makers, described, tensors)
    for name in {EMBEDDING, OUTPUT} & makers.keys():
        makers[name] = _with_rows(makers[name], language.vocab_size)
    norm = makers["language_model.decoder.final_layernorm.weight"]
    projector = SeededWeights(model, seed)
    makers |= {
        name: partial(lambda name: projector[name].to(norm().dtype), name)
        for name in projector
        if name.startswith(_PROJECTOR)
    }
    return _pretrained(replace(described, model=model), makers, tensors, [llm, vision])


def open_start(config: Config, vocab_size: int, image_token_id: int) -> Pretrained | None:
    """The published weights that a run names: `--llava`, or `--llm` and `--vision` for a tokenizer
    of `vocab_size` ids; None if it names none. Raises ValueError as `open_pretrained`."""
    run = config.run
    if run.llava:
        return open_pretrained(run.llava)
    if run.llm and run.vision:
        seed = config.train.seed
        return open_separate(run.llm, run.vision, vocab_size, image_token_id, seed)
    return None


def check_tokenizer(model: ModelConfig, vocab_size: int, image_token_id: int) -> None:
    """Raises ValueError unless a tokenizer of so many ids belongs to the weights of a model."""
    if vocab_size > model.language.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids, the embedding only {model.language.vocab_size} "
            "rows; give the tokenizer that belongs to these weights"
        )
    if image_token_id != model.image_token_id:
        raise ValueError(
            f"<image> is {image_token_id} in the tokenizer, {model.image_token_id} in config.json; "
            "give the tokenizer that belongs to these weights, with its tokenizer_config.json"
        )


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is a model's in Hugging Face's format. A run's own folder has a config.json
    too, but no weights beside it."""
    return (path / "config.json").is_file() and any(any(path.glob(name)) for name in _WEIGHTS)


def existing_folder(path: str | Path) -> Path:
    """The path of a source. Raises ValueError if it is no folder."""
    if not Path(path).is_dir():
        raise ValueError(f"{path} is not a folder; give the one that holds config.json")
    return Path(path)


def _pretrained(
    described: Described,
    makers: dict[str, Callable[[], Tensor]],
    tensors: TensorFolder,
    folders: list[Path],
) -> Pretrained:
    leftovers = {name: partial(tensors.tensor, name) for name in leftover_shapes(described.model)}
    complete = all(name in tensors for name in leftovers)
    return Pretrained(
        described.model,
        described.flavour,
        LazyTensors(makers),
        LazyTensors(leftovers if complete else {}),
        sum(path.stat().st_size for folder in folders for path in weight_files(folder)),
    )


def _maker(row: Row, tensors: TensorFolder, memory: ReusedMemory) -> Callable[[], Tensor]:
    return lambda: row.rule.merge([tensors.tensor(source) for source in row.sources], memory)


def _with_rows(make: Callable[[], Tensor], count: int) -> Callable[[], Tensor]:
    def more() -> Tensor:
        tensor = make()
        missing = count - tensor.shape[0]
        if missing <= 0:
            return tensor
        mean = tensor.mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(missing, -1)])

    return more


def _untied_output(described: Described) -> Row:
    """Where the output layer would lie: some files of a tied model repeat the embedding there."""
    language = replace(described.model.language, tie_word_embeddings=False)
    untied = replace(described.model, language=language)
    return next(row for row in rows(untied, described.flavour) if row.canonical == OUTPUT)


def _expect_tied(
    makers: dict[str, Callable[[], Tensor]], described: Described, tensors: TensorFolder
) -> None:
    """Let a tied embedding be read only if an output layer beside it is the same: one that is
    another would be lost."""
    output = _untied_output(described).sources[0]
    if not described.model.language.tie_word_embeddings or output not in tensors:
        return
    make = makers[EMBEDDING]

    def same() -> Tensor:
        embedding = make()
        if not torch.equal(embedding, tensors.tensor(output)):
            raise ValueError(
                f"{tensors.folder}: {output} is not the embedding, but config.json ties the two; "
                "set tie_word_embeddings there to false (in text_config, if it has one)"
            )
        return embedding

    makers[EMBEDDING] = same


def _check(
    complaint: str, described: Described, table: tuple[Row, ...], tensors: TensorFolder
) -> None:
    needed: dict[str, Shape] = {
        source: shape
        for row in table
        for source, shape in zip(row.sources, row.source_shapes, strict=True)
    }
    known = {**needed, **leftover_shapes(described.model)}
    if described.model.language.tie_word_embeddings:
        output = _untied_output(described)
        known[output.sources[0]] = output.shape
    problems = [
        f"{name} is missing (expected {shape})"
        for name, shape in needed.items()
        if name not in tensors
    ]
    problems += [f"{name} is unknown to this model" for name in tensors if name not in known]
    problems += [
        f"{name} has shape {tensors.shape(name)}, config.json says {shape}"
        for name, shape in known.items()
        if name in tensors and tensors.shape(name) != shape
    ]
    if problems:
        more = len(problems) - _SHOWN
        tail = f"; and {more} more" if more > 0 else ""
        raise ValueError(f"{complaint}: {'; '.join(problems[:_SHOWN])}{tail}")
