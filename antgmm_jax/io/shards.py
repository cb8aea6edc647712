"""Numbered rows of bytes in ArrayRecord files: every process writes its own files, a reader opens all of them.

The last record of a file lists the numbers of its rows (int64). Writes are atomic: a file has a hidden name until it is
closed.
"""

import os
from array import array
from pathlib import Path
from threading import Lock

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular
from antgmm_jax.io.folders import Unwritten

SUFFIX = ".array_record"
# States hardly compress, and decompression would slow down every step.
_WRITE = "group_size:{group},uncompressed"
_READ = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 1 << 15


class Writer:
    """Writes the rows of one process.

    Args:
        directory: existing folder; other processes may write to it too.
        process: number of this process; its earlier files are kept.
        group: rows that are stored and read together. A reader keeps about 50 bytes of index per group in memory, so
            small rows are worth grouping.
    """

    def __init__(self, directory: Path, process: int, group: int = 1):
        self._directory, self._prefix = directory, f"{process:05d}-"
        self._options = _WRITE.format(group=group)
        self._rows = array("q")

    def add(self, row: int, record: bytes) -> None:
        """Appends a row; it becomes visible with the next `flush`.

        Raises:
            Unwritten: the disk is full.
        """
        if not self._rows:
            number = len([*self._directory.glob(f"{self._prefix}*{SUFFIX}")])
            self._path = self._directory / f"{self._prefix}{number:05d}{SUFFIX}"
            self._temporary = self._path.with_name(f".{self._path.name}.tmp")
            try:
                self._writer = ArrayRecordWriter(str(self._temporary), self._options)
            except RuntimeError as error:
                raise self._write_error(error) from error
        self._write(record)
        self._rows.append(row)

    def flush(self) -> None:
        """Closes the current file and gives it its final name; does nothing without new rows.

        Raises:
            Unwritten: as in `add`.
        """
        if not self._rows:
            return
        self._write(self._rows.tobytes())
        try:
            self._writer.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._temporary.rename(self._path)
        except (OSError, RuntimeError) as error:
            raise self._write_error(error) from error
        self._rows = array("q")

    def _write(self, record: bytes) -> None:
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: Exception) -> Unwritten:
        reason = str(error).splitlines()[0].partition(";")[0]  # the rest names the temporary file
        return Unwritten(f"cannot write {self._path}: {reason}; free space and run it again")


class Shards:
    """Reads the rows of all files in a folder; thread-safe.

    Args:
        directory: folder with the files.
        samples: rows are numbered 0 .. samples - 1.
        whole: folder that has to be removed if a file is damaged or a row is missing; None where rows may be missing.

    Raises:
        AntgmmError: a file is damaged, or a row is missing.
    """

    def __init__(self, directory: Path, samples: int, whole: Path | None = None):
        self._paths, self._remove = sorted(directory.glob(f"*{SUFFIX}")), whole or directory
        for path in self._paths:
            check_regular(path)
        self._readers = [ArrayRecordReader(str(path), _READ, file_reader_buffer_size=_BUFFER) for path in self._paths]
        self._lock = Lock()
        self._file, self._place = np.full(samples, -1, np.int32), np.zeros(samples, np.int32)
        for file, reader in enumerate(self._readers):
            if not reader.num_records():  # also if the end of the file is missing
                raise self._damaged(file)
            numbers = self._read(file, reader.num_records() - 1)
            if len(numbers) != 8 * (reader.num_records() - 1):
                raise self._damaged(file)
            rows = np.frombuffer(numbers, np.int64)
            if rows.min(initial=0) < 0 or rows.max(initial=-1) >= samples:
                raise self._damaged(file)
            self._file[rows], self._place[rows] = file, np.arange(len(rows))
        if whole is not None and not self.held.all():
            raise AntgmmError(f"{directory} is damaged, a file is missing: remove {whole} and run it again")

    @property
    def held(self) -> np.ndarray:
        """Mask of the rows that exist: bool [samples]."""
        return self._file >= 0

    def __getitem__(self, row: int) -> bytes:
        """Returns the bytes of a row that exists (`held`). Raises AntgmmError if the file is damaged."""
        file = int(self._file[row])
        if file < 0:
            raise IndexError(f"no row {row}")
        return self._read(file, int(self._place[row]))

    def _read(self, file: int, place: int) -> bytes:
        reader = self._readers[file]
        try:
            with self._lock:
                # Takes less than half the time of read([place]), which uses a thread pool.
                reader.seek(place)
                return reader.read()
        except (IndexError, RuntimeError) as error:
            raise self._damaged(file) from error

    def _damaged(self, file: int) -> AntgmmError:
        return AntgmmError(f"{self._paths[file]} is damaged: remove {self._remove} and run it again")
