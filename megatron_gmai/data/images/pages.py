"""Files of several pictures: TIFF pages, frames of animations and DICOM, slices of volumes."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_gmai.data.images.decode import count_pages, decode_pages, decode_slices
from megatron_gmai.data.images.formats import is_volume, kind_of
from megatron_gmai.data.images.privacy import encode_png
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import IMAGE_TAG, image_names, parse_conversation

MAX_PAGES = 256
MAX_PIXELS = 10**9  # of all pages together
RULE_KEY = "nifti_slices"  # of a record, or of its data set in the list file


def take_pages(
    record: dict[str, Any], files: Sequence[bytes], tiff_pages: str, slices: str | None = None
) -> tuple[dict[str, Any], list[bytes], list[int]]:
    """The record, its images, and how many of them each file gave.

    With `first` a file is one image. With `all` each page or frame is one. Of a volume, the slices
    that the rule takes are images. The tag of a file is repeated for all of its images, unless the
    text has as many tags as there are images already. Raises BadSample for pages that cannot be
    read, and for texts that ask for them where the first one is taken.
    """
    rule = record.get(RULE_KEY, slices)
    tags = str(record.get("conversations")).count(IMAGE_TAG)
    parts = []
    for name, data in zip(image_names(record), files, strict=True):
        try:
            parts.append(_images_of(data, tiff_pages == "all", rule))
        except BadSample as error:
            raise BadSample(f"image {name}: {error}", name) from error
    images = [image for part in parts for image in part]
    counts = [len(part) for part in parts]
    if tiff_pages == "first" and tags > len(images):
        _refuse_pages(files, tags)
    if len(images) > len(files) == tags:
        record = _with_a_tag_an_image(record, counts)
    return record, images, counts


def _images_of(data: bytes, every_page: bool, rule: Any) -> list[bytes]:
    if is_volume(data):
        return _encoded(decode_slices(data, rule), "a volume whose slices")
    return split_pages(data) if every_page else [data]


def _refuse_pages(files: Sequence[bytes], tags: int) -> None:
    """A text with a tag for each page wants them all."""
    if not any(map(is_volume, files)) and tags == sum(count_pages(data, tags) for data in files):
        raise BadSample(
            f"{tags} {IMAGE_TAG} in the text for the {tags} pages of {len(files)} file(s), of "
            "which only the first is taken; --tiff-pages all takes each as an image"
        )


def split_pages(data: bytes) -> list[bytes]:
    """The pages or frames of a file as PNG files of 8 bits; a file of one as it is.

    Smaller copies and masks of other pages are left out. Raises BadSample.
    """
    count = count_pages(data, MAX_PAGES)
    if count > MAX_PAGES:
        raise BadSample(f"a {kind_of(data)} of {count} pages, more than {MAX_PAGES}")
    if count <= 1:
        return [data]
    return _encoded(decode_pages(data), f"a {kind_of(data)} whose pages")


def _encoded(pictures: Iterable[np.ndarray], what: str) -> list[bytes]:
    """Each as a PNG. Raises BadSample if all together are too large."""
    files, pixels = [], 0
    for picture in pictures:
        pixels += picture.shape[0] * picture.shape[1]
        if pixels > MAX_PIXELS:
            raise BadSample(f"{what} exceed {MAX_PIXELS} pixels")
        files.append(encode_png(picture))
    return files


def _with_a_tag_an_image(record: dict[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """The record with the tag of each file as often as the file has images."""
    parse_conversation(record, len(counts))
    left = iter(counts)
    turns = [
        {**turn, "value": re.sub(IMAGE_TAG, lambda tag: tag[0] * next(left), turn["value"])}
        for turn in record["conversations"]
    ]
    return {**record, "conversations": turns}
