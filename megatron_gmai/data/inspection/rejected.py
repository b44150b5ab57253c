"""What a rejected sample looked like: its text and its images, from wherever they still are.

A sample that is too long lies in the shards, one of a foreign tar file at its place there. One that
never got into a shard is read again from its data set, if the user says which list file that is in:
a stranger's shards may name any file as theirs.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_gmai.data.ledger import BadSample, Rejection
from megatron_gmai.data.shards.check import read_image
from megatron_gmai.data.shards.format import TAR_ERRORS, parse_sample, split_name
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.mixture import Source, read_list
from megatron_gmai.data.sources.records import RecordReader, Records, parse_record
from megatron_gmai.data.text.conversation import image_names

MAX_SPAN = 64 * 2**20  # bytes of a sample in a tar file that are looked at
# Numbers that stand alone; those in names of files and folders are part of the name.
NUMBER = re.compile(r"(?<![\w./\\-])\d+(?![\w/\\-]|\.\w)")


class Evidence(NamedTuple):
    """Text of a sample, and each image's file, or why there is none to be seen."""

    text: str = ""
    images: tuple[bytes | str, ...] = ()


class Finder:
    """Finds the samples that ledger lines speak of. Anything may have gone since: never raises."""

    def __init__(self, shards: Shards, list_file: str | None = None) -> None:
        """`list_file` is the user's. Raises ValueError if it cannot be used."""
        self._shards = shards
        self._list_name = None if list_file is None else Path(list_file).name
        sources = [] if list_file is None else read_list(list_file)
        self._sources = {source.name: source for source in sources}
        self._records: dict[str, Records] = {}

    def look(self, line: Rejection) -> Evidence:
        """What can still be seen of a rejected sample."""
        try:
            if line.list_file:
                is_known = Path(line.list_file).name == self._list_name
                return self._in_data_set(line) if is_known else Evidence()
            sample = self._sample(line.key)
            if sample is None:
                return self._in_tar_file(line)
            stored = self._shards.read(sample)
            return Evidence(_text(stored.record), stored.images)
        except (LookupError, OverflowError, *TAR_ERRORS):
            return Evidence()

    def _sample(self, key: str) -> int | None:
        """The row of a sample whose key is its location."""
        name, _, offset = key.rpartition("@")
        names = [shard.name for shard in self._shards.manifest.shards]
        if name not in names or not offset.isdecimal():
            return None
        shard = names.index(name)
        (found,) = np.nonzero(self._shards.rows_of(shard)["offset"] == int(offset))
        return int(self._shards.first_rows[shard] + found[0]) if len(found) else None

    def _in_tar_file(self, line: Rejection) -> Evidence:
        name, _, offset = line.key.rpartition("@")
        file = Path(self._shards.origin) / name
        if "/" in name or file.suffix != ".tar" or not offset.isdecimal() or not file.is_file():
            return Evidence()
        with file.open("rb") as stream:
            stream.seek(int(offset))
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                end = 0
                for member in archive:
                    if split_name(member.name)[0] != line.id or member.size < 0:
                        break
                    end = member.offset_data + -(-member.size // 512) * 512
            stream.seek(int(offset))
            stored = parse_sample(stream.read(min(end - int(offset), MAX_SPAN)))
        return Evidence(_text(stored.record), stored.images)

    def _in_data_set(self, line: Rejection) -> Evidence:
        source = self._sources[line.source]
        if not source.is_local:
            return Evidence()
        if line.source not in self._records:
            self._records[line.source] = Records(source.annotation_files)
        span = self._records[line.source].spans[int(line.key.rpartition("/")[2])]
        with RecordReader(source.annotation_files) as reader:
            text = reader.text(span)
        try:
            record = parse_record(text)
            names = image_names(record)
        except (BadSample, AttributeError):
            return Evidence(text[:2000].decode("utf-8", "replace"))
        return Evidence(_text(record), tuple(_image(name, source) for name in names))


def _image(name: str, source: Source) -> bytes | str:
    try:
        return read_image(name, source)
    except BadSample as error:
        return str(error)


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record.get("conversations", record), ensure_ascii=False, indent=1)


def group(rejections: Sequence[Rejection]) -> list[tuple[str, int]]:
    """Reasons with their counts, the most frequent first. Reasons that differ in the image's name
    or in numbers only count as one, told by its first example."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for line in rejections:
        reason = line.reason
        if line.image and reason.startswith(f"image {line.image}: "):
            reason = f"image: {reason.removeprefix(f'image {line.image}: ')}"
        kind = NUMBER.sub("N", reason)
        counts[kind] += 1
        examples.setdefault(kind, reason)
    return [(examples[kind], count) for kind, count in counts.most_common()]
