"""Rows of WebDataset shards."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from antgmm_jax.errors import AntgmmError
from data.readers import read_records
from tests.data.own_files import picture, png, read


def test_webdataset_shards(tmp_path):
    members = {
        "x/a.png": png(picture(0)),
        "x/a.json": json.dumps({"question": "q", "answer": "a"}).encode(),
        "x/b.json": b"{}",
        "x/._a.png": b"left by macOS",
    }
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(AntgmmError, match=r"1 of 2 rows.*\n0\.tar x/b: needs an image and a \.json, has \.json"):
        read("webdataset", tmp_path)
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("x/._a.png", "x/a.png", "x/a.json"):
            info = tarfile.TarInfo(name)
            info.size = len(members[name])
            archive.addfile(info, io.BytesIO(members[name]))
    (record,) = read("webdataset", tmp_path)
    np.testing.assert_array_equal(record.images[0], picture(0))


def test_samples_without_pictures(tmp_path):
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    rows = [
        {"image": None, "question": "2+2?", "answer": "4"},
        {"image": [], "question": "2+2?", "answer": "4"},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"system": "Be brief.", "question": "2+2?", "answer": "4"},
    ]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, row in enumerate(rows):
            content = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    records = [*read("webdataset", tmp_path)]
    assert [record.answer for record in records] == ["4", "4", "assistant", "4"]
    assert not any(record.images for record in records)
    assert [turn.role for turn in records[3].turns] == ["system", "user"]


def test_webdataset_pictures_in_any_form_and_no_links(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).save(buffer, "TIFF")
    members = {"a.0.PNG": png(picture(0)), "a.1.tiff": buffer.getvalue(), "a.json": b'{"question": "q", "answer": "a"}'}

    def write(link=""):
        with tarfile.open(tmp_path / "0.tar", "w") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            if link:
                info = tarfile.TarInfo(link)
                info.type, info.linkname = tarfile.SYMTYPE, "a.0.PNG"
                archive.addfile(info)

    write()
    (record,) = read("webdataset", tmp_path)
    for number, image in enumerate(record.images):
        np.testing.assert_array_equal(image, picture(number))
    assert len(record.images) == 2
    write(link="a.2.png")
    with pytest.raises(AntgmmError, match=r"0\.tar: a\.2\.png is a link: write the file itself"):
        read("webdataset", tmp_path)


def test_samples_of_shards_are_read_by_offset(tmp_path):
    long = "d" * 120
    shards = {
        "0.tar": {f"{long}/a.0.png": png(picture(0)), f"{long}/a.1.jpg.png": png(picture(1)), f"{long}/a.json": None},
        "1.tar": {
            "b.json": b'{"question": "q", "answer": "none", "images": []}',
            "c.png": png(picture(1)),
            "c.json": None,
        },
    }
    shards["1.tar"]["c.json"] = None
    for name, members in shards.items():
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, content in members.items():
                content = content or json.dumps({"question": "q", "answer": member[0]}).encode()
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    records = read_records("webdataset", tmp_path)
    assert len(records) == 3
    expected = [(f"0.tar {long}/a", "d", 2), ("1.tar b", "none", 0), ("1.tar c", "c", 1)]
    for number in (2, 0, 1):
        record = records[number]
        assert (record.id, record.answer, len(record.images)) == expected[number]
    np.testing.assert_array_equal(records[0].images[1], picture(1))
    np.testing.assert_array_equal(records[2].images[0], picture(1))


def test_pictures_of_a_sample_are_in_the_order_of_the_numbers_in_their_names(tmp_path):
    names = ["a.jpg", "a.page2.png", "a.page10.png", "a.2.jpg", "a.10.jpg"]
    row = json.dumps({"question": "which page?", "answer": "none"}).encode()
    files = {name: png(picture(number)) for number, name in enumerate(names)} | {"a.json": row}
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))
    (record,) = read("webdataset", tmp_path)
    for number, image in enumerate(record.images):
        np.testing.assert_array_equal(image, picture(number))
    assert len(record.images) == len(names)


def test_a_mask_beside_a_picture_is_refused(tmp_path):
    row = json.dumps({"question": "what?", "answer": "red"}).encode()
    files = {"a.jpg": png(picture(0)), "a.seg.png": png(picture(1)), "a.json": row}
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(AntgmmError, match="1 of 1 rows are invalid") as caught:
        read("webdataset", tmp_path)
    assert "has a picture '.seg' beside its own, such as a mask: leave it out" in str(caught.value)
