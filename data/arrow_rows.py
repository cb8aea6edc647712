"""Random access to rows of a folder that Hugging Face datasets wrote with `save_to_disk`; files are memory-mapped.

Such a file is an Arrow stream, which pyarrow reads alone: `datasets` itself would add pandas and an HTTP client.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from os.path import exists
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import read_json
from data.chat_rows import PATHS, TURNS
from data.files import SPLITS, decode_image, files_digest, images_digest, inside
from data.kept import from_bytes, kept, to_bytes
from data.limits import BadRow, check_sample, quoted
from data.rows import ALIASES, TRL, columns, image_names

_NAMES = (*ALIASES["image"], *PATHS)
_TEXTS = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
_LISTS = ((pyarrow.types.is_list, pyarrow.list_), (pyarrow.types.is_large_list, pyarrow.large_list))
_UNREADABLE = (pyarrow.ArrowException, ValueError, OverflowError, SystemError, RecursionError)
_ITEM_BYTES = 64
"""Memory of an item of a list, beside its text or bytes."""


class ArrowRows:
    """Rows of several Arrow files.

    Args:
        files: at least one file.
        images: folder that image paths are relative to and may not leave; None for that of the files.

    Raises:
        AntgmmError: a file cannot be read as an Arrow stream.
    """

    def __init__(self, files: Sequence[Path], images: Path | None = None):
        self.files, self.folder = files, images or files[0].parent
        self._batches = [batch for file in files for batch in _batches(file)]
        self._sizes = [row_bytes(batch) for batch in self._batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Any:
        batch = int(np.searchsorted(self._starts, number, "right")) - 1
        return one_row(self._batches[batch], number - int(self._starts[batch]), self._sizes[batch])

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        return f"row {number + 1}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """Reads an image of a row. Raises BadRow if it is missing or cannot be decoded."""
        return decode_image(name if isinstance(name, bytes) else inside(self.folder, name))

    def digest(self) -> str:
        """Returns a digest of names, sizes and times of the files, and of sizes and times of all image files."""
        return images_digest(files_digest(self.files), self.folder, self.named())

    def named(self) -> list[str]:
        """Returns the image paths in all rows."""
        names = kept("images of Arrow rows", self.files, lambda: {"names": to_bytes(self._image_names())})["names"]
        return from_bytes(names)

    def _image_names(self) -> Iterator[str]:
        for batch in self._batches:
            wanted = named_images(batch.schema)
            yield from (name for row in all_rows(batch.select(wanted.names).cast(wanted)) for name in image_names(row))


def one_row(table: pyarrow.Table | pyarrow.RecordBatch, place: int, sizes: np.ndarray) -> Any:
    """Returns a row as Python objects.

    Args:
        table: the rows.
        place: number of the row.
        sizes: `row_bytes` of the table.

    Returns:
        The row; a `BadRow` if it is too large, or a value has no Python object, such as text that is not UTF-8.
    """
    try:
        check_sample(sizes[place : place + 1])
        return _objects(table.slice(place, 1))[0]
    except BadRow as reason:
        return reason
    except _UNREADABLE as error:
        return BadRow(f"cannot be read: {' '.join(str(error).split())[:200]}")


def all_rows(batch: pyarrow.RecordBatch) -> Iterable[Any]:
    """Returns the rows of a batch like `one_row`; together, unless they are large or one of them cannot be read."""
    sizes = row_bytes(batch)
    try:
        check_sample([sizes.sum()])
        return _objects(batch)
    except (BadRow, *_UNREADABLE):
        return (one_row(batch, place, sizes) for place in range(len(batch)))


def _objects(table: pyarrow.Table | pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """Rows as Python objects. Columns of JSON, in which `datasets` stores values of mixed types, are parsed."""
    kinds = {field.name: field.type for field in table.schema if _holds_json(field.type)}
    rows = table.to_pylist()
    return [{**row, **{name: _parsed(row[name], kind) for name, kind in kinds.items()}} for row in rows]


def _holds_json(kind: pyarrow.DataType) -> bool:
    """Whether values of a type are JSON, or hold it at any depth."""
    return isinstance(kind, pyarrow.JsonType) or any(_holds_json(field.type) for field in _fields(kind))


def _fields(kind: pyarrow.DataType) -> list[pyarrow.Field]:
    return [kind.field(place) for place in range(kind.num_fields)]


def _parsed(value: Any, kind: pyarrow.DataType) -> Any:
    """A value with its JSON parsed; maps hold none that rows use."""
    if value is None or not _holds_json(kind) or pyarrow.types.is_map(kind):
        return value
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if pyarrow.types.is_struct(kind):
        return {field.name: _parsed(value[field.name], field.type) for field in _fields(kind)}
    return [_parsed(one, kind.value_type) for one in value]


def row_bytes(table: pyarrow.Table | pyarrow.RecordBatch) -> np.ndarray:
    """Returns the memory of each row as Python objects, about, int64 [N]; reads no texts or pictures."""
    return sum((value_bytes(column) for column in table.columns), np.zeros(table.num_rows, np.int64))


def value_bytes(array: pyarrow.Array | pyarrow.ChunkedArray) -> np.ndarray:
    """Returns the bytes of the texts and pictures in each value, also of those that values share, int64 [N].

    Raises:
        ValueError: a value is not in its dictionary.
    """
    kind, types = array.type, pyarrow.types
    if isinstance(array, pyarrow.ChunkedArray):
        return np.concatenate([np.zeros(0, np.int64), *map(value_bytes, array.chunks)])
    if isinstance(array, pyarrow.ExtensionArray):
        return value_bytes(array.storage)
    if types.is_dictionary(kind):
        return _shared_bytes(array)
    if types.is_struct(kind):
        return sum(
            (value_bytes(array.field(place)) for place in range(kind.num_fields)), np.zeros(len(array), np.int64)
        )
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        before = np.concatenate([[0], np.cumsum(value_bytes(array.values) + _ITEM_BYTES)])
        return np.diff(before[array.offsets.to_numpy()])
    if types.is_fixed_size_list(kind):
        items = value_bytes(array.values) + _ITEM_BYTES
        return items.reshape(-1, kind.list_size).sum(1)[array.offset : array.offset + len(array)]
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_string(kind) or types.is_large_string(kind):
        return pc.call_function("binary_length", [array]).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.zeros(len(array), np.int64)


def _shared_bytes(array: pyarrow.DictionaryArray) -> np.ndarray:
    """`value_bytes` of values that are places in a list of different ones."""
    sizes, result = value_bytes(array.dictionary), np.zeros(len(array), np.int64)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    places = array.indices.drop_null().to_numpy()
    if places.size and not 0 <= places.min() <= places.max() < len(sizes):
        raise ValueError("a value is not in its dictionary")
    result[valid] = sizes[places]
    return result


def data_files(folder: Path) -> list[Path]:
    """Returns the files of a folder of `save_to_disk`, in order; [] for another folder.

    Raises:
        AntgmmError: the folder holds several splits, or its `state.json` is damaged.
    """
    if exists(folder / SPLITS):
        # Of a data set of the Hub, the folders of the splits are not downloaded.
        listed = read_json(folder / SPLITS).get("splits") or (path.parent.name for path in folder.glob("*/state.json"))
        splits = ", ".join(sorted(map(str, listed)))
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


def named_images(schema: pyarrow.Schema) -> pyarrow.Schema:
    """Columns in which rows may name image files, at any depth, without the bytes that may lie beside a path.

    A row whose image is in its bytes then seems to name the path beside them: whether it does would take reading all
    images.
    """
    columns = [schema.field(name) for name in schema.names if name in (*ALIASES["image"], *TURNS, *TRL)]
    return pyarrow.schema(
        [column.with_type(_without_bytes(column.type)) for column in columns if _names(column.type, column.name)]
    )


def _names(kind: pyarrow.DataType, name: str) -> bool:
    """Whether values of a type may name image files."""
    if isinstance(kind, pyarrow.JsonType):
        return True
    if pyarrow.types.is_dictionary(kind):
        return _names(kind.value_type, name)
    if pyarrow.types.is_struct(kind):
        return any(_names(field.type, field.name) for field in _fields(kind))
    if _is_list(kind):
        return _names(kind.value_type, name)
    return name in _NAMES and any(is_text(kind) for is_text in _TEXTS)


def _without_bytes(kind: pyarrow.DataType) -> pyarrow.DataType:
    if pyarrow.types.is_struct(kind):
        fields = [field.with_type(_without_bytes(field.type)) for field in _fields(kind)]
        paths = any(field.name in PATHS for field in fields)
        return pyarrow.struct([field for field in fields if field.name != "bytes" or not paths])
    for is_kind, list_of in _LISTS:
        if is_kind(kind):
            return list_of(kind.value_field.with_type(_without_bytes(kind.value_type)))
    return kind


def _is_list(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    views = types.is_list_view(kind) or types.is_large_list_view(kind)
    return views or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def used_columns(file: Path, schema: pyarrow.Schema) -> list[str]:
    """Returns the columns that rows use. Raises AntgmmError if two have the same name."""
    names = columns(schema.names)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise AntgmmError(f"{file} has two columns {repeated[0]!r}: remove or rename one")
    return names


def _batches(file: Path) -> list[pyarrow.RecordBatch]:
    """Record batches of a memory-mapped file, with the columns that rows use."""
    try:
        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) as stream:
            names = used_columns(file, stream.schema)
            batches = [batch.select(names) for batch in stream]
            for batch in batches:  # a damaged offset would end the process; pictures' bytes are not read
                batch.validate(full=True)
            return batches
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AntgmmError(f"{file} is not an Arrow file of datasets.save_to_disk: {reason}") from error
