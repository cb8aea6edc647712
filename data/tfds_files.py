"""Opening of prepared TFDS folders without TensorFlow, after checking what TFDS would trust."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular, one_line, read_json
from data.limits import quoted

MOST_SHARDS = 10_000
_OWN = "tensorflow_datasets."
"""Start of the names of classes that TFDS may import."""
_FOREIGN = "is not a prepared TFDS folder: specify the folder with dataset_info.json"
_TEMPLATE = re.compile(r"([\w.-]|\{(DATASET|SPLIT|FILEFORMAT|SHARD_X_OF_Y|SHARD_INDEX|NUM_SHARDS)\})*", re.ASCII)
"""Names of files in dataset_info.json, which TFDS formats with Python's `str.format`."""


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves images as the bytes of their files, also those of a sequence."""

    def decode_batch_example_np(self, example: np.ndarray) -> np.ndarray:
        """Returns the bytes of a sequence of images."""
        return example


def _check_files(folder: Path) -> None:
    """Checks what TFDS would trust: files, names of files and of classes, and numbers of shards.

    Raises:
        AntgmmError: a pipe, which TFDS would read for ever; a file or a name outside the folder; a class that is not of
            TFDS; or more shards than any data set has.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            check_regular(path)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise AntgmmError(f"{path} is a link out of the folder: replace it with the file")
    about, features = folder / "dataset_info.json", folder / "features.json"
    for content in _objects(read_json(features)) if features.exists() else ():
        name = str(content.get("pythonClassName", _OWN))
        if not name.startswith(_OWN):
            raise AntgmmError(f"{features} names a class {quoted(name)} that is not of TFDS: correct it")
        if paths := [name for name in content if "/" in name or "\\" in name]:
            # TFDS reads files with the names of features.
            raise AntgmmError(f"{features} names a feature {quoted(paths[0])}: rename it")
    if not about.exists():
        raise AntgmmError(f"{folder} {_FOREIGN}")
    for split in read_json(about).get("splits", []):
        template, shards = split.get("filepathTemplate") or "", len(split.get("shardLengths", []))
        if not _TEMPLATE.fullmatch(template):
            raise AntgmmError(f"{about} names files {quoted(template)}: write names within the folder")
        if shards > MOST_SHARDS:
            raise AntgmmError(f"{about} has {shards} shards, at most {MOST_SHARDS} are supported: join them")


def _check_records(split: Any) -> None:
    """Raises AntgmmError if the files of a split hold other numbers of records than TFDS takes them to hold."""
    for path, expected in zip(split.filepaths, split.shard_lengths, strict=True):
        actual = ArrayRecordReader(str(path)).num_records()  # 0 if it is absent or its end is missing
        if actual != expected:
            raise AntgmmError(f"{path} has {actual} records, but {expected} are noted: prepare the data set again")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Objects at any depth."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def open_split(folder: str | Path, split: str, *, encoded: Sequence[str] = ()) -> Sequence[dict]:
    """Opens a split of a prepared TFDS folder (array_record files) without TensorFlow.

    Args:
        folder: folder with `dataset_info.json`.
        split: name of the split.
        encoded: names of images that stay the bytes of their files.

    Returns:
        Random access to dicts with `image` uint8 [H, W, 3], texts as bytes, and `latents`.

    Raises:
        AntgmmError: the folder is not such a folder, is damaged, or has no such split.
    """
    try:
        _check_files(Path(folder))
        builder = tfds.builder_from_directory(folder)
    except AntgmmError:
        raise
    except Exception as error:  # tfds raises various exceptions for other folders
        raise AntgmmError(f"{folder} {_FOREIGN}") from error
    if split not in builder.info.splits:
        raise AntgmmError(f"{folder} has no split {split!r}: choose one of {', '.join(builder.info.splits)}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise AntgmmError(f"{folder} is stored as {builder.info.file_format}: prepare it with array_record")
    features: Any = builder.info.features or ()
    skipped = {name: _Encoded() for name in encoded if name in features}
    with one_line(lambda: f"{folder} cannot be read", "prepare it again"):
        _check_records(builder.info.splits[split])
        return builder.as_data_source(split, decoders=skipped)  # pyright: ignore[reportCallIssue] - hidden by a decorator
