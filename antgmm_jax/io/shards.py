"""Numbered rows of bytes in ArrayRecord files: every process appends to files of its own, a reader opens them all.

The last record of a file lists the numbers of the rows before it (int64), so that a file tells by itself what it holds.
A file is written under a hidden name and renamed when it is closed: its rows are all there, or none of them.
"""

import os
from array import array
from pathlib import Path
from threading import Lock

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from antgmm_jax.errors import AntgmmError

SUFFIX = ".array_record"
# States hardly compress, and padding is not worth the time to unpack it at every step.
_WRITE = "group_size:{group},uncompressed"
_READ = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 1 << 15


class Writer:
    """Rows of one process.

    Args:
        directory: an existing folder, which other processes may write to as well.
        process: number of this process; what it wrote there before is kept.
        group: rows that are read from disk together. A reader holds about 50 bytes of index for each group, so small
            rows are worth grouping.
    """

    def __init__(self, directory: Path, process: int, group: int = 1):
        self._directory, self._prefix = directory, f"{process:05d}-"
        self._options = _WRITE.format(group=group)
        self._rows = array("q")

    def add(self, row: int, record: bytes) -> None:
        """Appends a row; it counts from the next `flush` on.

        Raises:
            AntgmmError: it cannot be written (a full disk).
        """
        if not self._rows:
            number = len([*self._directory.glob(f"{self._prefix}*{SUFFIX}")])
            self._path = self._directory / f"{self._prefix}{number:05d}{SUFFIX}"
            self._temporary = self._path.with_name(f".{self._path.name}.tmp")
            self._writer = ArrayRecordWriter(str(self._temporary), self._options)
        self._write(record)
        self._rows.append(row)

    def flush(self) -> None:
        """Closes the file at hand and puts it on disk under its name; nothing happens without new rows.

        Raises:
            AntgmmError: as `add`.
        """
        if not self._rows:
            return
        self._write(np.array(self._rows, np.int64).tobytes())
        try:
            self._writer.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._temporary.rename(self._path)
        except (OSError, RuntimeError) as error:
            raise self._refused(error) from error
        self._rows = array("q")

    def _write(self, record: bytes) -> None:
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> AntgmmError:
        return AntgmmError(f"cannot write {self._path}: {str(error).splitlines()[0]}; free space and run it again")


class Shards:
    """All rows in a folder; several threads may read them.

    Args:
        directory: the folder.
        samples: rows are numbered 0 .. samples - 1.

    Raises:
        AntgmmError: a file is damaged.
    """

    def __init__(self, directory: Path, samples: int):
        self._paths = sorted(directory.glob(f"*{SUFFIX}"))
        self._readers = [ArrayRecordReader(str(path), _READ, file_reader_buffer_size=_BUFFER) for path in self._paths]
        self._lock = Lock()
        self._file, self._place = np.full(samples, -1, np.int32), np.zeros(samples, np.int32)
        for file, reader in enumerate(self._readers):
            if not reader.num_records():  # also where the file's end is missing
                raise self._damaged(file)
            numbers = np.frombuffer(self._read(file, reader.num_records() - 1), np.int64)
            self._file[numbers], self._place[numbers] = file, np.arange(len(numbers))

    @property
    def held(self) -> np.ndarray:
        """Which rows there are: bool [samples]."""
        return self._file >= 0

    def __getitem__(self, row: int) -> bytes:
        """The row's bytes; it must be held. Raises AntgmmError where they are damaged."""
        return self._read(self._file[row], int(self._place[row]))

    def _read(self, file: int, place: int) -> bytes:
        reader = self._readers[file]
        try:
            with self._lock:
                # Less than half the time of read([place]), which goes through a pool of threads.
                reader.seek(place)
                return reader.read()
        except (IndexError, RuntimeError) as error:
            raise self._damaged(file) from error

    def _damaged(self, file: int) -> AntgmmError:
        path = self._paths[file]
        return AntgmmError(f"{path} is damaged: delete {path.parent} and build it again")
