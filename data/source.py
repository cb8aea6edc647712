"""Where records come from: any of them by its number, with its pictures or without."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.record import Record
from data.rows import Row


class Source(Sequence[Record]):
    """Records by number; nothing of a record is held in memory.

    Attributes:
        path: the file or folder that they come from, for people; None where there is none.
        drawn: whether reading a record means to draw it, which takes longer than reading it from a disk.
    """

    path: Path | None = None
    drawn = False

    @abstractmethod
    def words(self, index: int) -> Row:
        """A record without its pictures, which is all that scoring needs."""

    @abstractmethod
    def digest(self) -> str:
        """A digest of what the records are read from: equal where nothing has changed, and known without reading it."""

    def read(self, index: int) -> Record:
        """A record that was not yet checked. Raises BadRow where its row or a picture is bad."""
        return self[index]

    def check(self, bad: Mapping[int, str]) -> None:
        """Refuses bad records together.

        Args:
            bad: record -> what is wrong with it.

        Raises:
            AntgmmError: there is one, or the source itself knows of faults.
        """

    def places(self) -> dict[str, np.ndarray]:
        """What a pass over the rows has taught, for `restore`."""
        return {}

    def restore(self, places: Mapping[str, np.ndarray]) -> None:
        """Takes what an earlier process learnt of the same rows."""


class Held(Source):
    """Records that are in memory."""

    def __init__(self, records: Sequence[Record]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._records[index]

    def words(self, index: int) -> Row:
        """A record without its pictures."""
        values = {name: value for name, value in vars(self._records[index]).items() if name != "cells"}
        return Row(**{**values, "images": ()})

    def digest(self) -> str:
        """A digest of the records and of every pixel."""
        digest = hashlib.sha256()
        for index, record in enumerate(self._records):
            digest.update(repr(self.words(index)).encode())
            for image in (*record.images, *([] if record.cells is None else [record.cells])):
                digest.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        return digest.hexdigest()
