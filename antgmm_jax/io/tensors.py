"""Reads and writes the safetensors files of a checkpoint, one tensor at a time."""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, TensorSpec, safe_open

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular, read_json

# safetensors parses and checks headers, huggingface_hub plans the shards; values are read and written here. Ten
# bfloat16 tensors of 100 MB, safetensors 0.8.0, page cache warm (2026-11-28, AMD EPYC, 2 cores, three runs each):
# * read: 0.11 to 0.17 s and no mapped memory, `safe_open` 0.45 to 0.79 s and 954 MB of the process mapped to the file.
# * write: 0.7 to 3.9 s and 190 MB at most, `save_file` 3.1 to 5.8 s and 954 MB, as it takes all tensors at once.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK = 1 << 22  # bytes that are compared at a time
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def shards(index: Path) -> list[str]:
    """Returns the names of the files in an index, sorted. Raises AntgmmError if it has none."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise AntgmmError(f"{index} has no weight_map from tensors to files: copy it again")
    return sorted(set(files.values()))


def weight_files(directory: Path) -> list[str]:
    """Returns the names of the files of weights in a folder; they need not exist.

    As in transformers, one file stands before an index: a model that was saved into the folder of shards leaves theirs.
    """
    index = directory / INDEX
    return shards(index) if index.exists() and not (directory / WEIGHTS).exists() else [WEIGHTS]


def renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """Returns the name of a tensor after replacements of regular expressions, in order."""
    for pattern, new in renames:
        name = re.sub(pattern, new, name)
    return name


class Spec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors:
    """Tensors of one or more safetensors files, by renamed names; initially, only the headers are read.

    Args:
        directory: contains model.safetensors, or shards with their index.
        renames: regular expressions for names, with their replacements.
        on_read: called with the number of bytes after each read.

    Raises:
        AntgmmError: a file is missing, damaged, or outside the directory; or a tensor has two names and two values.
    """

    def __init__(
        self, directory: Path, renames: tuple[tuple[str, str], ...], on_read: Callable[[int], None] = lambda _: None
    ):
        files = weight_files(directory)
        if files == [WEIGHTS] and not (directory / WEIGHTS).exists():
            raise AntgmmError(
                f"{directory} has no {WEIGHTS}: save it with safe_serialization (pickled weights are not read)"
            )
        self._on_read = on_read
        self.names: dict[str, tuple[Any, str, Path, int]] = {}
        for file in files:
            path = directory / file
            # Only the name is checked: in a Hub cache, the file is a link to a blob elsewhere.
            if Path(file).name != file:
                raise AntgmmError(
                    f"{directory / INDEX} contains {file!r}, which is outside the checkpoint: correct the index"
                )
            try:
                check_regular(path)
                handle = safe_open(path, framework="numpy")
                starts = _starts(path)
            except (SafetensorError, OSError) as error:
                raise AntgmmError(
                    f"{path} cannot be read ({error}): the file is damaged or truncated, copy it again"
                ) from error
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                self._add((handle, name, path, starts[name]), renames)

    def _add(self, place: tuple[Any, str, Path, int], renames: tuple[tuple[str, str], ...]) -> None:
        """Adds a tensor under its new name; a second tensor of that name must be equal to the first."""
        name = renamed(place[1], renames)
        if name not in self.names:
            self.names[name] = place
            return
        again = f"{name} again"
        self.names[again] = place
        if not self.equal(name, again):
            (_, first, path, _), (_, second, other, _) = self.names[name], place
            if first == second:
                raise AntgmmError(f"{other}: tensor {second} is also in {path.name}, and they differ: remove one")
            both = " and ".join(sorted((first, second)))
            raise AntgmmError(f"{other}: {both} are one tensor under two names, and they differ: remove one")
        del self.names[again]

    def spec(self, name: str) -> Spec:
        """Returns the shape and dtype, from the header.

        Raises:
            AntgmmError: it has no floating-point numbers of at least 16 bits, such as those of a quantized checkpoint.
        """
        handle, stored, path, _ = self.names[name]
        lazy = handle.get_slice(stored)
        if lazy.get_dtype() not in _DTYPES:
            raise AntgmmError(
                f"{path}: tensor {stored} is {lazy.get_dtype()}: convert the checkpoint to {', '.join(_DTYPES)}"
            )
        return Spec(tuple(lazy.get_shape()), _DTYPES[lazy.get_dtype()])

    def read(self, name: str, part: int = 0, parts: int = 1) -> np.ndarray:
        """Reads the values, or part `part` of `parts` equal parts along the first axis.

        Raises:
            AntgmmError: the file cannot be read, or the values contain NaN or infinity.
        """
        rows = self.spec(name).shape[0] // parts
        values = self._rows(name, part * rows, (part + 1) * rows)
        if not _finite(values):
            raise AntgmmError(f"tensor {name} contains NaN or infinity: the checkpoint is damaged, use another")
        self._on_read(values.nbytes)
        return values

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are equal; reading stops after the first difference."""
        spec = self.spec(name)
        if spec != self.spec(other):
            return False
        count, *_ = spec.shape or (1,)
        rows = max(1, _BLOCK * count // max(1, spec.nbytes))
        pieces = ((start, min(start + rows, count)) for start in range(0, count, rows))
        return all(np.array_equal(self._rows(name, *piece), self._rows(other, *piece)) for piece in pieces)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows of a tensor."""
        spec, (_, stored, path, first) = self.spec(name), self.names[name]
        values = np.empty((stop - start, *spec.shape[1:]), spec.dtype)  # [1] for a scalar
        try:
            with path.open("rb") as file:
                file.seek(first + start * math.prod(spec.shape[1:]) * spec.dtype.itemsize)
                read = file.readinto(values.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise AntgmmError(f"{path}: tensor {stored} cannot be read ({error}): copy the file again") from error
        if read != values.nbytes:
            raise AntgmmError(f"{path}: tensor {stored} cannot be read (the file is truncated): copy the file again")
        return values


def _starts(path: Path) -> dict[str, int]:
    """Returns the byte offset of each tensor in a file with a valid header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        fields = json.loads(file.read(length))
    return {name: 8 + length + field["data_offsets"][0] for name, field in fields.items() if name != "__metadata__"}


def _finite(values: np.ndarray) -> bool:
    if values.dtype not in _HALVES:
        return bool(np.isfinite(values).all())
    # Comparing bits is many times faster: for each sign, the bits of NaN and infinity as integers are larger than those
    # of all finite numbers.
    infinity, sign = int(np.array(np.inf, values.dtype).view(np.uint16)), 1 << 15
    largest, most_negative = values.view(np.int16).max(initial=0), values.view(np.uint16).max(initial=0)
    return bool(largest < infinity and most_negative < sign + infinity)


def write(
    specs: Mapping[str, Spec], tensors: Iterable[tuple[str, np.ndarray]], directory: Path, max_shard_size: str
) -> None:
    """Writes tensors one at a time, in any order, so that only one is in memory.

    Args:
        specs: name -> shape and dtype of every tensor.
        tensors: names with contiguous values.
        directory: folder to write to.
        max_shard_size: maximum size of a file, such as "5GB"; larger checkpoints are split into shards with an index.

    Raises:
        OSError: the disk is full.
    """
    split = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.nbytes,
        get_storage_id=lambda spec: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    places: dict[str, int] = {}
    for file, names in split.filename_to_tensors.items():
        header, offsets = _header({name: specs[name] for name in names})
        (directory / file).write_bytes(header)
        places |= offsets
    for name, tensor in tensors:
        if Spec(tensor.shape, tensor.dtype) != specs[name]:
            raise AssertionError(f"tensor {name} is {tensor.dtype}{tensor.shape}, not {specs[name]} as in specs")
        with (directory / split.tensor_to_filename[name]).open("r+b") as file:
            file.seek(places[name])
            file.write(tensor.reshape(-1).view(np.uint8).data)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """Returns a file's header and the offset of each tensor (https://huggingface.co/docs/safetensors: Format).

    The safetensors library needs all tensors at once. As there, tensors are ordered so that each is aligned to its
    dtype.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        # Only for the format's name of the dtype; data_ptr is not used.
        code = TensorSpec(dtype=spec.dtype.name, shape=spec.shape, data_ptr=0, data_len=spec.nbytes).dtype
        fields[name] = {"dtype": code, "shape": spec.shape, "data_offsets": (end, end + spec.nbytes)}
        end += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + fields[name]["data_offsets"][0] for name in specs}
