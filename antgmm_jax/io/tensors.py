"""The safetensors files of a checkpoint, read and written one tensor at a time."""

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

# safetensors parses and checks headers, huggingface_hub decides on shards; values are read and written here. Ten
# bfloat16 tensors of 100 MB, safetensors 0.8.0, page cache warm (2026-11-28, AMD EPYC, 2 cores, three runs each):
# * read: 0.11 to 0.17 s and no mapped memory, `safe_open` 0.45 to 0.79 s and 954 MB of the process mapped to the file.
# * write: 0.7 to 3.9 s and 190 MB at most, `save_file` 3.1 to 5.8 s and 954 MB, as it takes all tensors at once.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK = 1 << 22  # bytes of two tensors that are compared at a time
_HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint.

    Raises:
        AntgmmError: it is missing, no JSON, or no object.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise AntgmmError(f"{path} is missing: a Hugging Face checkpoint directory holds it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AntgmmError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise AntgmmError(f"{path} holds a {type(found).__name__}, not an object with named fields: copy it again")
    return found


def _shards(index: Path) -> list[str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise AntgmmError(f"{index} has no weight_map from tensors to files: copy it again")
    return sorted(set(files.values()))


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors:
    """Tensors of one or more safetensors files by our spelling of their names; only the headers are read at once.

    Args:
        directory: holds model.safetensors, or shards with their index.
        renames: patterns of names and what stands for them in ours.
        on_read: is told the bytes of each piece of data that is read.

    Raises:
        AntgmmError: no such file, one outside the directory, or a damaged one.
    """

    def __init__(
        self, directory: Path, renames: tuple[tuple[str, str], ...], on_read: Callable[[int], None] = lambda _: None
    ):
        if (directory / INDEX).exists():
            files = _shards(directory / INDEX)
        elif (directory / WEIGHTS).exists():
            files = [WEIGHTS]
        else:
            raise AntgmmError(
                f"{directory} has no {WEIGHTS}: save it with safe_serialization (pickled weights are not read)"
            )
        self._on_read = on_read
        self.names: dict[str, tuple[Any, str, Path, int]] = {}
        for file in files:
            path = directory / file
            # The name alone: in a Hub's cache the file is a link to a blob elsewhere.
            if Path(file).name != file:
                raise AntgmmError(
                    f"{directory / INDEX} names {file!r}, which is outside the checkpoint: mend the index"
                )
            try:
                handle = safe_open(path, framework="numpy")
                starts = _starts(path)
            except (SafetensorError, OSError) as error:
                raise AntgmmError(
                    f"{path} cannot be read ({error}): the file is damaged or cut short, copy it again"
                ) from error
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                ours = name
                for pattern, new in renames:
                    ours = re.sub(pattern, new, ours)
                self.names[ours] = (handle, name, path, starts[name])

    def spec(self, name: str) -> Spec:
        """Shape and dtype, from the header."""
        handle, own, _, _ = self.names[name]
        lazy = handle.get_slice(own)
        return Spec(tuple(lazy.get_shape()), lazy[0:0].dtype)

    def read(self, name: str, part: int = 0, parts: int = 1) -> np.ndarray:
        """The values, or those of one of several equal parts along the first axis.

        Raises:
            AntgmmError: the file cannot be read, or holds a NaN or infinity there.
        """
        rows = self.spec(name).shape[0] // parts
        values = self._rows(name, part * rows, (part + 1) * rows)
        if not _finite(values):
            raise AntgmmError(f"tensor {name} holds a NaN or infinity: the checkpoint is damaged, use another")
        self._on_read(values.nbytes)
        return values

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values; nothing is read after the first difference."""
        spec = self.spec(name)
        if spec != self.spec(other):
            return False
        rows = max(1, _BLOCK * spec.shape[0] // max(1, spec.nbytes))
        pieces = ((start, min(start + rows, spec.shape[0])) for start in range(0, spec.shape[0], rows))
        return all(np.array_equal(self._rows(name, *piece), self._rows(other, *piece)) for piece in pieces)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor by a plain read."""
        spec, (_, own, path, first) = self.spec(name), self.names[name]
        values = np.empty((stop - start, *spec.shape[1:]), spec.dtype)
        try:
            with path.open("rb") as file:
                file.seek(first + start * (spec.nbytes // max(1, spec.shape[0])))
                read = file.readinto(values.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise AntgmmError(f"{path}: tensor {own} cannot be read ({error}): copy the file again") from error
        if read != values.nbytes:
            raise AntgmmError(f"{path}: tensor {own} cannot be read (the file is cut short): copy the file again")
        return values


def _starts(path: Path) -> dict[str, int]:
    """Where each tensor begins in a file that the library has found sound."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        fields = json.loads(file.read(length))
    return {name: 8 + length + field["data_offsets"][0] for name, field in fields.items() if name != "__metadata__"}


def _finite(values: np.ndarray) -> bool:
    if values.dtype not in _HALVES:
        return bool(np.isfinite(values).all())
    # By their bits, which is many times faster: they are at least infinity's, as those of the largest positive and of
    # the largest negative number are not.
    infinity, sign = int(np.array(np.inf, values.dtype).view(np.uint16)), 1 << 15
    largest, most_negative = values.view(np.int16).max(initial=0), values.view(np.uint16).max(initial=0)
    return bool(largest < infinity and most_negative < sign + infinity)


def write(
    specs: Mapping[str, Spec], tensors: Iterable[tuple[str, np.ndarray]], directory: Path, max_shard_size: str
) -> None:
    """Writes each tensor to its place as it comes; no more than one is held.

    Args:
        specs: name -> shape and dtype, of every tensor that comes.
        tensors: names and values, each of them contiguous.
        directory: where to.
        max_shard_size: above it the tensors are split over shards with an index, such as "5GB".

    Raises:
        OSError: a full disk.
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
            raise AssertionError(f"tensor {name} is {tensor.dtype}{tensor.shape}, not {specs[name]} as announced")
        with (directory / split.tensor_to_filename[name]).open("r+b") as file:
            file.seek(places[name])
            file.write(tensor.reshape(-1).view(np.uint8).data)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """A file's head, and where each tensor begins (https://huggingface.co/docs/safetensors: Format).

    The library would want all tensors at once; the order is the library's, in which each is aligned to its dtype.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        # data_ptr is not followed; the library knows how the format spells a dtype.
        code = TensorSpec(dtype=spec.dtype.name, shape=spec.shape, data_ptr=0, data_len=spec.nbytes).dtype
        fields[name] = {"dtype": code, "shape": spec.shape, "data_offsets": (end, end + spec.nbytes)}
        end += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + fields[name]["data_offsets"][0] for name in specs}
