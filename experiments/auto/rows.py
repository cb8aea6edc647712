"""Data tables of recipes from `--data` and `--test`, with held-out rows if there is only one file."""

from pathlib import Path
from typing import Any

from antgmm_jax.errors import AntgmmError
from data.readers import read_records

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
"""Suffix of a file -> kind of data."""


def kind_of(path: Path) -> str:
    """Returns the kind of data of a file, or of the files in a folder.

    Raises:
        AntgmmError: the files are of no known kind.
    """
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    for suffix, kind in KINDS.items():
        if any(file.suffix == suffix for file in inside):
            return kind
    raise AntgmmError(f"--data {path}: name a file that ends in {', '.join(KINDS)}, or a folder of one kind of them")


def tables(data: str, test: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the data tables for training and for the scores.

    Args:
        data: file or folder of rows to train on.
        test: file or folder of other rows; "" to hold out a tenth of `data`.

    Returns:
        Both tables, without numbers of samples.

    Raises:
        AntgmmError: the files are of no known kind.
    """
    trained = {"kind": kind_of(Path(data)), "path": data}
    if test:
        return trained, {"kind": kind_of(Path(test)), "path": test}
    return {**trained, "split": "train"}, {**trained, "split": "test"}


def counted(table: dict[str, Any]) -> dict[str, Any]:
    """Returns a data table with the number of its records.

    Args:
        table: data table without `samples`.

    Raises:
        AntgmmError: the file does not exist, has invalid rows, or no rows.
    """
    source = read_records(table["kind"], table["path"], split=table.get("split", ""))
    source.check({})
    return {**table, "samples": len(source)}
