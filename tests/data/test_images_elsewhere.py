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
from tests.data.test_chat_rows import saved_to_disk


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


def pq_write(folder, tables):
    from pyarrow import parquet

    parquet.write_table(tables[0], folder / "0.parquet")


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


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["image", "images", "messages"])
def test_paths_that_stand_beside_bytes_are_watched(folder, kind, column):
    """As Hugging Face datasets stores images: the bytes are null where files are named."""
    pa = pytest.importorskip("pyarrow")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    part = pa.struct([("type", pa.string()), ("image", image), ("text", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    given, answer = {"bytes": None, "path": "train/0.png"}, {"type": "text", "text": "red"}
    values = {
        "image": (image, given),
        "images": (pa.list_(image), [given]),
        "messages": (
            pa.list_(turn),
            [
                {"role": "user", "content": [{"type": "image", "image": given}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": [answer]},
            ],
        ),
    }
    table = pa.table(
        {
            column: pa.array([values[column][1]], values[column][0]),
            **({} if column == "messages" else {"question": ["what?"], "answer": ["red"]}),
        }
    )
    where = folder / "rows" / kind
    where.mkdir()
    (pq_write if kind == "parquet" else saved_to_disk)(where, [table])
    source = read_records(kind, where, images=str(folder / "coco"))
    before = source.digest()
    assert shades(source) == [50]
    Image.fromarray(np.full((9, 9, 3), 90, np.uint8)).save(folder / "coco" / "train" / "0.png")
    after = read_records(kind, where, images=str(folder / "coco"))
    assert after.digest() != before and shades(after) == [90]


def test_copies_of_rows_with_the_bytes_of_their_images_are_noticed_elsewhere(folder):
    """`push_to_hub` leaves a path beside the bytes, which names no file."""
    pa = pytest.importorskip("pyarrow")
    content = (folder / "coco" / "train" / "0.png").read_bytes()
    table = pa.Table.from_pylist([{"image": {"bytes": content, "path": "0.png"}, "question": "what?", "answer": "red"}])
    sources = []
    for name in ("here", "there"):
        (folder / name).mkdir()
        pq_write(folder / name, [table])
        sources.append(read_records("parquet", folder / name))
    assert sources[0].overlaps(sources[1])


def test_backslashes_between_folders_say_what_to_write(folder):
    rows = folder / "rows" / "train.jsonl"
    rows.write_text(json.dumps({"image": "train\\0.png", "question": "what?", "answer": "red"}) + "\n")
    with pytest.raises(AntgmmError, match="rows are invalid; correct") as caught:
        [*read_all(read_records("jsonl", rows, images=str(folder / "coco")), lambda record: record)]
    assert r"image path 'train\\0.png' separates folders by \: write / instead" in str(caught.value)
    (folder / "coco" / "train\\0.png").write_bytes((folder / "coco" / "train" / "0.png").read_bytes())  # a name here
    assert shades(read_records("jsonl", rows, images=str(folder / "coco"))) == [50]
