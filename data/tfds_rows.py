"""Rows of a prepared TFDS folder by number."""

from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from data.parquet_rows import files_digest


class TfdsRows:
    """A split of a prepared folder of array_record files, read without TensorFlow.

    Args:
        path: the folder that holds `dataset_info.json`.
        split: a split of it.

    Raises:
        AntgmmError: it is no such folder, or has no such split.
    """

    def __init__(self, path: Path, split: str):
        from data.maad.maad_synth import open_split

        self._path, self._split, self._found, self._lock = path, split, open_split(path, split), Lock()

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Any:
        found = self._fields(number)
        fields = {name: value for name, value in found.items() if name not in ("image", "latents")}
        fields = {name: value.decode() if isinstance(value, bytes) else value for name, value in fields.items()}
        latents = {name: int(value) for name, value in found.get("latents", {}).items()}
        return {**fields, "latents": latents, "image": str(number)}

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> str:
        """Where a row stands, for people."""
        return f"{self._split} row {number}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """The picture of the row of that number."""
        return np.asarray(self._fields(int(name))["image"])

    def digest(self) -> str:
        """A digest of the files' names, sizes and times, and the split's name."""
        return f"{self._split} {files_digest(sorted(file for file in self._path.iterdir() if file.is_file()))}"

    def _fields(self, number: int) -> dict[str, Any]:
        with self._lock:  # a reader is not to be used by two threads at once
            return self._found[number]
