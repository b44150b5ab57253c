"""Annotations that can be read at random: URLs copied, Parquet and gzip unpacked."""

import dataclasses
import gzip
import shutil
import zlib
from pathlib import Path

from megatron_gmai.data.shards.check import MAX_IMAGE_BYTES
from megatron_gmai.data.shards.inputs import annotations_of, digest
from megatron_gmai.data.sources import parquet, remote
from megatron_gmai.data.sources.encodings import GZIP_MAGIC
from megatron_gmai.data.sources.mixture import Source


def at_hand(source: Source, folder: Path) -> Source:
    """The data set with copies of its annotations where they are needed, in `folder`. What an
    interrupted run has copied whole is kept, by a name that changes with what was copied."""
    if source.is_local and not any(map(_is_gzip, source.annotation_files)):
        return source
    version = digest(annotations_of([source]))
    images = folder / f"{version}.images"
    files: list[Path] = []
    origins: list[Path | str] = [*source.annotation_files, *source.annotation_urls]
    for origin in origins:
        local = folder / f"{version}-{len(files):05d}.annotations"
        if isinstance(origin, Path) and not _is_parquet(origin) and not _is_gzip(origin):
            local = origin
        elif not local.exists():
            _copy(origin, local, images)
        files.append(local)
    return dataclasses.replace(
        source,
        annotation_files=tuple(files),
        annotation_urls=(),
        originals=tuple(map(str, origins)),
        embedded_images=images if images.exists() else None,
        version=version if images.exists() else "",
    )


def _copy(origin: Path | str, local: Path, images: Path) -> None:
    partial, fetched = local.with_suffix(".partial"), local.with_suffix(".fetched")
    if isinstance(origin, str):
        remote.copy(origin, str(fetched))
    file = fetched if isinstance(origin, str) else origin
    if _is_parquet(origin):
        parquet.unpack(file, partial, images, MAX_IMAGE_BYTES)
    elif _is_gzip(file):
        _unpack_gzip(file, partial, str(origin))
    else:
        shutil.copyfile(file, partial)
    fetched.unlink(missing_ok=True)
    partial.replace(local)


def _is_parquet(origin: Path | str) -> bool:
    return str(origin).lower().endswith(parquet.SUFFIX)


def _is_gzip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == GZIP_MAGIC


def _unpack_gzip(file: Path, target: Path, name: str) -> None:
    size, most = 0, parquet.most_unpacked(file)
    try:
        with gzip.open(file) as packed, target.open("wb") as out:
            while chunk := packed.read(2**20):
                size += len(chunk)
                if size > most:
                    raise ValueError(f"annotations {name} unpack to more than {most} bytes")
                out.write(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read annotations {name}: {error}") from error
