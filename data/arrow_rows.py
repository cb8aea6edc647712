"""Random access to rows of a folder that Hugging Face datasets wrote with `save_to_disk`; files are memory-mapped.

Such a file is an Arrow stream, which pyarrow reads alone: `datasets` itself would add pandas and an HTTP client.
"""

from collections.abc import Iterator, Sequence
from os.path import exists
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import read_json
from data.chat_rows import PATHS, TURNS
from data.files import decode_image, files_digest, images_digest, inside
from data.kept import from_bytes, kept, to_bytes
from data.limits import BadRow, quoted
from data.rows import ALIASES, columns, image_names

_NAMES = (*ALIASES["image"], *PATHS)
_UNREADABLE = (pyarrow.ArrowException, ValueError, OverflowError, SystemError)


class ArrowRows:
    """Rows of several Arrow files.

    Args:
        files: at least one file; image paths are relative to their folder.

    Raises:
        AntgmmError: a file cannot be read as an Arrow stream.
    """

    def __init__(self, files: Sequence[Path]):
        self.files, self._folder = files, files[0].parent
        self._batches = [batch for file in files for batch in _batches(file)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Any:
        batch = int(np.searchsorted(self._starts, number, "right")) - 1
        return one_row(self._batches[batch], number - int(self._starts[batch]))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        return f"row {number + 1}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """Reads an image of a row. Raises BadRow if it is missing or cannot be decoded."""
        return decode_image(name if isinstance(name, bytes) else inside(self._folder, name))

    def digest(self) -> str:
        """Returns a digest of names, sizes and times of the files, and of sizes and times of all image files."""
        names = kept("images of Arrow rows", self.files, lambda: {"names": to_bytes(self._image_names())})["names"]
        return images_digest(files_digest(self.files), self._folder, from_bytes(names))

    def _image_names(self) -> Iterator[str]:
        for batch in self._batches:
            yield from (name for row in all_rows(batch.select(named_images(batch.schema))) for name in image_names(row))


def one_row(table: pyarrow.Table | pyarrow.RecordBatch, place: int) -> Any:
    """Returns a row as Python objects; a `BadRow` if one of its values has none, such as text that is not UTF-8."""
    try:
        return table.slice(place, 1).to_pylist()[0]
    except _UNREADABLE as error:
        return BadRow(f"cannot be read: {' '.join(str(error).split())[:200]}")


def all_rows(batch: pyarrow.RecordBatch) -> list[Any]:
    """Returns the rows of a batch like `one_row`; together, unless one of them cannot be read."""
    try:
        return batch.to_pylist()
    except _UNREADABLE:
        return [one_row(batch, place) for place in range(len(batch))]


def data_files(folder: Path) -> list[Path]:
    """Returns the files of a folder of `save_to_disk`, in order; [] for another folder.

    Raises:
        AntgmmError: the folder holds several splits, or its `state.json` is damaged.
    """
    if exists(folder / "dataset_dict.json"):
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise AntgmmError(f"{folder} holds the splits {splits}: specify the folder of one of them")
    state = folder / "state.json"
    if not exists(state):
        return []
    try:
        names = [str(each["filename"]) for each in read_json(state)["_data_files"]]
    except (AntgmmError, KeyError, TypeError) as error:
        raise AntgmmError(f"{state} is damaged: save the data set again") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise AntgmmError(f"{state} names {quoted(outside[0])}, which is outside the folder: save the data set again")
    return [folder / name for name in names]


def named_images(schema: pyarrow.Schema) -> list[str]:
    """Columns in which rows may name image files, at any depth; not images that are stored as bytes."""

    def names(kind: pyarrow.DataType, name: str) -> bool:
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return names(kind.value_type, name)
        if pyarrow.types.is_struct(kind):
            fields = [kind.field(place) for place in range(kind.num_fields)]
            return all(field.name != "bytes" for field in fields) and any(names(f.type, f.name) for f in fields)
        return name in _NAMES and (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))

    return [
        name for name in schema.names if name in (*ALIASES["image"], *TURNS) and names(schema.field(name).type, name)
    ]


def _batches(file: Path) -> list[pyarrow.RecordBatch]:
    """Record batches of a memory-mapped file, with the columns that rows use."""
    try:
        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) as stream:
            batches = [batch.select(columns(batch.schema.names)) for batch in stream]
            for batch in batches:  # a damaged offset would end the process; pictures' bytes are not read
                batch.validate(full=True)
            return batches
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AntgmmError(f"{file} is not an Arrow file of datasets.save_to_disk: {reason}") from error
