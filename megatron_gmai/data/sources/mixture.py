"""GMAI-VL's list file: which data sets are mixed, in which ratio, and where their files lie.

`{"NAME": {"image_dir": "", "annotations": "file or folder", "sample_ratio": 1.0,
"length": 38276, "data_augment": true}, ...}`

`length`, the number of samples, decides nothing: it is wrong in the published example.
"""

import difflib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from megatron_gmai.data.ledger import visible
from megatron_gmai.data.lock import LOCK_FILE
from megatron_gmai.data.sources.encodings import check_encoding
from megatron_gmai.data.sources.json_text import Repeated, unique, without_trailing_commas
from megatron_gmai.data.sources.remote import is_url, list_files

MAX_RATIO = 1000
ANNOTATION_SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".parquet")
# `repeat_time` is what InternVL's lists call the ratio.
KEYS = (
    *("image_dir", "annotations", "sample_ratio", "repeat_time", "length", "data_augment"),
    "nifti_slices",
)


@dataclass(frozen=True)
class Source:
    """One entry of the list. `image_roots` are tried in order; images may not leave them.

    Annotations and images may lie behind URLs (`remote.py`), and images in one file (`parquet.py`).
    """

    name: str
    annotation_files: tuple[Path, ...]
    image_roots: tuple[Path, ...]
    sample_ratio: float = 1.0
    data_augment: bool = False
    annotation_urls: tuple[str, ...] = ()
    image_url: str | None = None
    embedded_images: Path | None = None
    nifti_slices: str | None = None  # which slices of volumes are images: see `nifti.py`
    length: int | None = None  # what the list says of the number of records
    list_file: str = ""
    # Not of the list:
    tiff_pages: str = "first"  # see `pages.take_pages`
    allowed_root: Path | None = None  # links and absolute names may lead there
    version: str = ""  # of annotations that were copied, with the images in them
    originals: tuple[str, ...] = ()  # what the copies are of

    @cached_property
    def real_roots(self) -> list[str]:
        """The image folders, absolute and without links."""
        return [os.path.realpath(root) for root in self.image_roots]

    @property
    def is_local(self) -> bool:
        """Whether annotations and images are files that can be read as they are."""
        parquet = any(file.suffix.lower() == ".parquet" for file in self.annotation_files)
        return not (self.annotation_urls or self.image_url or parquet)

    def original(self, file: int) -> str:
        """The name of an annotation file, not of its copy."""
        return self.originals[file] if self.originals else str(self.annotation_files[file])


def read_list(path: str | os.PathLike[str]) -> list[Source]:
    """Reads a list file. Relative paths start at the working directory, else at the list file.

    A trailing comma, as in the published example, is accepted with a warning. Raises ValueError
    that lists every problem found.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no list file at {file}; give --datasets LIST.json")
    entries = _parse(file)
    sources, problems = [], []
    for name, entry in entries.items():
        try:
            sources.append(_source(name, entry, file))
        except ValueError as error:
            problems.append(f"  {visible(name)}: {error}")
    if problems:
        raise ValueError("\n".join([f"list file {file}:", *problems]))
    return sources


class Use(NamedTuple):
    """How a data set is used, which may change after its shards were made."""

    sample_ratio: float
    data_augment: bool


def read_uses(path: str | os.PathLike[str]) -> dict[str, Use]:
    """Only how the data sets of a list are used; their annotations need not be there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever made the shards was warned
        entries = _parse(Path(path))
    return {name: Use(_ratio(entry), _augment(entry)) for name, entry in entries.items()}


