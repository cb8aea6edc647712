"""Random access to samples of WebDataset shards; only the offsets of files are in memory."""

import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.hub import SUFFIXES
from data.chat_rows import TURNS
from data.files import decode_image, files_digest
from data.kept import kept
from data.limits import BadRow, check_sample, quoted, short
from data.rows import ALIASES

_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
_WITHOUT = {*ALIASES["image"], *TURNS, "completion", "system", "history"}
"""Fields of a sample that may have no pictures."""
_PICTURES = tuple(f".{suffix}" for suffix in SUFFIXES)


class _Members(NamedTuple):
    """Members of the archives, grouped by sample.

    Attributes:
        file: archive of each sample, [N].
        first: first member of each sample, [N + 1].
        header: offset in bytes of each member's header in its archive.
    """

    file: np.ndarray
    first: np.ndarray
    header: np.ndarray


class TarRows:
    """Rows of tar archives with adjacent files `KEY.jpg` (or `KEY.0.jpg`, `KEY.1.jpg`, ...) and `KEY.json`.

    Args:
        files: at least one uncompressed archive.

    Raises:
        AntgmmError: a file is not such an archive.
    """

    def __init__(self, files: Sequence[Path]):
        self.files, self.folder = files, files[0].parent
        self._members = _Members(**kept("members of tar files", files, lambda: _scan(files)._asdict()))

    def __len__(self) -> int:
        return len(self._members.file)

    def __getitem__(self, number: int) -> Any:
        try:
            with self._archive(number) as archive:
                return self._read(archive, number)
        except _DAMAGE as error:
            return _damaged(error)

    def __iter__(self) -> Iterator[Any]:
        # Opening an archive takes longer than reading a sample.
        for file in range(len(self.files)):
            numbers = np.flatnonzero(self._members.file == file).tolist()
            if numbers:
                with self._archive(numbers[0]) as archive:
                    yield from (self._read(archive, number) for number in numbers)

    def _read(self, archive: tarfile.TarFile, number: int) -> Any:
        try:
            return _sample(_files_of(archive, self._headers(number)))
        except BadRow as reason:
            return reason
        except _DAMAGE as error:
            return _damaged(error)

    def place(self, number: int) -> str:
        """Describes the position of a sample for messages."""
        with self._archive(number) as archive:
            key = _key(_member(archive, self._headers(number)[0]).name)
        return f"{self.files[self._members.file[number]].name} {key}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """Decodes an image of a sample. Raises BadRow if it cannot be decoded."""
        if isinstance(name, str):
            raise BadRow(f"image {quoted(name)} is a path: a shard must contain its images")
        return decode_image(name)

    def digest(self) -> str:
        """Returns a digest of the archives' names, sizes and times."""
        return files_digest(self.files)

    def named(self) -> list[str]:
        """Returns no image paths: a shard contains its images."""
        return []

    def _archive(self, number: int) -> tarfile.TarFile:
        return tarfile.open(self.files[self._members.file[number]], "r:")

    def _headers(self, number: int) -> list[int]:
        first, last = self._members.first[number : number + 2]
        return self._members.header[first:last].tolist()


def _damaged(error: Exception) -> BadRow:
    return BadRow(f"cannot be read from its archive: {' '.join(str(error).split())[:200]}")


def _files_of(archive: tarfile.TarFile, headers: Sequence[int]) -> dict[str, bytes]:
    """Contents of the files of a sample, by suffix. Raises BadRow if they are too large, or a suffix is repeated."""
    members = [_member(archive, header) for header in headers]
    check_sample(member.size for member in members)
    parts = {}
    for member in members:
        suffix = f".{PurePosixPath(member.name).name.partition('.')[2].lower()}"
        if suffix in parts:
            raise BadRow(f"has two files {quoted(suffix)}: remove one")
        stream = archive.extractfile(member)
        parts[suffix] = stream.read() if stream else b""
    return parts


def _member(archive: tarfile.TarFile, header: int) -> tarfile.TarInfo:
    assert archive.fileobj is not None  # opened by path
    archive.fileobj.seek(header)
    archive.offset = header
    return tarfile.TarInfo.fromtarfile(archive)


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0]))


def _scan(files: Sequence[Path]) -> _Members:
    """Groups adjacent members with names that agree up to the first dot."""
    file, first, header = array("q"), array("q"), array("q")
    for number, path in enumerate(files):
        key = None
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    # Else tarfile keeps all members in memory.
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    name = PurePosixPath(member.name).name
                    if member.issym() or member.islnk():
                        raise AntgmmError(f"{path}: {short(member.name)} is a link: write the file itself")
                    if not member.isfile() or name.startswith("."):  # metadata files of macOS
                        continue
                    if _key(member.name) != key:
                        key = _key(member.name)
                        file.append(number)
                        first.append(len(header))
                    header.append(member.offset)
        except _DAMAGE as error:
            reason = " ".join(str(error).split())[:200]
            raise AntgmmError(f"{path} is not a readable tar file (an uncompressed one): {reason}") from error
    first.append(len(header))
    return _Members(*(np.array(column, np.int64) for column in (file, first, header)))


def _sample(parts: dict[str, bytes]) -> Any:
    pictures = [suffix for suffix in parts if suffix.lower().endswith(_PICTURES)]
    if ".json" not in parts:
        return BadRow(f"needs an image and a .json, has {short(', '.join(sorted(parts)))}")
    try:
        fields = json.loads(parts[".json"])
    except (ValueError, RecursionError) as error:
        return BadRow(f".json is not JSON: {error}")
    if not isinstance(fields, dict) or (not pictures and _WITHOUT & {*fields}):
        return fields
    if not pictures:
        return BadRow(f"needs an image and a .json, has {short(', '.join(sorted(parts)))}")
    infixes = [suffix.rpartition(".")[0] for suffix in pictures]
    if "" in infixes and (other := [infix for infix in infixes if infix and not re.search(r"\d", infix)]):
        return BadRow(
            f"has a picture {quoted(other[0])} beside its own, such as a mask: leave it out, or number the pictures of"
            " the row (KEY.0.png, KEY.1.png)"
        )
    # The fields may name the pictures too.
    others = {name: value for name, value in fields.items() if name not in ALIASES["image"]}
    return {**others, "image": [parts[suffix] for suffix in sorted(pictures, key=_by_number)]}


def _by_number(suffix: str) -> list[tuple[int, str]]:
    """Sorting key that puts `2.jpg` before `10.jpg`, `page2.jpg` before `page10.jpg`, and a bare `jpg` first."""
    parts = re.findall(r"\d+|[^\d.]+", suffix)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
