"""GMAI-VL's list file: which data sets are mixed, in which ratio, and where their files lie.

`{"NAME": {"image_dir": "", "annotations": "file or folder", "sample_ratio": 1.0,
"length": 38276, "data_augment": true}, ...}`
"""

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gmai.data.sources.remote import is_url, list_files

ANNOTATION_SUFFIXES = (".json", ".jsonl", ".parquet")
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])')


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
    tiff_pages: str = "first"  # not of the list: see `pages.take_pages`
    nifti_slices: str | None = None  # which slices of volumes are images: see `nifti.py`


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
            problems.append(f"  {name}: {error}")
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


def read_ratios(path: str | os.PathLike[str]) -> dict[str, float]:
    """Only the ratios of a list file."""
    return {name: use.sample_ratio for name, use in read_uses(path).items()}


def _parse(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read list file {file}: {error}") from error
    if not text.strip():
        raise ValueError(f"list file {file} is empty; it must be a JSON object of data sets")
    mended, commas = _without_trailing_commas(text)
    try:
        entries = json.loads(mended)
    except ValueError as error:
        raise ValueError(f"list file {file} is not valid JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"list file {file} must be a JSON object with one data set or more")
    if commas:
        warnings.warn(f"list file {file}: ignored {commas} trailing comma(s)", stacklevel=3)
    return entries


def _without_trailing_commas(text: str) -> tuple[str, int]:
    """Removes commas before a closing bracket, but not those inside strings."""
    count = 0

    def keep(match: re.Match[str]) -> str:
        nonlocal count
        if match.group(1) is None:
            count += 1
            return ""
        return match.group(1)

    return _TRAILING_COMMA.sub(keep, text), count


def _source(name: str, entry: Any, file: Path) -> Source:
    ratio = _ratio(entry)
    annotations = entry.get("annotations")
    if not isinstance(annotations, str) or not annotations:
        raise ValueError("'annotations' must name a JSON file or a folder of them")
    image_dir = entry.get("image_dir", "")
    files: tuple[Path, ...] = ()
    urls: tuple[str, ...] = ()
    place: Path | None = None
    if is_url(annotations):
        beside = annotations.rpartition("/")[0]
        urls = tuple(list_files(annotations, ANNOTATION_SUFFIXES))
        image_dir = image_dir or (annotations if urls != (annotations,) else beside)
    else:
        place = _resolve(annotations, file)
        if place is None:
            raise ValueError(
                f"annotations {annotations!r} not found, neither from {Path.cwd()} "
                f"nor from {file.parent}"
            )
        files = _annotation_files(place)
    remote = is_url(image_dir)
    return Source(
        name=name,
        annotation_files=files,
        image_roots=() if remote else _image_roots(image_dir, place, file),
        sample_ratio=ratio,
        data_augment=_augment(entry),
        annotation_urls=urls,
        image_url=image_dir if remote else None,
        nifti_slices=entry.get("nifti_slices"),
    )


def _ratio(entry: Any) -> float:
    if not isinstance(entry, Mapping):
        raise ValueError("the entry must be a JSON object with 'annotations'")
    ratio = entry.get("sample_ratio", 1.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise ValueError(f"'sample_ratio' must be a number, found {ratio!r}")
    if not math.isfinite(ratio) or ratio < 0:
        raise ValueError(f"'sample_ratio' must be 0 or more, found {ratio}")
    return float(ratio)


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


def _annotation_files(place: Path) -> tuple[Path, ...]:
    if place.is_file():
        return (place,)
    files = sorted(f for f in place.rglob("*") if f.suffix.lower() in ANNOTATION_SUFFIXES)
    if not files:
        raise ValueError(f"folder {place} holds no {' or '.join(ANNOTATION_SUFFIXES)} file")
    return tuple(files)


def _image_roots(image_dir: Any, annotations: Path | None, file: Path) -> tuple[Path, ...]:
    if not isinstance(image_dir, str):
        raise ValueError(f"'image_dir' must be a path, found {image_dir!r}")
    if image_dir == "" and annotations is not None:
        beside = annotations if annotations.is_dir() else annotations.parent
        return (Path(), beside)
    place = _resolve(image_dir, file)
    if place is None:
        raise ValueError(f"'image_dir' {image_dir!r} not found; give a folder, or \"\"")
    return (place,)
