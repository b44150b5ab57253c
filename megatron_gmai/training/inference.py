"""Trained models to ask: checkpoints and Hugging Face folders, loaded in any layout."""

from dataclasses import dataclass
from pathlib import Path

from megatron_gmai.config import Config
from megatron_gmai.convert.huggingface import is_hugging_face, open_pretrained
from megatron_gmai.convert.treatment import read_treatment
from megatron_gmai.model.gmai_vl import GMAIVL, build_chunks
from megatron_gmai.runtime.world import World
from megatron_gmai.training.checkpoint import (
    load_checkpoint,
    open_checkpoint,
    verify_checkpoint,
)
from megatron_gmai.training.setup import fill_base
from megatron_gmai.training.start import Start, with_base


@dataclass(frozen=True)
class Trained:
    """A trained model on disk, and the sizes and the treatment of data that it was trained with."""

    path: Path
    config: Config
    start: Start


def open_trained(path: Path) -> Trained:
    """Check a checkpoint, the newest one of a folder of them, or a Hugging Face folder.

    Raises ValueError for what is none of these, or is damaged.
    """
    if is_hugging_face(path):
        pretrained = open_pretrained(path)
        data = read_treatment(path, pretrained.flavour)
        return Trained(
            path, Config(model=pretrained.model, data=data), Start(pretrained=pretrained)
        )
    checkpoint = open_checkpoint(path)
    start = with_base(Start(load=checkpoint), checkpoint.config)
    return Trained(checkpoint.path, checkpoint.config, start)


def load_for_inference(trained: Trained, config: Config, world: World) -> GMAIVL:
    """This rank's chunk of the model (there must be one), in eval mode."""
    (model,) = build_chunks(config, world)
    checkpoint = trained.start.load
    if checkpoint is None or checkpoint.config.lora.towers:
        fill_base([model], config, trained.start)
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
        load_checkpoint(checkpoint, [model], optimizer=None)
    return model.requires_grad_(False).eval()
