"""What a run begins from, and the configuration that follows from it: all found before anything
large is built, and final when it is validated."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_gmai.config import Config, ModelConfig
from megatron_gmai.convert.carried import read_carried
from megatron_gmai.convert.huggingface import Pretrained, check_tokenizer, open_start
from megatron_gmai.data.shards.index import MANIFEST_FILE
from megatron_gmai.data.shards.mean_load import images_per_pack
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.planner.cost import typical_images
from megatron_gmai.runtime.groups import restarts
from megatron_gmai.tokenizer_file import find_tokenizer, tokenizer_file
from megatron_gmai.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    newest_whole_checkpoint,
    open_checkpoint,
    verify_checkpoint,
)

Log = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """What a run begins from, found before anything large is built."""

    resume: Checkpoint | None = None
    load: Checkpoint | None = None
    pretrained: Pretrained | None = None
    base: Checkpoint | None = None  # under a checkpoint that holds adapters only

    @property
    def model(self) -> ModelConfig | None:
        """Sizes that the start weights dictate."""
        checkpoint = self.resume or self.load
        if checkpoint is not None:
            return checkpoint.config.model
        return None if self.pretrained is None else self.pretrained.model

    def carried(self) -> Mapping[str, Tensor]:
        """Parts of CLIP that never run, which go from checkpoint to checkpoint to an export."""
        checkpoint = self.resume or self.load
        if checkpoint is not None:
            return read_carried(checkpoint.path, checkpoint.config.model)
        leftovers = {} if self.pretrained is None else self.pretrained.leftovers
        return {name: tensor.clone() for name, tensor in leftovers.items()}


def find_start(config: Config, log: Log, damaged: Collection[Path] = ()) -> Start:
    """Choose between resuming, weights of a checkpoint, Hugging Face weights and a fresh start.

    `--resume` wins where its folder holds a whole checkpoint, apart from those known to be
    `damaged`; else `--load`, `--llava`, or `--llm` and `--vision` count.
    """
    run = config.run
    if number := restarts():
        log(f"restart {number} by torchrun: the run continues as with --resume")
    if run.resume or number:
        assert run.save is not None
        checkpoint, skipped = newest_whole_checkpoint(Path(run.save), damaged)
        for reason in skipped:
            log(f"passed over a checkpoint: {reason}")
        if checkpoint is not None:
            log(f"resuming from {checkpoint.path}")
            return with_base(Start(resume=checkpoint), config)
        log(f"no checkpoint in {run.save} to resume from, so the run starts from the beginning")
    elif run.save is not None and (earlier := sorted(Path(run.save).glob("iter_*"))):
        raise ValueError(
            f"{run.save} holds {earlier[-1].name} of an earlier run, which this one would write "
            "over; continue it with --resume, or give another --work-dir"
        )
    if run.load is not None:
        return with_base(Start(load=open_checkpoint(Path(run.load))), config)
    return Start(pretrained=_published(config))


def _published(config: Config) -> Pretrained | None:
    run = config.run
    if not (run.llm and run.vision):
        return open_start(config, vocab_size=0, image_token_id=-1)  # a whole model has its own
    # A language model alone has no <image>: the tokenizer says how many rows its embedding needs.
    tokenizer = load_tokenizer(tokenizer_file(find_tokenizer(config)))
    return open_start(config, tokenizer.vocab_size, tokenizer.image_token_id)


def verified(start: Start, config: Config, log: Log, group: ProcessGroup | None = None) -> Start:
    """`start`, or where the bytes of the checkpoint to resume from have changed, the next best one.

    All ranks, those of `group`, read the checkpoints together, once.

    Raises:
        CheckpointError: a checkpoint that the user named is damaged.
    """
    damaged: list[Path] = []
    while start.resume is not None:
        try:
            verify_checkpoint(start.resume, group)
            break
        except CheckpointError as error:
            log(f"passed over a checkpoint: {error}")
            damaged.append(start.resume.path)
            start = find_start(config, log, damaged)
    for checkpoint in (start.load, start.base):
        if checkpoint is not None:
            verify_checkpoint(checkpoint, group)
    return start


def with_base(start: Start, config: Config) -> Start:
    """A checkpoint of adapters lies on top of the weights that its run began with: those that this
    run names, or else those that the run that saved it named."""
    checkpoint = start.resume or start.load
    assert checkpoint is not None
    if not checkpoint.config.lora.towers:
        return start
    own, saved = config.run, checkpoint.config.run
    model = checkpoint.config.model
    for named in (config, checkpoint.config):
        if found := open_start(named, model.language.vocab_size, model.image_token_id):
            return dataclasses.replace(start, pretrained=found)
    load = (own.load if start.resume else None) or saved.load
    if load is None:
        return start
    base = open_checkpoint(Path(load))
    if base.config.lora.towers:  # the run went on with an earlier one's adapters
        below = with_base(Start(load=base), base.config)
        return dataclasses.replace(start, pretrained=below.pretrained, base=below.base)
    return dataclasses.replace(start, base=base)


def mean_images_per_pack(config: Config) -> float:
    """Of the run's shards; where they are still to be made, of packs full of single images."""
    folder = config.data.shards or config.data.dset_cache_dir
    if folder is None or not (Path(folder) / MANIFEST_FILE).is_file():
        return typical_images(config)
    vision = config.model.vision
    return images_per_pack(Path(folder), vision.tokens_per_image, config.data.max_length)


def complete(config: Config, start: Start) -> Config:
    """The configuration with all that follows from files: the model sizes of the start weights, the
    tokenizer's place and its vocabulary. Nothing changes it afterwards.

    A tokenizer that cannot be found is left to the validation, which tells it with all other
    problems. Raises ValueError for one that is not of the start weights' model.
    """
    model = start.model or config.model
    file = find_tokenizer(config)
    if start.load is not None:  # the very checkpoint: what its folder holds can change
        load = str(start.load.path.absolute())
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, load=load))
    if file is None:
        return dataclasses.replace(config, model=model)
    tokenizer = load_tokenizer(file)
    if model.image_token_id >= 0:  # of start weights
        check_tokenizer(model, tokenizer.vocab_size, tokenizer.image_token_id)
    language = dataclasses.replace(
        model.language, vocab_size=max(model.language.vocab_size, tokenizer.vocab_size)
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model, language=language, image_token_id=tokenizer.image_token_id
        ),
        data=dataclasses.replace(config.data, tokenizer=str(file)),
    )
