"""Sources of records: random access, with or without images."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.limits import short
from data.record import Record
from data.rows import Row

if TYPE_CHECKING:
    from data.encoding import Encoder


def evenly(count: int, most: int) -> np.ndarray:
    """Returns at most `most` of the numbers below `count`, at equal distances, ascending."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


class Expected(NamedTuple):
    """What is compared with the answer to a record.

    Attributes:
        type: question type.
        answer: the right answer.
        slice: name of the part of the data that the record belongs to.
    """

    type: str
    answer: str
    slice: str


class Source(Sequence[Record]):
    """Random access to records, which are read on access.

    Attributes:
        path: file or folder of the records, for messages; None if there is none.
        drawn: whether records are generated, which takes longer than reading them from disk.
        drops_long: whether records that are too long are left out; else they are an error.
    """

    path: Path | None = None
    drawn = False
    drops_long = False

    @abstractmethod
    def words(self, index: int) -> Row:
        """Returns a record without its images."""

    def expected(self) -> list[Expected]:
        """Returns what is compared with answers, of all records; their images may be files in memory."""
        rows = map(self.words, range(len(self)))
        return [Expected(row.type, row.answer, row.slice) for row in rows]

    @abstractmethod
    def digest(self) -> str:
        """Returns a digest of the records, without reading them; equal if nothing has changed."""

    def origin(self) -> tuple[str, str]:
        """Returns a digest of what the records are taken from, and the name of the split, "" for none."""
        return self.digest(), ""

    def contents(self) -> list[str]:
        """Returns digests of what the records are taken from, which are equal for copies; [] if none are known."""
        return []

    def overlaps(self, other: "Source") -> bool:
        """Whether records of this source and another one may be the same."""
        (mine, split), (theirs, another) = self.origin(), other.origin()
        if {split, another} == {"train", "test"}:
            return False
        return mine == theirs or not set(self.contents()).isdisjoint(other.contents())

    def read(self, index: int) -> Record:
        """Reads a record that may be invalid. Raises BadRow if its row or an image is."""
        return self[index]

    def check(self, bad: Mapping[int, str]) -> None:
        """Raises one error that lists all invalid records.

        Args:
            bad: record number -> error.

        Raises:
            AntgmmError: there are invalid records.
        """
        if bad:
            names = {index: short(self.words(index).id) or f"record {index + 1}" for index in bad}
            lines = (f"{names[index]}: {reason}" for index, reason in bad.items())
            raise AntgmmError(f"{len(bad)} of {len(self)} records are invalid", *lines)

    def encoded(self, encoder: "Encoder") -> Path | None:
        """Returns the folder with the encoded records, or None if they are not encoded yet."""
        return None

    def places(self) -> dict[str, np.ndarray]:
        """Returns positions of records that a pass over the rows determined, for `restore`."""
        return {}

    def restore(self, places: Mapping[str, np.ndarray]) -> None:
        """Restores the result of `places` from an earlier process."""


class InMemorySource(Source):
    """Records in memory."""

    def __init__(self, records: Sequence[Record]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._records[index]

    def words(self, index: int) -> Row:
        """Returns a record without its images."""
        values = {name: value for name, value in vars(self._records[index]).items() if name != "cells"}
        return Row(**{**values, "images": ()})

    def digest(self) -> str:
        """Returns a digest of the records, including their images."""
        digest = hashlib.sha256()
        for index, record in enumerate(self._records):
            digest.update(repr(self.words(index)).encode())
            for image in (*record.images, *([] if record.cells is None else [record.cells])):
                digest.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        return digest.hexdigest()
