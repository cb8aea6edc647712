"""Files of rows: decoding of images, checks of their paths, and digests."""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from antgmm_jax.io.hub import contents
from data.limits import BadRow, check_picture, quoted, short

Image.init()
# Pillow warns of damaged tags of a picture that it can decode. Set once, as `catch_warnings` is not for threads; the
# warning of too many pixels is of another class.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
FORMATS = [
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
]
"""Formats of pictures. Others of Pillow's are rare, and one of them starts a program."""
SPLITS = "dataset_dict.json"
"""A file of `datasets` beside the folders of several splits, each with rows of its own."""
_WIDE = ("PNG", "PPM")
"""Formats in which Pillow reads grey values of 16 bits as mode I, depending on its version."""


def decode_image(data: bytes | Path) -> np.ndarray:
    """Decodes an image to RGB of 8 bits, on white where it is transparent, and applies its EXIF orientation.

    Args:
        data: a path, or the bytes of a file in one of the `FORMATS`.

    Returns:
        uint8 [H, W, 3].

    Raises:
        BadRow: the file is missing or not an image, or has too many pixels, or pixels of no known range.
    """
    name = short(data.name) if isinstance(data, Path) else "(bytes)"
    try:
        with Image.open(_regular(data) if isinstance(data, Path) else io.BytesIO(data), formats=FORMATS) as file:
            check_picture(name, file.size)
            if file.format != "MPO" and getattr(file, "is_animated", False):  # telephones write JPEGs with a preview
                raise BadRow(f"image {name} has several frames or pages: save the one that is meant")
            wide = file.mode.startswith("I;16") or (file.mode == "I" and file.format in _WIDE)
            if file.mode in ("I", "F") and not wide:
                raise BadRow(f"image {name} has pixels of 32 bits (mode {file.mode}): convert it to 8 bits a channel")
            ImageOps.exif_transpose(file, in_place=True)
            if wide:
                return np.repeat(_upper_bits(file)[..., None], 3, axis=-1)
            if "A" in file.getbands() or "transparency" in file.info:
                # As in transformers and vLLM: the colour below a transparent pixel is often black.
                white = Image.new("RGBA", file.size, "white")
                return np.array(Image.alpha_composite(white, file.convert("RGBA")).convert("RGB"))
            return np.array(file if file.mode == "RGB" else file.convert("RGB"))
    except BadRow:
        raise
    except FileNotFoundError as error:
        raise BadRow(f"image {name} is missing") from error
    except UnidentifiedImageError as error:
        raise BadRow(f"image {name} cannot be decoded: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # each decoder has its own
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadRow(f"image {name} cannot be decoded: {reason}") from error


def _upper_bits(file: Image.Image) -> np.ndarray:
    """Upper 8 bits of grey values of 16 bits, uint8 [H, W]. Pillow's conversion would set all above 255 to white.

    Colours of 16 bits become the same bits (value // 256); dividing by 257 would differ by at most 1.
    """
    bits = 16  # a TIFF may have 12
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        (bits,) = file.tag_v2[TiffImagePlugin.BITSPERSAMPLE]
    return (np.asarray(file) >> (bits - 8)).astype(np.uint8)


def _regular(path: Path) -> Path:
    """The path of a regular file: reading a pipe may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise BadRow(f"image {short(path.name)} is a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}")
    return path


def inside(folder: Path, path: str) -> Path:
    """Resolves an image path of a row.

    Args:
        folder: data folder.
        path: path as written in the row.

    Returns:
        Resolved path.

    Raises:
        BadRow: the path leaves the folder (by `..`, as an absolute path or through a link), or is one of Windows.
    """
    try:
        resolved = (folder / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise BadRow(f"image path {quoted(path)} is not a path") from error
    if "\\" in path and not resolved.exists():
        raise BadRow(f"image path {quoted(path)} separates folders by \\: write / instead")
    if not any(resolved.is_relative_to(root.resolve()) for root in (folder, contents(folder))):
        raise BadRow(f"image path {quoted(path)} leaves the data folder: name the folder of all images with images")
    return resolved


def files_digest(files: Sequence[Path]) -> str:
    """A digest of the names, sizes and times of files."""
    stamps = ((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256("\n".join(map(str, stamps)).encode()).hexdigest()


def images_digest(digest: str, folder: Path, names: Iterable[str]) -> str:
    """Extends a digest of rows by the sizes and times of their image files.

    Args:
        digest: digest of the rows.
        folder: folder of the image paths.
        names: image paths as written.

    Returns:
        The digest.
    """
    result = hashlib.sha256(digest.encode())
    for name in names:
        result.update(_stamp(folder, name))
    return result.hexdigest()


def _stamp(folder: Path, name: str) -> bytes:
    """Returns size and modification time of a file as bytes for a digest, or a marker if it does not exist."""
    try:
        status = os.stat(os.path.join(folder, name))  # faster than Path.stat, for hundreds of thousands of files
    except (OSError, ValueError):
        return b"none "
    return f"{status.st_size} {status.st_mtime_ns} ".encode()
