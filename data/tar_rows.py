"""Samples of WebDataset shards by number: where their files stand in the archives is all that is held in memory."""

import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.parquet_rows import files_digest
from data.rows import BadRow, decode_image

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class _Members(NamedTuple):
    """Files of samples, one sample's after another's.

    Attributes:
        file: archive of each sample, [N].
        first: number of each sample's first member, [N + 1].
        header: bytes before each member's header in its archive.
    """

    file: np.ndarray
    first: np.ndarray
    header: np.ndarray


class TarRows:
    """Tar archives of neighbouring files `KEY.jpg` (or several, `KEY.0.jpg`, `KEY.1.jpg`) and `KEY.json`.

    Args:
        files: at least one, not compressed.

    Raises:
        AntgmmError: a file is no such archive.
    """

    def __init__(self, files: Sequence[Path]):
        self._files, self._members = files, _scan(files)

    def __len__(self) -> int:
        return len(self._members.file)

    def __getitem__(self, number: int) -> Any:
        with self._archive(number) as archive:
            parts = {}
            for header in self._headers(number):
                info = _member(archive, header)
                name = PurePosixPath(info.name).name
                stream = archive.extractfile(info)
                parts[f".{name.partition('.')[2].lower()}"] = stream.read() if stream else b""
        return _sample(parts)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> str:
        """Where a sample stands, for people."""
        with self._archive(number) as archive:
            key = _key(_member(archive, self._headers(number)[0]).name)
        return f"{self._files[self._members.file[number]].name} {key}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """A picture of a sample. Raises BadRow where it is none."""
        if isinstance(name, str):
            raise BadRow(f"image {name!r} is a path: a shard holds its pictures itself")
        return decode_image(name)

    def digest(self) -> str:
        """A digest of the archives' names, sizes and times."""
        return files_digest(self._files)

    def _archive(self, number: int) -> tarfile.TarFile:
        return tarfile.open(self._files[self._members.file[number]], "r:")

    def _headers(self, number: int) -> list[int]:
        first, last = self._members.first[number : number + 2]
        return self._members.header[first:last].tolist()


def _member(archive: tarfile.TarFile, header: int) -> tarfile.TarInfo:
    assert archive.fileobj is not None  # opened by path
    archive.fileobj.seek(header)
    archive.offset = header
    return tarfile.TarInfo.fromtarfile(archive)


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0]))


def _scan(files: Sequence[Path]) -> _Members:
    """Samples are neighbouring members with names that agree up to the first dot."""
    file, first, header = array("q"), array("q"), array("q")
    for number, path in enumerate(files):
        key = None
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    # Kept by tarfile, they would fill the memory.
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    name = PurePosixPath(member.name).name
                    if not member.isfile() or name.startswith("."):  # what macOS puts beside each file
                        continue
                    if _key(member.name) != key:
                        key = _key(member.name)
                        file.append(number)
                        first.append(len(header))
                    header.append(member.offset)
        except (tarfile.TarError, OSError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise AntgmmError(f"{path} is not a readable tar file (an uncompressed one): {reason}") from error
    first.append(len(header))
    return _Members(*(np.array(column, np.int64) for column in (file, first, header)))


def _sample(parts: dict[str, bytes]) -> Any:
    pictures = [suffix for suffix in parts if suffix.endswith(_PICTURES)]
    if ".json" not in parts:
        return BadRow(f"needs one picture and a .json, has {', '.join(sorted(parts))}")
    try:
        fields = json.loads(parts[".json"])
    except ValueError as error:
        return BadRow(f".json is not JSON: {error}")
    if not isinstance(fields, dict) or (not pictures and fields.get("images") == []):
        return fields
    if not pictures:
        return BadRow(f"needs one picture and a .json, has {', '.join(sorted(parts))}")
    return {**fields, "image": [parts[suffix] for suffix in sorted(pictures)]}
