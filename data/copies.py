"""Files of rows that are copies of other files."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.kept import kept
from data.table import Table
from data.tfds_rows import TfdsRows


def copied(table: Table, other: Table) -> bool:
    """Whether a file of a table is a file of another one, or a copy of it.

    Files of equal bytes are no copies if they name images in different folders, where paths have other meanings. The
    splits of a TFDS folder share files, so its files are not compared.

    Args:
        table: rows of files.
        other: rows of other files.
    """
    if isinstance(table, TfdsRows) or isinstance(other, TfdsRows):
        return False
    apart = table.folder.resolve() != other.folder.resolve()
    return _share_a_file(table.files, other.files) and not (apart and _sizes_of_images(table))


def contents(table: Table) -> list[str]:
    """Digests of the contents of each file, with the sizes of the images that are named: equal for copies elsewhere.

    Args:
        table: rows of files.

    Returns:
        A digest per file; none for a TFDS folder, of which the splits share files.
    """
    if isinstance(table, TfdsRows):
        return []
    images = repr(_sizes_of_images(table))
    return [hashlib.sha256(f"{_digest(file)} {images}".encode()).hexdigest() for file in table.files]


def _sizes_of_images(table: Table) -> list[int]:
    """Sizes of the image files that rows name. A path beside the bytes of an image may be that of no file."""
    files = (os.path.join(table.folder, name) for name in table.named())
    return [os.stat(file).st_size for file in files if os.path.isfile(file)]


def _share_a_file(files: Sequence[Path], others: Sequence[Path]) -> bool:
    """Whether a file is one of some others, or has its bytes; only files of equal sizes are read, and only once."""
    if {file.resolve() for file in files} & {file.resolve() for file in others}:
        return True
    sizes = _sizes(files) & _sizes(others)
    first, second = ({_digest(file) for file in each if file.stat().st_size in sizes} for each in (files, others))
    return bool(first & second)


def _sizes(files: Iterable[Path]) -> set[int]:
    return {file.stat().st_size for file in files}


def _digest(file: Path) -> str:
    """Digest of the bytes of a file."""

    def read() -> np.ndarray:
        with file.open("rb") as stream:
            return np.array(hashlib.file_digest(stream, "sha256").hexdigest())

    return str(kept("bytes of a file", [file], lambda: {"digest": read()})["digest"])
