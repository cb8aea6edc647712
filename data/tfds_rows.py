"""Random access to rows of a prepared TFDS folder."""

from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from antgmm_jax.extras import require
from data.files import files_digest


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
        from data.maad.maad_synth import open_split

        self._path, self._split, self._rows, self._lock = path, split, open_split(path, split), Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        raw = self._fields(number)
        fields = {name: value for name, value in raw.items() if name not in ("image", "latents")}
        fields = {name: value.decode() if isinstance(value, bytes) else value for name, value in fields.items()}
        latents = {name: int(value) for name, value in raw.get("latents", {}).items()}
        return {**fields, "latents": latents, "image": str(number)}

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        return f"{self._split} row {number}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """Returns the image of the row with this number."""
        return np.asarray(self._fields(int(name))["image"])

    def digest(self) -> str:
        """Returns a digest of the split's name and of the files' names, sizes and times."""
        return f"{self._split} {files_digest(sorted(file for file in self._path.iterdir() if file.is_file()))}"

    def _fields(self, number: int) -> dict[str, Any]:
        with self._lock:  # the reader is not thread-safe
            return self._rows[number]
