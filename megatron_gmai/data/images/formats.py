"""Which files are images: told by their first bytes, never by their names.

Only the formats listed here are opened. Pillow alone knows forty more, one of which (EPS) starts a
program.
"""

import re
import zlib

from megatron_gmai.data.ledger import BadSample

# Suffixes, in lower case and without a leading dot, of files that count as images where images are
# picked out of other files, as in a tar file. What is in them decides how they are read; the last
# rows are not read at all, but refused with the reason instead of being left out in silence.
IMAGE_SUFFIXES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "tif", "tiff", "webp", "bmp", "dib", "gif"),
        *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "avif", "avifs", "heic", "heif", "hif"),
        *("pgm", "ppm", "pnm", "pbm", "pfm", "dcm", "dicom", "dic", "ima", "nii", "nii.gz", "img"),
        *("svs", "ndpi", "scn", "bif", "czi", "lif", "mrxs", "vms", "mha", "mhd", "nrrd", "hdr"),
        *("jpm", "jls", "jxl", "jxr", "tga", "ico", "dds", "exr", "psd", "eps", "svg", "raw"),
    }
)
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two for files above 4 GB
MAGICS = [
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("TIFF", re.compile(b"|".join(map(re.escape, TIFF_MAGICS)))),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("BMP", re.compile(rb"BM")),
    ("JPEG2000", re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51")),
    # ISO media (ISO 14496-12): the major brand, then a version, then the compatible ones.
    ("AVIF", re.compile(rb"....ftyp(?:avif|avis|mif1....(?:....){0,8}?avi[fs])", re.DOTALL)),
    ("HEIC", re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)),
    ("PPM", re.compile(rb"P(?:[1-6]|f)\s")),
    ("NIfTI", re.compile(rb".{344}n\+1\0|.{4}n\+2\0", re.DOTALL)),
    # DICOM without preamble: an element of group 2 or 8, its VR in letters or a small length.
    (
        "DICOM",
        re.compile(
            rb"[\x02\x08]\0.\0(?:[A-Z]{2}|.[\0-\x0f]\0\0)|\0[\x02\x08]\0.[A-Z]{2}", re.DOTALL
        ),
    ),
]
# What strangers' data hold in place of images, for a reason that helps.
OTHERS = [
    ("a PostScript file", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("a PDF", rb"%PDF"),
    ("a Git LFS pointer, not the file itself", rb"version https://git-lfs"),
    ("a web page, perhaps of a failed download", rb"\s*<(?:!doctype html|html)"),
    ("an SVG drawing", rb"\s*<(?:svg|\?xml)"),
    ("a JPEG XL image; convert it to PNG", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("an NRRD volume; convert it to NIfTI", rb"NRRD"),
    ("a MetaImage volume; convert it to NIfTI", rb"(?:ObjectType|NDims)\s*="),
    ("the header of an image pair; convert it to one .nii file", rb"(?s:.{344})ni1\0"),
    ("a zip archive", rb"PK\x03\x04"),
    ("a gzip file that holds no NIfTI volume", rb"\x1f\x8b"),
    ("an HDF5 file", rb"\x89HDF\r\n"),
    ("a video", rb"(?s:....)ftyp|RIFF(?s:....)AVI |\x1aE\xdf\xa3"),
]
GZIP = b"\x1f\x8b"
HEAD = 352  # bytes that tell the format; NIfTI's come last
MAX_VOLUME = 2**29  # bytes of an unpacked volume


def kind_of(data: bytes) -> str:
    """The format's name, one of those in MAGICS. Raises BadSample for everything else."""
    if data[128:132] == b"DICM":  # first: the preamble before it may be the head of a TIFF
        return "DICOM"
    head = _gunzip(data, HEAD) if data.startswith(GZIP) else data[:HEAD]
    for kind, magic in MAGICS:
        if magic.match(head) and (kind == "NIfTI" or head == data[:HEAD]):
            return kind
    raise BadSample(f"not an image of a known format{_what(data)}")


def is_volume(data: bytes) -> bool:
    """Whether it is a NIfTI volume, whose images are slices."""
    try:
        return kind_of(data) == "NIfTI"
    except BadSample:
        return False


def _what(data: bytes) -> str:
    if not data:
        return ": an empty file"
    for name, magic in OTHERS:
        if re.match(magic, data[:1024], re.IGNORECASE):
            return f": {name}"
    return ""


def unpacked(data: bytes) -> bytes:
    """The contents of a gzip file, the data themselves if it is none. Raises BadSample if they are
    damaged or larger than MAX_VOLUME."""
    if not data.startswith(GZIP):
        return data
    plain = _gunzip(data, MAX_VOLUME + 1)
    if len(plain) > MAX_VOLUME:
        raise BadSample(f"unpacks to more than {MAX_VOLUME} bytes")
    return plain


def _gunzip(data: bytes, most: int) -> bytes:
    """Up to `most` bytes, so that no file unpacks to more than there is room for."""
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, most)
    except zlib.error as error:
        raise BadSample(f"damaged gzip file: {error}") from error


def needs(what: str, package: str, extra: str) -> BadSample:
    """The reason for files whose optional reader is not installed."""
    return BadSample(f"{what} needs {package}: pip install 'megatron-gmai[{extra}]'")
