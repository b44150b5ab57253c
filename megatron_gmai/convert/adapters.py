"""The weights of a run with `--llm-use-lora` or `--vit-use-lora`: its checkpoints hold adapters in
that tower's place, on top of the weights that the run began with."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_gmai.config import Config, LoraConfig, ModelConfig
from megatron_gmai.convert.distributed import CheckpointWeights
from megatron_gmai.convert.manifest import Manifest, read_manifest
from megatron_gmai.convert.read import is_hugging_face, open_pretrained, open_start
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.weights import Tower, weights


class MergedWeights(Mapping[str, Tensor]):
    """Weights of the whole model with the adapters put in: W + alpha / r · B A, in fp32.

    Args:
        own: what the checkpoint holds: adapters, and the towers that are trained or frozen whole.
        base: what the run began with.
        scale: of the adapters, alpha / r; 0 leaves what is below them as it was.
    """

    def __init__(
        self,
        model: ModelConfig,
        own: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        scale: float,
    ) -> None:
        self._own, self._base, self._scale = own, base, scale
        self._names = tuple(weights(model))

    def __getitem__(self, name: str) -> Tensor:
        if name in self._own:
            return self._own[name]
        tensor, stem = self._base[name], f"{name.removesuffix('.weight')}.lora"
        if self._scale == 0 or f"{stem}.a" not in self._own:
            return tensor
        a, b = self._own[f"{stem}.a"].float(), self._own[f"{stem}.b"].float()
        # Not cast back here: whoever writes it rounds once.
        return torch.addmm(tensor.float(), b, a, alpha=self._scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_trained(
    checkpoint: Manifest, base: Path | None = None, with_adapters: bool = True
) -> Mapping[str, Tensor]:
    """Weights of the whole model of any checkpoint; adapters, if it has some, are merged in.

    `base` is the folder that lies under the adapters, if not the one that the run names. Raises
    ValueError where it is missing or of another model.
    """
    config = checkpoint.config
    if not config.lora.towers:
        return CheckpointWeights(checkpoint.path, config.model)
    scale = config.lora.lora_alpha / config.lora.lora_rank if with_adapters else 0.0
    own = CheckpointWeights(checkpoint.path, config.model, config.lora)
    return MergedWeights(config.model, own, open_base(config, base), scale)


def open_base(config: Config, given: Path | None = None) -> Mapping[str, Tensor]:
    """The weights under the adapters of a run: a Hugging Face folder or a training checkpoint, or
    the random ones of a run that began with none. Raises ValueError if they are not there, or of
    other sizes."""
    if given is not None:
        found = _open_folder(given)
        return _of_model(given, config, *found)
    run = config.run
    for folder in (run.llava, run.llm, run.vision, run.load):
        if folder is not None:
            _folder(Path(folder))
    model = config.model
    if source := open_start(config, model.language.vocab_size, model.image_token_id):
        return _of_model(Path(run.llava or run.llm or ""), config, source.model, source.weights)
    if run.load is None:
        return SeededWeights(config.model, config.train.seed)
    earlier = read_manifest(Path(run.load)).config
    if earlier.lora.towers:  # this run went on with the adapters of an earlier one
        return open_base(earlier)
    return open_base(config, Path(run.load))


def _open_folder(folder: Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    if is_hugging_face(_folder(folder)):
        source = open_pretrained(folder)
        return source.model, source.weights
    checkpoint = read_manifest(folder)
    if checkpoint.config.lora.towers:
        raise ValueError(f"{folder} holds adapters itself; give --base what they lie on")
    model = checkpoint.config.model
    return model, CheckpointWeights(checkpoint.path, model)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(
            f"{path}, which the adapters were trained on, is not there; say with --base where it is"
        )
    return path


def _of_model(
    folder: Path, config: Config, model: ModelConfig, found: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    # How far a model reaches is no property of its weights.
    ours, theirs = (
        replace(
            each,
            language=replace(each.language, max_position_embeddings=0, rope_scaling_factor=1.0),
        )
        for each in (config.model, model)
    )
    if ours != theirs:
        raise ValueError(f"{folder} is not what the adapters lie on: {theirs}, not {ours}")
    return found


def changed_towers(own: CheckpointWeights, base: Mapping[str, Tensor]) -> tuple[Tower, ...]:
    """The parts of the model whose own weights the run changed, which no adapter can hold."""
    stored: dict[Tower, list[str]] = {}
    for weight in own.table.values():
        if not weight.is_adapter:
            stored.setdefault(weight.tower, []).append(weight.name)
    return tuple(
        tower for tower, names in stored.items() if any(_differs(own, base, name) for name in names)
    )


def _differs(own: CheckpointWeights, base: Mapping[str, Tensor], name: str) -> bool:
    tensor = own[name]
    return not torch.equal(tensor, base[name].to(tensor.dtype))


def adapter_names(model: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """The weights that have an adapter, in the order of the model."""
    table = weights(model, lora)
    return tuple(
        name for name in weights(model) if f"{name.removesuffix('.weight')}.lora.a" in table
    )
