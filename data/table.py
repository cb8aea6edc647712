"""The interface of files with rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Table(Protocol):
    """Random access to raw rows of files; rows that cannot be parsed are returned as `BadRow`.

    Attributes:
        files: the files with the rows.
        folder: folder that image paths are relative to.
    """

    files: Sequence[Path]
    folder: Path

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        ...

    def picture(self, name: str | bytes) -> np.ndarray:
        """Reads an image of a row. Raises BadRow if it is missing or cannot be decoded."""
        ...

    def digest(self) -> str:
        """Returns a digest of the files; equal if nothing has changed."""
        ...

    def named(self) -> list[str]:
        """Returns the image paths in all rows."""
        ...
