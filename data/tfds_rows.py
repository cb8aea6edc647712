"""Random access to rows of a prepared TFDS folder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from antgmm_jax.extras import require
from data.files import decode_image, files_digest
from data.limits import BadRow

_IMAGES = ("image", "images")


class TfdsRows:
    """Rows of a split of a prepared TFDS folder (array_record files), read without TensorFlow.

    Args:
        path: folder with `dataset_info.json`.
        split: name of the split.

    Raises:
        AntgmmError: the folder is not such a folder, has no such split, or TFDS is not installed.
    """

    def __init__(self, path: Path, split: str):
        require("tfds")
        from data.tfds_files import open_split

        self._split, self._rows, self._lock = split, open_split(path, split, encoded=_IMAGES), Lock()
        self.folder = path
        self.files: Sequence[Path] = sorted(file for file in path.iterdir() if file.is_file())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._row(number)
        except BadRow as reason:
            return reason

    def _row(self, number: int) -> dict[str, Any]:
        raw = self._fields(number)
        fields = {name: _plain(value) for name, value in raw.items() if name not in (*_IMAGES, "latents")}
        try:
            latents = {name: int(value) for name, value in raw.get("latents", {}).items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise BadRow(f"has latents that are no whole numbers ({' '.join(str(error).split())[:200]})") from error
        return {**fields, "latents": latents, "image": [f"{number}/{place}" for place in range(len(_images(raw)))]}

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        return f"{self._split} row {number}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """Returns an image of a row, by number of the row and place in it. Raises BadRow if it cannot be decoded."""
        number, place = map(int, str(name).split("/"))
        return decode_image(bytes(_images(self._fields(number))[place]))

    def digest(self) -> str:
        """Returns a digest of the split's name and of the files' names, sizes and times."""
        return f"{self._split} {files_digest(self.files)}"

    def named(self) -> list[str]:
        """Returns no image paths: such a file contains its images."""
        return []

    def _fields(self, number: int) -> dict[str, Any]:
        try:
            with self._lock:  # the reader is not thread-safe
                return self._rows[number]
        except Exception as error:  # each decoder has its own
            raise BadRow(f"cannot be read: {' '.join(str(error).split())[:200]}") from error


def _images(raw: Mapping[str, Any]) -> Sequence[Any]:
    """Images of a row as bytes of files: its `image`, or its sequence `images`."""
    return [raw["image"]] if "image" in raw else raw.get("images", ())


def _plain(value: Any) -> Any:
    """Texts and lists of texts, at any depth."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadRow(f"holds text that is not UTF-8 (byte {error.start})") from error
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [_plain(inner) for inner in value]
    return value
