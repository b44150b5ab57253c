"""What shards were made from, kept beside them so that a change is noticed and redone alone."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.ledger import encodable
from megatron_gmai.data.schema import from_json
from megatron_gmai.data.sources import remote
from megatron_gmai.data.sources.mixture import Source

INPUTS_FILE = "inputs.json"
HASHED_BYTES = 256 * 2**20
# Packages that read images: with another one there, a rejected image may be read.
READERS = (
    "pillow",
    "simplejpeg",
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "python-gdcm",
    "nibabel",
    "imagecodecs",
    "pillow-heif",
)


@dataclass(frozen=True)
class UnitInputs:
    """Of one unit: fingerprint of its records and images, and how many records were rejected."""

    fingerprint: str
    records: int
    rejected: int


@dataclass(frozen=True)
class Inputs:
    """Contents of `inputs.json`. `annotations` are fingerprints of each data set's files, `means`
    what decides which images can be read: packages, folders that are allowed."""

    annotations: dict[str, list[str]]
    means: dict[str, str]
    units: dict[str, UnitInputs]


def load_inputs(folder: Path) -> Inputs | None:
    """None where there are none, or none that can be read: then nothing is reused."""
    try:
        return from_json(Inputs, json.loads((folder / INPUTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def save_inputs(folder: Path, inputs: Inputs) -> None:
    write_atomically(folder / INPUTS_FILE, json.dumps(asdict(inputs), indent=1).encode())


def means_of(sources: Sequence[Source]) -> dict[str, str]:
    """Versions of the packages that read images, and the folder that links may lead to."""
    versions = {name: version for name in READERS if (version := _version(name))}
    roots = {str(source.allowed_root.resolve()) for source in sources if source.allowed_root}
    return {**versions, "--image-root": encodable(" ".join(sorted(roots)))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def annotations_of(sources: Iterable[Source]) -> dict[str, list[str]]:
    """Fingerprints of annotation files and of where images lie, by data set."""
    return {source.name: [encodable(text) for text in _annotations(source)] for source in sources}


def _annotations(source: Source) -> Iterator[str]:
    yield from (file_fingerprint(file) for file in source.annotation_files)
    yield from (remote.version(url) for url in source.annotation_urls)
    yield from (str(root.resolve()) if root != Path() else "." for root in source.image_roots)
    yield from (str(source.image_url), source.tiff_pages, str(source.nifti_slices))


def file_fingerprint(file: Path) -> str:
    """By content, so that a copy counts as the same; by size and time where that takes long."""
    status = file.stat()
    if status.st_size > HASHED_BYTES:
        return f"{file.name} {status.st_size} {status.st_mtime_ns}"
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def changes(old: Inputs, new: Inputs, lost: Iterable[str] = ()) -> list[str]:
    """What differs, a line each; `new.units` may hold those only that are as they were. `lost` are
    tar files that are not there as they were made."""
    found = [f"{name} is gone or was changed" for name in sorted(lost)]
    found += [f"data set {name} is gone" for name in old.annotations if name not in new.annotations]
    for name, files in new.annotations.items():
        if name not in old.annotations:
            found.append(f"data set {name} is new")
        elif files != old.annotations[name]:
            found.append(f"annotations, image folder or options of images of {name} changed")
    for name in sorted(old.means.keys() | new.means.keys()):
        before, now = old.means.get(name), new.means.get(name)
        if before != now:
            found.append(f"{name}: {before or 'none'} before, {now or 'none'} now")
    return found or ["images changed, went or came"]


def digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
