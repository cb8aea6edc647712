"""Random access to rows of JSONL files and JSON arrays; only the offsets of rows are in memory."""

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.files import decode_image, images_digest, inside
from data.kept import Columns, from_bytes, kept, to_bytes
from data.limits import BadRow
from data.rows import image_names

_CHUNK = 1 << 20
_BLANK = " \t\n\r"


class _Bounds(NamedTuple):
    """Positions of rows in their file.

    Attributes:
        starts: offset in bytes of each row, int64 [N].
        ends: offset after each row, int64 [N].
        numbers: line or element number from 1, int64 [N].
    """

    starts: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray


class JsonRows:
    """Rows of a JSONL file or of a JSON array.

    Args:
        path: the file.
        images: folder that image paths are relative to and may not leave; None for that of the file.

    Raises:
        AntgmmError: the file is not UTF-8, or not a JSON array.
    """

    def __init__(self, path: Path, images: Path | None = None):
        self.files: Sequence[Path] = (path,)
        self.folder = images or path.parent
        self.path, self._word = path, "row" if _is_array(path) else "line"
        scanned = kept("positions of JSON rows", self.files, lambda: _scan(path))
        self._digest, self._bounds = str(scanned.pop("digest")), _Bounds(**scanned)

    def __len__(self) -> int:
        return len(self._bounds.starts)

    def __getitem__(self, number: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._bounds.starts[number])
            line = file.read(int(self._bounds.ends[number] - self._bounds.starts[number]))
        return _parsed(line)

    def __iter__(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            for start, end in zip(self._bounds.starts, self._bounds.ends, strict=True):
                if file.tell() != start:
                    file.seek(start)
                yield _parsed(file.read(end - start))

    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        return f"{self._word} {self._bounds.numbers[number]}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """Reads an image of a row. Raises BadRow if it is missing or cannot be decoded."""
        return decode_image(name if isinstance(name, bytes) else inside(self.folder, name))

    def digest(self) -> str:
        """Returns a digest of the file's content, and of size and time of all image files."""
        return images_digest(self._digest, self.folder, self.named())

    def named(self) -> list[str]:
        """Returns the image paths in all rows."""
        names = kept("images of JSON rows", self.files, lambda: {"names": to_bytes(self._image_names())})["names"]
        return from_bytes(names)

    def _image_names(self) -> Iterator[str]:
        return (name for raw in self for name in image_names(raw))


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(f"is not JSON: {error}")


def _scan(path: Path) -> Columns:
    """Digest of a file and the positions of its rows."""
    digest = _text_digest(path)
    bounds = _elements(path) if _is_array(path) else _lines(path)
    return {"digest": np.array(digest), **bounds._asdict()}


def _is_array(path: Path) -> bool:
    """Whether a .json file is read as an array: `datasets` writes an object on each line into one."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        first = file.readline(_CHUNK).removeprefix(codecs.BOM_UTF8).strip()
        if first[:1] == b"{" and len(first) > _CHUNK // 2:  # a long line, as with pictures in it
            file.seek(0)
            first = file.readline().removeprefix(codecs.BOM_UTF8).strip()
        more = any(line.strip() for line in iter(lambda: file.readline(_CHUNK), b"")) if first[:1] == b"{" else False
    return not (more and isinstance(_parsed(first), dict))


def _text_digest(path: Path) -> str:
    """Digest of a text file; raises AntgmmError unless it is UTF-8."""
    digest, decoder, done = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise _not_text(path, done - waiting + error.start) from error
            done += len(chunk)
    if left := len(decoder.getstate()[0]):
        raise _not_text(path, done - left)
    return digest.hexdigest()


def _not_text(path: Path, byte: int) -> AntgmmError:
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return AntgmmError(f"{path} is compressed: gunzip it")
    return AntgmmError(f"{path} is not UTF-8 text (byte {byte}): save it as UTF-8")


def _lines(path: Path) -> _Bounds:
    """Positions of the lines that are not blank."""
    columns, at = (array("q"), array("q"), array("q")), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            written = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            at += len(line)
            start = at - len(written)
            if written.strip(b" \t\n\r\v\f"):
                for column, value in zip(columns, (start, at, number), strict=True):
                    column.append(value)
    return _Bounds(*(np.frombuffer(column, np.int64) if column else np.zeros(0, np.int64) for column in columns))


class _Scanner:
    """Scans a JSON file in chunks. It decodes Latin-1, so that characters are bytes; JSON's syntax is ASCII."""

    def __init__(self, file):
        self._file, self.text, self.at, self._before = file, "", 0, 0

    @property
    def place(self) -> int:
        """Offset in bytes of the next character."""
        return self._before + self.at

    def more(self) -> bool:
        """Reads the next chunk and drops what was scanned. Returns whether there was more."""
        fresh = self._file.read(max(_CHUNK, len(self.text) - self.at)).decode("latin-1")
        self.text, self._before, self.at = self.text[self.at :] + fresh, self._before + self.at, 0
        return bool(fresh)

    def sign(self) -> str:
        """Returns the next character that is not blank, without consuming it; "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _BLANK:
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self) -> None:
        """Skips one JSON value. Raises ValueError if there is none."""
        while True:
            try:
                end = _DECODER.raw_decode(self.text, self.at)[1]
            except ValueError:
                if not self.more():
                    raise
                continue
            # A number may continue in the next chunk.
            if end < len(self.text) or not self.more():
                self.at += end - self.at
                return


_DECODER = json.JSONDecoder()


def _elements(path: Path) -> _Bounds:
    """Positions of the elements of a JSON array."""
    starts, ends = array("q"), array("q")
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        scanner, base = _Scanner(file), file.tell()
        if scanner.sign() != "[":
            raise _no_array(path)
        scanner.at += 1
        try:
            while scanner.sign() != "]":
                if starts:
                    if scanner.sign() != ",":
                        raise ValueError
                    scanner.at += 1
                    scanner.sign()
                starts.append(base + scanner.place)
                scanner.value()
                ends.append(base + scanner.place)
            scanner.at += 1
            if scanner.sign():
                raise ValueError
        except (ValueError, RecursionError):
            raise _no_array(path) from None
    count = len(starts)
    bounds = (np.array(starts, np.int64), np.array(ends, np.int64), np.arange(1, count + 1, dtype=np.int64))
    return _Bounds(*bounds)


def _no_array(path: Path) -> AntgmmError:
    """Error for a file that is not a JSON array; parses the whole file to report the line."""
    try:
        json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return AntgmmError(f"{path} is not JSON: {error}")
    return AntgmmError(f"{path} is not a JSON array of rows: write an array, or one object per line as .jsonl")
