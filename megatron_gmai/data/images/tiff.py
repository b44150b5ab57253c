"""TIFF files of several pages: their first page, or each page as an image of its own."""

import io
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from megatron_gmai.data.images.decode import check_size
from megatron_gmai.data.images.dicom import is_dicom
from megatron_gmai.data.images.privacy import TIFF_MAGICS, bare_tiff
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import IMAGE_TAG, parse_conversation

MAX_PAGES = 256
KIND_TAG = 254  # NewSubfileType of TIFF 6.0
NO_PICTURE = 1 | 4  # its bits for a smaller copy and for the mask of another page


def take_pages(
    record: dict[str, Any], files: Sequence[bytes], tiff_pages: str
) -> tuple[dict[str, Any], list[bytes]]:
    """The record and its images, by what `--tiff-pages` says.

    With `first` a file is one image. With `all` each page is one: the tag of a file is repeated for
    all of its pages, unless the text has as many tags as there are pages already. Raises BadSample
    for pages that cannot be read, and for texts that ask for them where the first one is taken.
    """
    tags = str(record.get("conversations")).count(IMAGE_TAG)
    if tiff_pages == "first":
        if files and tags > len(files) and tags == sum(len(split_pages(data)) for data in files):
            raise BadSample(
                f"{tags} {IMAGE_TAG} in the text for the {tags} pages of {len(files)} file(s), of "
                "which only the first is taken; --tiff-pages all takes each as an image"
            )
        return record, list(files)
    pages = [split_pages(data) for data in files]
    images = [page for file in pages for page in file]
    if len(images) > len(files) == tags:
        record = _with_a_tag_a_page(record, [len(file) for file in pages])
    return record, images


def split_pages(data: bytes) -> list[bytes]:
    """The pages of a TIFF as files of their own, without metadata; any other file as it is.

    Smaller copies and masks of other pages are left out. Raises BadSample.
    """
    if data[:4] not in TIFF_MAGICS or is_dicom(data):
        return [data]
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _split(image) or [data]
    except BadSample:
        raise
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise BadSample(f"cannot decode: {error}") from error


def _split(image: Image.Image) -> list[bytes]:
    """Nothing where there is only one page: the file can stay as it is."""
    count = getattr(image, "n_frames", 1)
    if count > MAX_PAGES:
        raise BadSample(f"a TIFF of {count} pages, more than {MAX_PAGES}")
    pages = []
    for number in range(count if count > 1 else 0):
        image.seek(number)
        check_size(*image.size)
        if number == 0 or not int(image.tag_v2.get(KIND_TAG, 0)) & NO_PICTURE:  # type: ignore[attr-defined]
            pages.append(bare_tiff(image))
    return pages


def _with_a_tag_a_page(record: dict[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """The record with the tag of each file as often as the file has pages."""
    parse_conversation(record, len(counts))
    left = iter(counts)
    turns = [
        {**turn, "value": re.sub(IMAGE_TAG, lambda tag: tag[0] * next(left), turn["value"])}
        for turn in record["conversations"]
    ]
    return {**record, "conversations": turns}
