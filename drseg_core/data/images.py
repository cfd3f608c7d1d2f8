# SPDX-License-Identifier: Apache-2.0
"""Reading 8-bit image and mask files: what is converted, and what is refused with its reason.

Images of a user's own set may be more (see :mod:`drseg_core.data.own_images`); those of benchmark sets, as here, all
become 8-bit RGB:

===========================  =====================================================================
file                         becomes
===========================  =====================================================================
RGB, YCbCr                   RGB
palette, gray, black/white   RGB (gray repeated three times)
alpha                        its colour; the alpha channel is dropped
EXIF rotation                turned upright, as viewers show it (the mask must fit the upright image)
TIFF with more bands         its first three bands, if they are 8-bit
CMYK, Lab                    refused: there is no one right conversion to 8-bit RGB
16-bit, float                refused here; a user's own set takes them with a scale
other formats                refused, whatever the name of the file says
===========================  =====================================================================

Masks are PNG or TIFF and hold one band of class ids, of at most 8 bits; of a palette image the indices are the ids.
The ids are the stored numbers: gray of 2 or 4 bits is not spread over 0 to 255, as viewers do. JPEG, which does not
keep numbers, and TIFF that stores white as zero are refused.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.values import highest_values, spread
from drseg_core.errors import DatasetError
from drseg_core.extras import require

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000
"""Default bound on the pixels of one file, checked before it is decoded."""

FORMATS = ("PNG", "JPEG", "TIFF")
"""What Pillow may take a file for (JPEG includes MPO); its other plugins stay out, as some start programs."""

_IMAGE_MODES = {"RGB", "RGBA", "RGBX", "RGBa", "YCbCr", "P", "PA", "L", "LA", "La", "1"}
_MASK_MODES = {"L", "P", "1"}
# by which factor Pillow spreads gray of so many bits over 0 to 255; mode 1 and palettes it leaves alone
_SPREAD = {2: 85, 4: 17, 8: 1}
EXIF_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_LOSSY = {"jpeg", "tiff_jpeg", "webp"}


class TooLarge(DatasetError):
    """A file has more pixels than may be decoded at a time."""


def first_bytes(path: Path) -> str:
    """The beginning of a file, as it is quoted in an error."""
    try:
        with open(path, "rb") as file:
            data = file.read(16)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return repr(data) if data else "none (empty file)"


def in_words(mode: str) -> str:
    """What Pillow calls a mode, as maps are spoken of."""
    if mode.startswith("I;16"):
        return "is 16-bit"
    words = {
        "I": "is 32-bit (or 16-bit)",
        "F": "is floating point",
        "CMYK": "has inks (CMYK)",
        "LAB": "is Lab",
    }
    return words.get(mode, f"has {len(mode)} bands ({mode})")


@contextlib.contextmanager
def opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open with Pillow; whatever goes wrong becomes a DatasetError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        # the size limit below takes the place of Pillow's warning; its error at twice that size stays
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            check_pixels(path, image.size, max_pixels)
            yield image
    except DatasetError:
        raise
    except FileNotFoundError:
        raise DatasetError(f"read_image: {path} vanished; expected the file that was listed") from None
    except UnidentifiedImageError:
        raise DatasetError(
            f"read_image: {path} is not an image or is cut short; expected PNG, JPEG or TIFF, "
            f"got first bytes {first_bytes(path)}"
        ) from None
    except Image.DecompressionBombError as error:
        raise TooLarge(f"read_image: {path} is too large; expected at most {max_pixels} pixels: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise DatasetError(f"read_image: {path} cannot be read: {error.strerror}") from None
        # Pillow's plugins report damage through all of these
        raise DatasetError(f"read_image: {path} is damaged: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_pixels(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a file of too many pixels."""
    width, height = size
    if width * height > max_pixels:
        raise TooLarge(f"read_image: {path} is too large; expected at most {max_pixels} pixels, got {width} x {height}")


def stored_bits(path: Path, image: Image.Image) -> int:
    """Bits of a channel as the file stores it; Pillow's mode does not tell, because it converts while it reads."""
    from PIL import TiffImagePlugin

    if image.format == "PNG":
        with open(path, "rb") as file:
            header = file.read(26)
        if header[12:16] != b"IHDR":
            raise DatasetError(f"read_image: {path} is damaged: PNG does not begin with IHDR")
        return header[24]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return 8


