"""Prepared data: encoded records in a folder of their own, for those who train on the same rows often."""

import math
from pathlib import Path
from typing import Any

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.books import read_book
from antgmm_jax.io.folders import claimed, writing
from antgmm_jax.io.hub import is_remote
from antgmm_jax.io.shards import Shards
from data.building import build, row_of
from data.encoding import Encoder, versions
from data.record import Record
from data.rows import Row
from data.source import Source
from data.store import THREADS, Encoded, Shown, unshown

ABOUT = "prepared.json"
_FORMAT = 3


class PreparedSource(Source):
    """Records of a prepared folder, without their images.

    Args:
        path: folder from `prepare`.
        samples: number of its records; 0 for any.

    Raises:
        AntgmmError: the folder is not from `prepare`, is incomplete, has another number of records, or is on the Hub or
            in a store.
    """

    def __init__(self, path: Path, samples: int = 0):
        self.path, self._folder, self._about = path, path, _read(path)
        if wrong := [n for n, size in self._about["files"].items() if _size(path / n) != size]:
            raise AntgmmError(f"{path} is damaged: {wrong[0]} is missing or has another size; prepare it again")
        if samples and samples != len(self):
            raise AntgmmError(f"{path} has {len(self)} records, but samples = {samples}: set samples = {len(self)}")
        self._words = Shards(path / "words", len(self), path)

    def __len__(self) -> int:
        return self._about["records"]

    def words(self, index: int) -> Row:
        """Returns a record without its images."""
        return row_of(self._words[index])

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AntgmmError(f"{self.path} holds encoded rows without their images: specify the files of the rows")

    def digest(self) -> str:
        """Returns a digest of the records from which the folder was made."""
        return self._about["data"]

    def origin(self) -> tuple[str, str]:
        """Returns that of the records from which the folder was made."""
        digest, split = self._about["origin"]
        return digest, split

    def contents(self) -> list[str]:
        """Returns those of the records from which the folder was made."""
        return self._about["contents"]

    def other_versions(self) -> str:
        """Names libraries with which the records were encoded and that have another version here; "" for none."""
        now = versions()
        other = {name: each for name, each in self._about["versions"].items() if now.get(name) != each}
        return ", ".join(f"{name} {each} (here {now.get(name, 'none')})" for name, each in other.items())

    def encoded(self, encoder: Encoder) -> Path:
        """Returns the folder with the encoded records.

        Raises:
            AntgmmError: they were encoded with another processor or other settings.
        """
        if self._about["encoder"] != encoder.digest():
            other = {name: value for name, value in self._about["settings"].items() if encoder.settings[name] != value}
            name, value = next(iter(other.items()), ("processor", ""))
            reason = f"{name} = {value!r}, not {encoder.settings[name]!r}" if other else "another processor"
            raise AntgmmError(f"{self.path} was prepared with {reason}: prepare the rows again")
        return self._folder


def prepare(source: Source, encoder: Encoder, folder: Path, *, shown: Shown = unshown) -> Encoded:
    """Encodes records into a folder; an interrupted call resumes.

    Does nothing if the folder holds these records, encoded by this encoder.

    Args:
        source: records.
        encoder: encoder of the records.
        folder: the folder.
        shown: see `data.store.open_encoded`.

    Returns:
        The encoded records.

    Raises:
        AntgmmError: lists all bad records; or the disk is full, the folder has other contents, or another process
            is writing it.
    """
    digests = {"data": source.digest(), "encoder": encoder.digest()}
    if not folder.exists():
        title = f"preparing {source.path or 'records'}"
        with writing(folder), claimed(folder), shown(title, len(source)) as progress:
            about = {"format": _FORMAT, **digests, "origin": [*source.origin()], "contents": source.contents()}
            about |= {"settings": encoder.settings, "versions": versions()}
            build(source, encoder, folder, progress, most=math.inf, threads=THREADS, about=about)
    elif {name: _read(folder)[name] for name in digests} != digests:
        raise AntgmmError(f"{folder} holds other rows or was made with other settings: choose another folder")
    prepared = PreparedSource(folder)
    return Encoded(prepared, encoder, prepared.encoded(encoder))


def _read(path: Path) -> dict[str, Any]:
    if is_remote(path):
        raise AntgmmError(f"{path}: prepared data is read from a disk alone: copy the folder to one, and name it there")
    try:
        about = read_book(path / ABOUT)
    except AntgmmError:
        raise AntgmmError(f"{path} is not prepared data: specify a folder of `antgmm data prepare`") from None
    if about["format"] != _FORMAT:
        raise AntgmmError(f"{path} was prepared by another version: prepare the rows again")
    return about


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
