"""Pictures in another folder than the file of rows, as LLaVA-Instruct and ms-swift have them."""

import json

import numpy as np
import pytest
from PIL import Image

from antgmm_jax.errors import AntgmmError
from data.building import read_all
from data.copies import copied
from data.json_rows import JsonRows
from data.parquet_rows import ParquetRows
from data.readers import path_and_images, read_records
from experiments.auto.rows import tables
from experiments.commands.sources import records
from experiments.run.rows.datasets import load_records
from experiments.run.schema.tables import FileData


@pytest.fixture
def folder(tmp_path):
    """`rows/train.jsonl` and `rows/train.parquet` name pictures of `coco`, one by its absolute path."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for place in ("rows", "coco/train"):
        (tmp_path / place).mkdir(parents=True)
    for number in range(2):
        Image.fromarray(np.full((4, 4, 3), 50 + number, np.uint8)).save(tmp_path / "coco" / "train" / f"{number}.png")
    names = ["train/0.png", str(tmp_path / "coco" / "train" / "1.png")]
    rows = [{"image": name, "question": "is it red?", "answer": f"red {n}"} for n, name in enumerate(names)]
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows" / "train.parquet")
    return tmp_path


def shades(source):
    return [int(record.images[0][0, 0, 0]) for record in source]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_image_paths_are_relative_to_the_folder_of_the_images(folder, kind):
    path, images = folder / "rows" / f"train.{kind}", str(folder / "coco")
    assert shades(read_records(kind, path, images=images)) == [50, 51]
    assert shades(load_records(FileData(kind=kind, path=str(path), images=images, samples=2))) == [50, 51]
    assert shades(records(f"{kind}:{path}:images={images}", 0)) == shades(records(f"{kind}:{path}:images={images}", 2))
    trained, scored = tables(f"{path}:images={images}", "")
    assert trained["images"] == scored["images"] == images and trained["kind"] == kind
    assert "images" not in tables(str(path), "")[0]


def test_a_changed_picture_changes_the_digest(folder):
    source = read_records("jsonl", folder / "rows" / "train.jsonl", images=str(folder / "coco"))
    before = source.digest()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "coco" / "train" / "0.png")
    assert source.digest() != before


def test_paths_that_leave_the_folder_are_refused_with_what_to_name(folder):
    rows = folder / "rows" / "train.jsonl"

    def refused(images):
        with pytest.raises(AntgmmError) as caught:
            [*read_all(read_records("jsonl", rows, images=images), lambda record: None, lambda *_: None)]
        return str(caught.value)

    assert "leaves the data folder: name the folder of all images with images" in refused("")
    (folder / "coco" / "test").mkdir()
    assert "leaves the data folder" in refused(str(folder / "coco" / "test"))
    assert refused(str(folder / "none")) == f"images {folder / 'none'} is no folder"
    with pytest.raises(AntgmmError, match="has no effect: rows of kind webdataset hold their images"):
        read_records("webdataset", rows, images=str(folder))


def test_rows_without_any_of_their_images_say_what_to_name(folder):
    rows = folder / "rows" / "other.jsonl"
    rows.write_text(
        "".join(json.dumps({"image": f"train/{n}.png", "question": "?", "answer": "b"}) + "\n" for n in range(20))
    )
    remedy = f"their images are not in {folder / 'rows'}, name another folder with images\n"
    for split in ("", "train"):
        with pytest.raises(AntgmmError, match=f"rows are invalid; {remedy}"):
            [*read_all(read_records("jsonl", rows, split=split), lambda record: None, lambda *_: None)]


def test_rows_that_are_invalid_for_other_reasons_do_not_ask_for_a_folder(folder):
    rows = folder / "rows" / "other.jsonl"
    rows.write_text('{"question": "?"}\n' * 2)
    with pytest.raises(AntgmmError, match="2 of 2 rows are invalid; correct or remove them\n"):
        [*read_all(read_records("jsonl", rows), lambda record: None, lambda *_: None)]


def test_equal_files_with_other_images_are_no_copies(folder):
    rows = folder / "rows" / "train.jsonl"
    copy = folder / "rows" / "copy.jsonl"
    copy.write_bytes(rows.read_bytes())
    one, other = folder / "coco", folder / "rows"
    assert copied(JsonRows(rows, one), JsonRows(copy, one))
    assert not copied(JsonRows(rows, one), JsonRows(copy, other))
    assert ParquetRows([folder / "rows" / "train.parquet"]).folder == other


def test_a_path_without_images_stays_whole():
    assert path_and_images("a:b.jsonl") == ("a:b.jsonl", "")
    assert path_and_images("a.jsonl:images=c:d") == ("a.jsonl", "c:d")