def _parse(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
        check_encoding(data, file)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read list file {file}: {error}") from error
    except ValueError as error:
        raise ValueError(f"list file {error}") from error
    if not text.strip():
        raise ValueError(f"list file {file} is empty; it must be a JSON object of data sets")
    mended, commas = without_trailing_commas(text)
    try:
        entries = json.loads(mended, object_pairs_hook=unique)
    except Repeated as error:
        raise ValueError(
            f"list file {file}: {error}; each data set and key needs its own name"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"list file {file} is not valid JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"list file {file} must be a JSON object with one data set or more")
    if commas:
        warnings.warn(f"list file {file}: ignored {commas} trailing comma(s)", stacklevel=3)
    return entries


def _source(name: str, entry: Any, file: Path) -> Source:
    if not name or not name.isprintable():
        raise ValueError("a data set's name must be of printable characters")
    ratio = _ratio(entry)
    for key in entry.keys() - set(KEYS):
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KEYS)}"
        raise ValueError(f"unknown key {key!r}; {remedy}")
    annotations = entry.get("annotations")
    if not isinstance(annotations, str) or not annotations:
        raise ValueError("'annotations' must name a JSON file or a folder of them")
    image_dir = entry.get("image_dir", "")
    files: tuple[Path, ...] = ()
    urls: tuple[str, ...] = ()
    location: Path | None = None
    if is_url(annotations):
        beside = annotations.rpartition("/")[0]
        urls = tuple(list_files(annotations, ANNOTATION_SUFFIXES))
        image_dir = image_dir or (annotations if urls != (annotations,) else beside)
    else:
        location = _resolve(annotations, file)
        if location is None:
            raise ValueError(
                f"annotations {annotations!r} not found, neither from {Path.cwd()} "
                f"nor from {file.parent}"
            )
        files = _annotation_files(location)
    remote = is_url(image_dir)
    return Source(
        name=name,
        annotation_files=files,
        image_roots=() if remote else _image_roots(image_dir, location, file),
        sample_ratio=ratio,
        data_augment=_augment(entry),
        annotation_urls=urls,
        image_url=image_dir if remote else None,
        nifti_slices=entry.get("nifti_slices"),
        length=_length(entry),
        list_file=str(file),
    )


def _ratio(entry: Any) -> float:
    if not isinstance(entry, Mapping):
        raise ValueError("the entry must be a JSON object with 'annotations'")
    if "sample_ratio" in entry and "repeat_time" in entry:
        raise ValueError("'sample_ratio' and 'repeat_time' mean the same; give one of them")
    name = "repeat_time" if "repeat_time" in entry else "sample_ratio"
    ratio = entry.get(name, 1.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise ValueError(f"{name!r} must be a number, found {ratio!r}")
    if not 0 <= ratio <= MAX_RATIO:
        raise ValueError(f"{name!r} must be from 0 to {MAX_RATIO}, found {ratio}")
    return float(ratio)


def _length(entry: Mapping[str, Any]) -> int | None:
    length = entry.get("length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise ValueError(f"'length' must be a number of samples, found {length!r}")
    return length


def _augment(entry: Mapping[str, Any]) -> bool:
    value = entry.get("data_augment", False)
    if not isinstance(value, bool):
        raise ValueError(f"'data_augment' must be true or false, found {value!r}")
    return value


def _resolve(name: str, file: Path) -> Path | None:
    """The published example names its files from the folder above its own: look there too."""
    given = Path(name)
    for base in (Path(), file.parent, file.parent.parent):
        if (base / given).exists():
            return base / given
    return None


def _annotation_files(location: Path) -> tuple[Path, ...]:
    if location.is_file():
        return (location,)
    files = sorted(f for f in _walk(location) if f.name.lower().endswith(ANNOTATION_SUFFIXES))
    for file in files:
        if not file.is_file():  # reading a pipe or a device would never end
            raise ValueError(f"{file} is no file, or a link to none")
    if not files:
        raise ValueError(f"folder {location} holds no {' or '.join(ANNOTATION_SUFFIXES)} file")
    return tuple(files)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links, each folder once; without hidden ones, which editors
    leave behind (`.ipynb_checkpoints` holds copies), and without folders of shards."""
    seen: set[str] = set()
    for location, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(location)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if real in seen or LOCK_FILE in files:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(location) / name for name in files if not name.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    """`os.walk` would pass over a folder that it cannot read."""
    raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error


def _image_roots(image_dir: Any, annotations: Path | None, file: Path) -> tuple[Path, ...]:
    if not isinstance(image_dir, str):
        raise ValueError(f"'image_dir' must be a path, found {image_dir!r}")
    if image_dir == "" and annotations is not None:
        beside = annotations if annotations.is_dir() else annotations.parent
        return (Path(), beside)
    location = _resolve(image_dir, file)
    if location is None or not location.is_dir():
        problem = "not found" if location is None else "is no folder"
        raise ValueError(f"'image_dir' {image_dir!r} {problem}; give a folder, or \"\"")
    return (location,)
