"""From the flags to shards that are there: build them, measure them, find the tokenizer."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.index import MANIFEST_FILE, copy_index, read_manifest
from megatron_gmai.data.shards.lengths import token_lengths
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.remote import is_url
from megatron_gmai.data.text.encoder import make_encoder
from megatron_gmai.data.text.tokenizer import CONFIG_FILE, MODEL_FILE, load_tokenizer


def prepare_data(
    data: DataConfig,
    vision: VisionConfig,
    default_cache_dir: str | os.PathLike[str],
    is_builder: bool,
    barrier: Callable[[], None],
) -> DataConfig:
    """Makes sure that shards and token lengths exist, and returns `data` with `shards` and
    `tokenizer` filled in.

    All processes call it. One that `is_builder` does the work, the others wait at `barrier` (called
    once by each) and then find everything ready. Raises ValueError for a user's mistake.
    """
    if is_builder:
        data = _locate(data, default_cache_dir, build=True)
        tokenizer = load_tokenizer(resolve_tokenizer(data))
        encoder = make_encoder(data, tokenizer, vision)
        token_lengths(Shards(str(data.shards)), encoder, data.num_workers)
    barrier()
    data = _locate(data, default_cache_dir, build=False)
    return dataclasses.replace(data, tokenizer=str(resolve_tokenizer(data)))


def _locate(data: DataConfig, default_cache_dir: str | os.PathLike[str], build: bool) -> DataConfig:
    """`data` with the folder of its shards; `--shards` wins over the cache of `--datasets`."""
    if data.shards is not None:
        return _with_writable_index(data, data.dset_cache_dir or default_cache_dir, build)
    if data.datasets is None:
        raise ValueError("no data: give --shards DIR or --datasets LIST.json")
    cache = Path(data.dset_cache_dir or default_cache_dir)
    taken_as_is = data.dset_from_cache and (cache / MANIFEST_FILE).is_file()
    if build and not taken_as_is:
        build_shards(data.datasets, cache, workers=data.num_workers, tiff_pages=data.tiff_pages)
    return dataclasses.replace(data, shards=str(cache))


def _with_writable_index(
    data: DataConfig, cache: str | os.PathLike[str], build: bool
) -> DataConfig:
    """Token lengths and plans are kept beside the index: behind a URL, or in a folder that cannot
    be written to, the index is copied to the cache."""
    origin = str(data.shards)
    if not is_url(origin):
        read_manifest(Path(origin))
        if os.access(origin, os.W_OK):
            return data
        origin = str(Path(origin).resolve())
    folder = Path(cache) / f"index-{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
    if build:
        copy_index(origin, folder, (MODEL_FILE, CONFIG_FILE))
    return dataclasses.replace(data, shards=str(folder))


def resolve_tokenizer(data: DataConfig) -> Path:
    """The tokenizer that was asked for, else the one in the shards' folder.

    Raises ValueError if there is neither.
    """
    if data.tokenizer is not None:
        return Path(data.tokenizer)
    if data.shards is not None and (Path(data.shards) / MODEL_FILE).is_file():
        return Path(data.shards) / MODEL_FILE
    raise ValueError("no tokenizer: give --tokenizer FILE, or shards that hold tokenizer.model")


def copy_tokenizer(tokenizer: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Puts a tokenizer into a folder of shards, so that they can be trained on as they are."""
    load_tokenizer(tokenizer)
    file = Path(tokenizer)
    file = file / MODEL_FILE if file.is_dir() else file
    write_atomically(Path(folder) / MODEL_FILE, file.read_bytes())
    if (file.parent / CONFIG_FILE).is_file():
        shutil.copyfile(file.parent / CONFIG_FILE, Path(folder) / CONFIG_FILE)
