"""From the flags to shards that are there: build them, measure them, find the tokenizer."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.lock import LOCK_FILE, MESSAGE_S, POLL_S, is_read_only, read_holder
from megatron_gmai.data.pool import available_cores
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.index import (
    MANIFEST_FILE,
    ORIGIN_FILE,
    copy_index,
    read_manifest,
)
from megatron_gmai.data.shards.lengths import token_lengths
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.remote import is_url
from megatron_gmai.data.text.encoder import make_encoder
from megatron_gmai.data.text.tokenizer import CONFIG_FILE, load_tokenizer
from megatron_gmai.tokenizer_file import MODEL_FILE, tokenizer_file

READY_FILE = ".ready.json"
SILENCE_S = 600.0  # of the builder, after which it is given up
Log = Callable[[str], None]


def prepare_data(
    data: DataConfig,
    vision: VisionConfig,
    default_cache_dir: str | os.PathLike[str],
    is_builder: bool = True,
    run: str = "",
    log: Log = lambda line: None,
) -> DataConfig:
    """Makes sure that shards and token lengths exist, and returns `data` with `shards` and
    `tokenizer` filled in.

    All processes of a run call it with the same `run`, a text that no other run has. The one that
    `is_builder` does the work, on all cores; the others watch the file system, so that however long
    it takes no collective times out, and tell `log` how far it is. Raises ValueError for a user's
    mistake, on all of them.
    """
    folder = _folder(data, default_cache_dir)
    if is_builder:
        try:
            _build(data, vision, folder, log)
        except BaseException as error:
            _announce(folder, run, str(error) or type(error).__name__)
            raise
        _announce(folder, run, "")
    else:
        _wait(folder, run, log)
    data = dataclasses.replace(data, shards=str(folder))
    return dataclasses.replace(data, tokenizer=str(resolve_tokenizer(data)))


def _folder(data: DataConfig, default_cache_dir: str | os.PathLike[str]) -> Path:
    """Where shards, or a copy of their index, are; `--shards` wins over the cache of `--datasets`.

    Token lengths and plans are kept beside the index: behind a URL, or in a folder that cannot be
    written to, the index is copied to the cache.
    """
    cache = Path(data.dset_cache_dir or default_cache_dir)
    if data.shards is None:
        if data.datasets is None:
            raise ValueError("no data: give --shards DIR or --datasets LIST.json")
        return cache
    if not is_url(data.shards) and os.access(data.shards, os.W_OK):
        return Path(data.shards)
    return cache / f"index-{hashlib.sha256(_origin(data.shards).encode()).hexdigest()[:16]}"


def _origin(shards: str) -> str:
    return shards if is_url(shards) else str(Path(shards).resolve())


def _build(data: DataConfig, vision: VisionConfig, folder: Path, log: Log) -> None:
    if data.shards is not None:
        if not is_url(data.shards):
            read_manifest(Path(data.shards))
            _check_own(Path(data.shards))
        if folder != Path(data.shards):
            copy_index(_origin(data.shards), folder, (MODEL_FILE, CONFIG_FILE))
    # Before anything is built: a tokenizer that is none is a matter of seconds, building of hours.
    tokenizer = load_tokenizer(resolve_tokenizer(dataclasses.replace(data, shards=str(folder))))
    encoder = make_encoder(data, tokenizer, vision)
    taken_as_is = data.dset_from_cache and (folder / MANIFEST_FILE).is_file()
    if data.shards is None and not taken_as_is:
        assert data.datasets is not None
        build_shards(
            data.datasets,
            folder,
            available_cores(),
            data.tiff_pages,
            data.image_root,
            encoder,
            log,
        )
    token_lengths(Shards(folder), encoder, available_cores(), log)


def _check_own(shards: Path) -> None:
    """Raises ValueError for a folder whose tar files lie elsewhere: only copies of an index that
    this program has made do so, and a stranger's folder may name whatever it likes."""
    if os.path.lexists(shards / ORIGIN_FILE):
        raise ValueError(
            f"{shards} holds a copy of an index, whose tar files its {ORIGIN_FILE!r} file names; "
            "give --shards the place of the tar files itself"
        )


def _announce(folder: Path, run: str, error: str) -> None:
    """Tells the processes that wait how it ended. A folder that is not there has none to tell."""
    with contextlib.suppress(OSError):
        write_atomically(folder / READY_FILE, json.dumps({"run": run, "error": error}).encode())


def _wait(folder: Path, run: str, log: Log) -> None:
    """Returns when the builder of this run is done. Raises ValueError with its error, and when
    nobody has built for long."""
    reported = heard = time.monotonic()
    sign: object = None
    while (error := _outcome(folder, run)) is None:
        now = time.monotonic()
        if (seen := _sign(folder)) != sign:
            sign, heard = seen, now
        if now - reported > MESSAGE_S:
            reported = now
            log(f"waiting for the data in {folder}: {read_holder(folder)}")
        if now - heard > SILENCE_S:
            raise ValueError(
                f"nobody has worked on the data in {folder} for {SILENCE_S:.0f} s; all nodes must "
                "share this folder, and the log of rank 0 may tell more"
            )
        time.sleep(POLL_S)
    if error:
        raise ValueError(error)


def _outcome(folder: Path, run: str) -> str | None:
    """How this run's builder ended: its error, or "" if there was none; None: not yet."""
    with contextlib.suppress(OSError, ValueError):
        outcome = json.loads((folder / READY_FILE).read_text())
        if outcome["run"] == run:
            return str(outcome["error"])
    return None


def _sign(folder: Path) -> object:
    """Changes while somebody builds."""
    with contextlib.suppress(OSError):
        return (folder / LOCK_FILE).stat().st_mtime_ns
    return None


def resolve_tokenizer(data: DataConfig) -> Path:
    """The tokenizer that was asked for, else the one in the shards' folder.

    Raises ValueError if there is neither.
    """
    return tokenizer_file(data.tokenizer if data.tokenizer is not None else data.shards)


def copy_tokenizer(tokenizer: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Puts a tokenizer into a folder of shards, so that they can be trained on as they are."""
    load_tokenizer(tokenizer)
    if is_read_only(Path(folder)):
        return  # complete, and somebody else's
    file, copy = tokenizer_file(tokenizer), Path(folder) / MODEL_FILE
    data = file.read_bytes()
    if not copy.is_file() or copy.read_bytes() != data:
        write_atomically(copy, data)
    if (file.parent / CONFIG_FILE).is_file():
        shutil.copyfile(file.parent / CONFIG_FILE, Path(folder) / CONFIG_FILE)
