"""What a run begins from, and the configuration that follows from it: all found before anything
large is built, and final when it is validated."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_gmai.config import Config, ModelConfig
from megatron_gmai.convert.carried import read_carried
from megatron_gmai.convert.huggingface import check_tokenizer, open_pretrained
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.runtime.groups import restarts
from megatron_gmai.tokenizer_file import find_tokenizer
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
    llava: Path | None = None
    base: Checkpoint | None = None  # under a checkpoint that holds adapters only

    @property
    def model(self) -> ModelConfig | None:
        """Sizes that the start weights dictate."""
        checkpoint = self.resume or self.load
        if checkpoint is not None:
            return checkpoint.config.model
        return None if self.llava is None else open_pretrained(self.llava).model

    def carried(self) -> Mapping[str, Tensor]:
        """Parts of CLIP that never run, which go from checkpoint to checkpoint to an export."""
        checkpoint = self.resume or self.load
        if checkpoint is not None:
            return read_carried(checkpoint.path, checkpoint.config.model)
        leftovers = {} if self.llava is None else open_pretrained(self.llava).leftovers
        return {name: tensor.clone() for name, tensor in leftovers.items()}


def find_start(config: Config, log: Log, damaged: Collection[Path] = ()) -> Start:
    """Choose between resuming, weights of a checkpoint, Hugging Face weights and a fresh start.

    `--resume` wins where its folder holds a whole checkpoint, apart from those known to be
    `damaged`; else `--load` or `--llava` count.
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
    if run.load is not None:
        return with_base(Start(load=open_checkpoint(Path(run.load))), config)
    return Start(llava=Path(run.llava) if run.llava is not None else None)


def verified(start: Start, config: Config, log: Log) -> Start:
    """`start`, or where the bytes of the checkpoint to resume from have changed, the next best one.

    All ranks read the checkpoints together, once.

    Raises:
        CheckpointError: a checkpoint that the user named is damaged.
    """
    damaged: list[Path] = []
    while start.resume is not None:
        try:
            verify_checkpoint(start.resume)
            break
        except CheckpointError as error:
            log(f"passed over a checkpoint: {error}")
            damaged.append(start.resume.path)
            start = find_start(config, log, damaged)
    for checkpoint in (start.load, start.base):
        if checkpoint is not None:
            verify_checkpoint(checkpoint)
    return start


def with_base(start: Start, config: Config) -> Start:
    """A checkpoint of adapters lies on top of the weights that its run began with: `--llava` or
    `--load` of this run, or else of the run that saved it."""
    checkpoint = start.resume or start.load
    assert checkpoint is not None
    if not checkpoint.config.lora.llm_use_lora:
        return start
    own, saved = config.run, checkpoint.config.run
    llava = own.llava or saved.llava
    if llava is not None:
        return dataclasses.replace(start, llava=Path(llava))
    load = (own.load if start.resume else None) or saved.load
    return dataclasses.replace(start, base=open_checkpoint(Path(load)) if load else None)


def complete(config: Config, start: Start) -> Config:
    """The configuration with all that follows from files: the model sizes of the start weights, the
    tokenizer's place and its vocabulary. Nothing changes it afterwards.

    A tokenizer that cannot be found is left to the validation, which tells it with all other
    problems. Raises ValueError for one that is not of the start weights' model.
    """
    model = start.model or config.model
    file = find_tokenizer(config)
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