def _check_mask(path: Path, image: Image.Image) -> None:
    """Refuse, by its header, a mask whose numbers are not ids."""
    from PIL import TiffImagePlugin

    tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    if image.format not in ("PNG", "TIFF") or tiff and image.info.get("compression") in _LOSSY:
        how = f"TIFF with {image.info['compression']} compression" if tiff else "JPEG"
        raise DatasetError(f"read_mask: {path} is {how}, which changes ids; expected lossless PNG or TIFF")
    if image.mode not in _MASK_MODES or image.mode == "L" and stored_bits(path, image) not in _SPREAD:
        raise DatasetError(f"read_mask: {path} {in_words(image.mode)}; expected one 8-bit band of class ids")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
        raise DatasetError(f"read_mask: {path} stores white as zero; expected black as zero, or a palette")


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS, mask: bool = False) -> tuple[int, int]:
    """(height, width) as the file's header gives it, after EXIF rotation. Decodes nothing.

    Args:
        path: the file.
        max_pixels: bound on the pixels.
        mask: refuse what :func:`read_mask` refuses, as far as the header shows it.

    Raises:
        DatasetError: not an image, or more than ``max_pixels``.
    """
    if needs_rasterio(path):
        with _raster(path, max_pixels) as raster:
            return raster.height, raster.width
    with opened(path, max_pixels) as image:
        if mask:
            _check_mask(path, image)
        width, height = image.size
        # PNG may keep EXIF behind the pixels, where only decoding finds it; read_image checks again
        if image.format in ("JPEG", "MPO") and image.getexif().get(EXIF_ORIENTATION, 1) >= 5:
            width, height = height, width
        return height, width


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3) uint8 RGB (see the table above).

    Raises:
        DatasetError: not an image, damaged, too large, or of a mode that is refused.
    """
    if needs_rasterio(path):
        return _read_raster_image(path, max_pixels)
    from PIL import ImageOps

    with opened(path, max_pixels) as image:
        if image.mode not in _IMAGE_MODES:
            raise DatasetError(
                f"read_image: {path} {in_words(image.mode)}; expected 8-bit RGB, gray or palette (convert it first)"
            )
        bits = stored_bits(path, image)
        if bits > 8:
            raise DatasetError(f"read_image: {path} has {bits} bits per channel; expected 8 (convert it first)")
        image.load()
        upright = ImageOps.exif_transpose(image)
        return np.array(upright.convert("RGB"))


def read_mask(path: Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a mask to (H, W) uint8 ids, the numbers that the file stores.

    Raises:
        DatasetError: not an image, damaged, too large, JPEG, or not one band of at most 8 bits.
    """
    if needs_rasterio(path):
        return _read_raster_mask(path, max_pixels)
    from PIL import ImageOps

    with opened(path, max_pixels) as image:
        _check_mask(path, image)
        spread = _SPREAD[stored_bits(path, image)] if image.mode == "L" else 1
        image.load()
        return np.array(ImageOps.exif_transpose(image)).astype(np.uint8) // np.uint8(spread)


def needs_rasterio(path: Path) -> bool:
    """Whether a TIFF is of a kind that Pillow cannot open, such as five bands. Asked before anything is opened."""
    require("read_image", "pillow")
    from PIL import Image

    if path.suffix.lower() not in (".tif", ".tiff"):
        return False
    try:
        with open(path, "rb") as file:
            if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return False
    except OSError:
        # opened says why
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path, formats=FORMATS).close()
    except Image.DecompressionBombError:
        return False
    except Exception:
        return True
    return False


@contextlib.contextmanager
def _raster(path: Path, max_pixels: int) -> Iterator[Any]:
    try:
        import rasterio
    except ImportError:
        raise DatasetError(
            f"read_image: {path} is a TIFF that Pillow cannot read; expected rasterio to be installed, or 8-bit RGB"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, driver="GTiff") as raster:
                check_pixels(path, (raster.width, raster.height), max_pixels)
                yield raster
    except rasterio.errors.RasterioError as error:
        raise DatasetError(
            f"read_image: {path} is not an image or is cut short; expected PNG, JPEG or TIFF, "
            f"got first bytes {first_bytes(path)}: {_one_line(error)}"
        ) from None


def _read_raster_image(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    with _raster(path, max_pixels) as raster:
        if set(raster.dtypes) != {"uint8"} or raster.count == 2:
            got = f"{raster.count} bands of {', '.join(sorted(set(raster.dtypes)))}"
            raise DatasetError(f"read_image: {path} has {got}; expected 1, 3 or more of uint8")
        bands = [1, 1, 1] if raster.count == 1 else [1, 2, 3]
        data = spread(raster.read(bands), highest_values(raster, bands))
        return np.ascontiguousarray(data.transpose(1, 2, 0))


def _read_raster_mask(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    with _raster(path, max_pixels) as raster:
        if raster.count != 1 or raster.dtypes[0] != "uint8":
            got = f"{raster.count} bands of {raster.dtypes[0]}"
            raise DatasetError(f"read_mask: {path} has {got}; expected one 8-bit band of class ids")
        compression = str(raster.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION", "")).lower()
        if compression.endswith("jpeg") or compression in _LOSSY:
            raise DatasetError(
                f"read_mask: {path} is TIFF with {compression} compression, which changes ids; "
                "expected lossless PNG or TIFF"
            )
        return raster.read(1)
