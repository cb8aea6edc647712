"""Data tables of recipes from `--data` and `--test`, with held-out rows if there is only one file."""

from os.path import realpath
from pathlib import Path
from typing import Any

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.hub import is_remote, local
from data.files import SPLITS
from data.readers import path_and_images, read_records

KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".json": "jsonl"}
"""Suffix of a file -> kind of data. JSON files come last, as other kinds have some beside their rows."""


def kind_of(path: str, option: str) -> str:
    """Returns the kind of data of a file, or of the files in a folder.

    Args:
        path: file or folder; one of the Hub or of an object store is downloaded.
        option: option that names it, for errors.

    Raises:
        AntgmmError: it does not exist, or the files are of no known kind.
    """
    if (suffix := Path(path).suffix) in KINDS:
        return KINDS[suffix]
    remote = is_remote(path)
    if not remote and not Path(path).exists():
        raise AntgmmError(f"{option} {path} does not exist")
    if (Path(path) / SPLITS).exists():  # which lists splits, and is no rows
        return "arrow"
    for suffix, kind in KINDS.items():
        folder = local(path, kind) if remote else Path(path)
        if folder.is_dir() and any(file.suffix == suffix for file in folder.iterdir()):
            return kind
    raise AntgmmError(f"{option} {path}: name a file that ends in {', '.join(KINDS)}, or a folder of one kind of them")


def parted(text: str, option: str) -> dict[str, Any]:
    """Returns `kind`, `path` and maybe `images` of rows.

    Args:
        text: PATH, PATH:images=DIR, or one of these behind KIND:, the form of commands that read more kinds.
        option: option that names it, for errors.

    Raises:
        AntgmmError: as in `kind_of`.
    """
    path, images = path_and_images(text)
    kind, colon, rest = path.partition(":")
    if not colon or kind not in KINDS.values():
        kind, rest = kind_of(path, option), path
    return {"kind": kind, "path": rest} | ({"images": images} if images else {})


def tables(data: str, test: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the data tables for training and for the scores.

    Args:
        data: file or folder of rows to train on.
        test: file or folder of other rows; "" to hold out a tenth of `data`.

    Returns:
        Both tables, without numbers of samples. Rows for the scores are from all over the file, which may be sorted.

    Raises:
        AntgmmError: one does not exist, the files are of no known kind, or both are the same.
    """
    trained = parted(data, "--data")
    if not test:
        return {**trained, "split": "train"}, {**trained, "split": "test", "take": "spread"}
    other = parted(test, "--test")
    if realpath(trained["path"]) == realpath(other["path"]):
        raise AntgmmError(f"--test {test} has the rows of --data: name other rows, or leave it out to hold out a tenth")
    # A recipe's second table inherits what it does not state; pictures of --test are not those of --data.
    beside = {"images": ""} if "images" in trained else {}
    return trained, {**beside, **other, "take": "spread"}


def counted(table: dict[str, Any]) -> dict[str, Any]:
    """Returns a data table with the number of its records.

    Args:
        table: data table without `samples`.

    Raises:
        AntgmmError: the file does not exist, has invalid rows, or no rows.
    """
    source = read_records(table["kind"], table["path"], images=table.get("images", ""), split=table.get("split", ""))
    source.check({})
    return {**table, "samples": len(source)}
