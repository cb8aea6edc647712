"""Readers of a user's files: accepted forms, refused rows and their error messages."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from data import json_rows
from data.building import read_all
from data.files import decode_image
from data.limits import BadRow
from data.maad.tiers import TIERS, products
from data.readers import read_records
from data.record import Turn, prompt
from data.writers import (
    CAPTION,
    OTHERS,
    write_captions,
    write_chat,
    write_dialogues,
    write_jsonl,
    write_maad,
    write_parquet,
)


def read(kind, path, **about):
    """All records of files; bad rows are refused together."""
    return [record for _, record in read_all(read_records(kind, path, **about), lambda record: record)]


def picture(seed=0, size=(7, 5)):
    return np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="png")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures."""
    (tmp_path / "images").mkdir()
    for k in range(2):
        (tmp_path / "images" / f"{k}.png").write_bytes(png(picture(k)))
    return tmp_path


def lines(folder, *rows):
    file = folder / "train.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def good(k=0, **more):
    return {"image": f"images/{k}.png", "question": "what?", "answer": f"thing {k}", **more}


def test_jsonl_rows_become_records(folder):
    file = lines(folder, good(0, text=" beside ", type="t", id=7, extra=[1]), "", good(1))
    for path in (file, folder):
        records = read("jsonl", path)
        assert len(records) == 2
        first = records[0]
        assert (first.question, first.answer, first.text) == ("what?", "thing 0", "beside")
        assert (first.type, first.id) == ("t", "7")
        np.testing.assert_array_equal(first.images[0], picture(0))
        np.testing.assert_array_equal(records[1].images[0], picture(1))
    assert records[1].id == "line 3"


def test_alternative_column_names_are_read(folder):
    row = {"file_name": "images/0.png", "prompt": "q", "response": "a", "context": "c", "question_id": "x"}
    (record,) = read("jsonl", lines(folder, row))
    assert (record.question, record.answer, record.text, record.id) == ("q", "a", "c", "x")


def test_every_bad_row_is_listed_with_its_reason(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    outside.write_bytes(png(picture()))
    (folder / "link.png").symlink_to(outside)
    (folder / "broken.png").write_bytes(png(picture())[:40])
    (folder / "text.png").write_text("no picture")
    file = lines(
        folder,
        good(0, id="a"),
        {**good(), "image": "images/none.png"},
        {**good(), "image": "broken.png"},
        {**good(), "image": "text.png"},
        {**good(), "image": "../" * 12 + str(outside)},
        {**good(), "image": str(outside)},
        {**good(), "image": "link.png"},
        {**good(), "image": 3},
        {"question": "q", "answer": "a"},
        {**good(), "question": "  "},
        {**good(), "answer": ""},
        {"image": "images/0.png", "question": "q"},
        {**good(), "answer": 5},
        good(1, id="a"),
        "{not json",
        "[1]",
        {**good(), "caption": "two answers"},
        {**good(), "conversations": [{"from": "human", "value": "q"}]},
        {**good(), "conversations": [{"from": "gpt", "value": "q"}, {"from": "gpt", "value": "q"}]},
        {**good(), "image": "images"},
        {**good(), "image": "a\0b.png"},
    )
    with pytest.raises(AntgmmError) as caught:
        read("jsonl", file)
    head, *listed = str(caught.value).split("\n")
    assert "20 of 21 rows are invalid" in head
    reasons = dict(line.split(": ", 1) for line in listed)
    expected = {
        2: "image none.png is missing",
        3: "image broken.png cannot be decoded",
        4: "image text.png cannot be decoded",
        5: "leaves the data folder",
        6: "leaves the data folder",
        7: "leaves the data folder",
        8: "image is a int, not a path",
        9: "has no image",
        10: "question is empty",
        11: "answer is empty",
        12: "has no answer",
        13: "answer is a int, not text",
        14: "id 'a' is also that of line 1",
        15: "is not JSON",
        16: "is a list, not an object",
        17: "'answer' and 'caption' both contain the answer",
        18: "conversations end with a turn of the user: the answer (assistant) is missing",
        19: "conversations[0] is an answer (assistant) that does not follow a question",
        20: "image images is a folder",
        21: "is not a path",
    }
    assert reasons.keys() == {f"line {n}" for n in expected}
    for number, reason in expected.items():
        assert reason in reasons[f"line {number}"]


def test_most_limits_the_rows_that_are_read(folder):
    """Rows beyond the limit are not checked; a conversation is one record."""
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}] * 2
    talk = {"image": good()["image"], "conversations": turns}
    file = lines(folder, {**talk, "id": "x"}, {**talk, "id": "y"}, {"image": "none.png"})
    assert [r.id for r in read("jsonl", file, most=1)] == ["x (line 1)"]
    assert [r.id for r in read("jsonl", file, most=2)] == ["x (line 1)", "y (line 2)"]
    for most in (0, 3):
        with pytest.raises(AntgmmError, match="1 of 3 rows are invalid"):
            read("jsonl", file, most=most)


def test_unusual_pictures_become_rgb(folder):
    grey, flat = Image.fromarray(picture()[..., 0]), Image.new("P", (4, 3))
    flat.putpalette([10, 20, 30] * 256)
    grey.save(folder / "grey.png")
    flat.save(folder / "palette.png", transparency=bytes([0, 255]))
    turned = Image.fromarray(picture())
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated camera: rows become columns
    turned.save(folder / "turned.jpg", exif=exif)
    rows = [{**good(), "image": name} for name in ("grey.png", "palette.png", "turned.jpg")]
    records = read("jsonl", lines(folder, *rows))
    np.testing.assert_array_equal(records[0].images[0], np.repeat(picture()[..., :1], 3, axis=-1))
    assert (records[1].images[0] == [10, 20, 30]).all()
    assert records[2].images[0].shape == (7, 5, 3)


GREY = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("turned", [False, True])
def test_grey_values_of_16_bits_become_8_bits(kind, turned):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3 if turned else 1  # upside down
    about = {"exif": exif} if kind in ("PNG", "TIFF") else {}
    Image.fromarray(GREY).save(stream, kind, **about)
    expected = (GREY // 256)[::-1, ::-1] if turned and about else GREY // 256
    image = decode_image(stream.getvalue())
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=-1))


def test_grey_values_of_other_byte_orders_and_ranges_become_8_bits():
    # Tags of a TIFF: number, kind 3 (16 bits), count 1, value.
    def tiff(order, bits, content):
        tags = {256: 64, 257: 48, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 48, 279: len(content)}
        listed = b"".join(struct.pack(f"{order}HHIHH", number, 3, 1, value, 0) for number, value in tags.items())
        head = struct.pack(f"{order}2sHI", b"MM" if order == ">" else b"II", 42, 8 + len(content))
        return head + content + struct.pack(f"{order}H", len(tags)) + listed + bytes(4)

    upper = np.repeat((GREY // 256)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode_image(tiff(">", 16, GREY.astype(">u2").tobytes())), upper)
    pairs = (GREY >> 4).reshape(-1, 2).astype(int) @ [1 << 12, 1]  # two values of 12 bits in three bytes
    packed = b"".join(int(pair).to_bytes(3, "big") for pair in pairs)
    np.testing.assert_array_equal(decode_image(tiff("<", 12, packed)), upper)
    thousand = GREY.astype(int) * 1000 // 65535
    image = decode_image(b"P5 64 48 1000\n" + thousand.astype(">u2").tobytes())
    assert np.abs(image[..., 0].astype(int) - GREY // 256).max() <= 1


@pytest.mark.parametrize(("number", "kind", "mode"), [(np.int32, "TIFF", "I"), (np.float32, "TIFF", "F")])
def test_pixels_of_32_bits_are_refused(number, kind, mode):
    stream = io.BytesIO()
    Image.fromarray(GREY.astype(number)).save(stream, kind)
    with pytest.raises(BadRow, match=rf"pixels of 32 bits \(mode {mode}\): convert it to 8 bits a channel"):
        decode_image(stream.getvalue())


def test_damaged_tags_of_a_picture_print_nothing(folder):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    before = png(picture())
    after_header = 33
    exif = chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\3\xff\xff\xff\xff\0\0\0\0" * 9)
    (folder / "a.png").write_bytes(before[:after_header] + exif + before[after_header:])
    # In a process of its own: in tests, warnings are errors.
    lines = [
        "from pathlib import Path",
        "from data.files import decode_image",
        "print(decode_image(Path('a.png')).shape)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(5, 7, 3)\n", "")


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("jsonl", "a.jsonl", b"", "has no rows"),
        ("jsonl", "a.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("jsonl", "a.json", b"{}", "not a JSON array"),
        ("jsonl", "a.json", b"[", "is not JSON"),
        ("parquet", "a.parquet", b"PAR1nothing", "not a readable Parquet file"),
        ("webdataset", "a.tar", b"nothing", "not a readable tar file"),
        ("csv", "a.csv", b"", "unknown kind of data 'csv'"),
    ],
)
def test_invalid_files_are_refused(tmp_path, kind, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AntgmmError, match=message):
        read(kind, tmp_path / name)


def test_folders_without_or_with_too_many_files_are_refused(tmp_path):
    with pytest.raises(AntgmmError, match="does not exist"):
        read("jsonl", tmp_path / "none")
    with pytest.raises(AntgmmError, match=r"contains no \.parquet file"):
        read("parquet", tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("{}")
    with pytest.raises(AntgmmError, match=r"a\.jsonl, b\.jsonl: specify one"):
        read("jsonl", tmp_path)


def test_a_pattern_selects_files(tmp_path):
    for name, rows in (("train-0", range(2)), ("train-1", range(2, 5)), ("test-0", range(1))):
        write_parquet([maad.source("s", "val", 5)[row] for row in rows], tmp_path / f"{name}.parquet")
    assert [len(read("parquet", tmp_path / name)) for name in ("train-*.parquet", "train-1*")] == [5, 3]
    with pytest.raises(AntgmmError, match=r"none-\*\.parquet matches no \.parquet file"):
        read("parquet", tmp_path / "none-*.parquet")


def test_parquet_round_trip(tmp_path):
    source, seen = maad.source("s", "val", 700), []
    write_parquet(source, tmp_path / "val.parquet", progress=lambda *step: seen.append(step))
    records = read("parquet", tmp_path)
    assert seen == [("val.parquet", 512, 700), ("val.parquet", 700, 700)]
    assert len(records) == 700
    for row in (0, 511, 512, 699):
        before, after = source[row], records[row]
        np.testing.assert_array_equal(after.images[0], before.images[0])
        for name in ("question", "answer", "text", "type", "id", "slice"):
            assert getattr(after, name) == getattr(before, name)
        assert after.latents == before.latents
    described = json.loads(pq.read_schema(tmp_path / "val.parquet").metadata[b"huggingface"])
    assert described["info"]["features"]["image"] == {"_type": "Image"}


def test_jsonl_round_trip(tmp_path):
    source, seen = maad.source("s", "val", 3), []
    write_jsonl(source, tmp_path / "val.jsonl", progress=lambda *step: seen.append(step))
    assert seen == [("val.jsonl", row, 3) for row in (1, 2, 3)]
    for before, after in zip(source, read("jsonl", tmp_path), strict=True):
        np.testing.assert_array_equal(after.images[0], before.images[0])
        for name in ("question", "answer", "text", "type", "id", "slice"):
            assert getattr(after, name) == getattr(before, name)
    (tmp_path / "images" / "a-000000.png").mkdir(parents=True)
    with pytest.raises(AntgmmError, match=r"cannot write .*a-000000\.png"):
        write_jsonl(source, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
    with pytest.raises(AntgmmError, match="no records to write"):
        write_jsonl([], tmp_path / "b.jsonl")


def test_conversations_are_written_with_two_pictures_each(tmp_path):
    source = maad.source("s", "val", 3)
    write_chat(source, tmp_path / "val.jsonl")
    assert len([*(tmp_path / "images").iterdir()]) == 3
    records = read("jsonl", tmp_path)
    for row, record in enumerate(records):
        first, second = source[row], source[(row + 1) % 3]
        questions = [Turn("user", (None, prompt(each.question, each.text))) for each in (first, second)]
        assert record.turns == (questions[0], Turn("assistant", (first.answer,)), questions[1])
        assert (record.answer, record.type) == (second.answer, second.type)
        for image, each in zip(record.images, (first, second), strict=True):
            np.testing.assert_array_equal(image, each.images[0])


def test_dialogues_ask_further_questions_about_the_same_advertisement(tmp_path):
    source = maad.source("s", "val", 2)
    write_dialogues(source, tmp_path / "val.jsonl")
    for row, record in enumerate(read("jsonl", tmp_path)):
        own, answers = source[row], [turn.text for turn in record.turns if turn.role == "assistant"] + [record.answer]
        assert len(record.images) == 1
        assert record.turns[0] == Turn("user", (None, prompt(own.question, own.text)))
        assert (len(answers), answers[0]) == (1 + OTHERS, own.answer)
        # Evidence of the picture is the same in all answers.
        product = products(TIERS["s"])[own.latents["product"]].name
        by_question = {turn.text: answer for turn, answer in zip(record.turns[::2], answers, strict=True)}
        assert len(by_question) == 1 + OTHERS
        for question, answer in by_question.items():
            assert "what product is pictured?" not in question or answer == product


def test_captions_say_what_the_answers_say(tmp_path):
    source = maad.source("s", "val", 12)
    write_captions(source, tmp_path / "val.jsonl")
    records = [*read("jsonl", tmp_path)]
    own = {source[row].type: (source[row].answer, records[row].answer) for row in range(12)}
    for kind, mark in (("category", "{}"), ("price", " {} "), ("brand", " {} badge "), ("contact", " contact {} ")):
        answer, caption = own[kind]
        assert mark.format(answer) in caption
    assert {record.question for record in records} == {CAPTION}


def test_parquet_with_paths_and_plain_bytes(folder):
    for name, value in (("path", "images/1.png"), ("bytes", png(picture(1)))):
        file = folder / f"{name}.parquet"
        pq.write_table(pa.table({"image": [value], "question": ["q"], "caption": ["a"], "other": [1]}), file)
        (record,) = read("parquet", file)
        np.testing.assert_array_equal(record.images[0], picture(1))
    bad = folder / "bad.parquet"
    pq.write_table(pa.table({"image": [value] * 2, "question": ["q", ""], "caption": ["a"] * 2}), bad)
    with pytest.raises(AntgmmError, match=r"bad\.parquet row 2: question is empty"):
        read("parquet", bad)


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


def test_a_failed_write_leaves_nothing(tmp_path):
    def full(*step):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.parquet").write_text("before")
    with pytest.raises(AntgmmError, match=r"cannot write .*a\.parquet: No space left on device; free disk space"):
        write_parquet(maad.source("s", "val", 5), tmp_path / "a.parquet", progress=full)
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]
    assert (tmp_path / "a.parquet").read_text() == "before"
    with pytest.raises(AntgmmError, match="no records to write"):
        write_parquet([], tmp_path / "b.parquet")


def test_maad_is_written_with_a_description(tmp_path):
    sizes = {"train": 24, "test_hard": 12}
    info = write_maad("s", tmp_path, sizes=sizes, seed=3)
    assert info == json.loads((tmp_path / "maad.json").read_text())
    assert info["sizes"] == sizes
    assert info["fingerprints"]["train"] == maad.fingerprint(maad.source("s", "train", 24, seed=3))
    assert len(read("parquet", tmp_path / "test_hard.parquet")) == 12
    write_maad("s", tmp_path, sizes={"train": 12})  # the files of an earlier call


def test_maad_does_not_replace_files_of_others(tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(AntgmmError, match=r"train\.jsonl exists and is not of MAAD-synth: choose another folder"):
        write_maad("s", tmp_path, sizes={"train": 12}, form="jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_row_has_several_pictures_or_none(folder):
    rows = [good(), {**good(), "image": ["images/1.png", "images/0.png"]}, {**good(), "image": []}]
    rows.append({"images": ["images/1.png"], "question": "q", "answer": "a"})
    records = read("jsonl", lines(folder, *rows))
    expected = [(0,), (1, 0), (), (1,)]
    for record, pictures in zip(records, expected, strict=True):
        assert len(record.images) == len(pictures)
        for image, number in zip(record.images, pictures, strict=True):
            np.testing.assert_array_equal(image, picture(number))
    table = pa.table({"images": [[png(picture(0)), png(picture(1))], []], "question": ["q"] * 2, "answer": ["a"] * 2})
    pq.write_table(table, folder / "many.parquet")
    first, second = read("parquet", folder / "many.parquet")
    np.testing.assert_array_equal(first.images[1], picture(1))
    assert second.images == ()
    with pytest.raises(AntgmmError, match="line 1: image is a int, not a path"):
        read("jsonl", lines(folder, {**good(), "image": ["images/0.png", 3]}))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_elements_of_a_json_array_are_read_by_offset(folder, monkeypatch, chunk):
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    rows = [good(0, text='öl ]}, [" \u00e9'), good(1, extra={"a": [1, {"b": "]"}]}), good(0, id=12345), good(1, id="ü")]
    file = folder / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False), "\ufeff" + json.dumps(rows) + " \n"):
        file.write_text(text, encoding="utf-8")
        source = read_records("jsonl", file)
        assert len(source) == 4
        for number in (3, 0, 2, 1):
            row = source.words(number)
            assert row.answer == rows[number]["answer"] and row.text == rows[number].get("text", "")
            assert row.id == str(rows[number].get("id", f"row {number + 1}"))
    for text, message in (
        ("[]", "has no rows"),
        ("[1, 2", "is not JSON"),
        ("[1] 2", "is not JSON"),
        ("[1 2]", "is not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(AntgmmError, match=message):
            read("jsonl", file)


def test_any_line_ending_is_read(folder):
    text = "\ufeff" + json.dumps(good(0)) + "\r\n\r\n  \n" + json.dumps(good(1, text="é"), ensure_ascii=False)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    source = read_records("jsonl", folder / "rows.jsonl")
    assert [source.words(number).id for number in range(2)] == ["line 1", "line 4"]
    assert source.words(1).text == "é"


def test_rows_of_parquet_are_read_by_group(tmp_path, monkeypatch):
    source, read_group = maad.source("s", "val", 9), pq.ParquetFile.read_row_group
    for name, rows in (("a", range(5)), ("b", range(5, 9))):
        write_parquet([source[row] for row in rows], tmp_path / f"{name}.parquet")
    for file in tmp_path.iterdir():
        pq.write_table(pq.read_table(file), file, row_group_size=2)
    read_groups = []

    def counted(self, group, columns):
        read_groups.append(group)
        return read_group(self, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    records = read_records("parquet", tmp_path)
    assert len(records) == 9 and read_groups == [0, 1, 2, 0, 1]
    for row in (8, 7, 4, 5, 0, 1, 0):
        np.testing.assert_array_equal(records[row].images[0], source[row].images[0])
        assert records.words(row).id == source.words(row).id
    assert len(read_groups) < 5 + 7


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


def test_a_digest_covers_rows_and_pictures(folder):
    file = lines(folder, good(0), good(1))
    pq.write_table(pa.table({"image": ["images/0.png"], "question": ["q"], "caption": ["a"]}), folder / "a.parquet")
    sources = {"jsonl": file, "parquet": folder / "a.parquet"}

    def digests():
        return {kind: read_records(kind, path).digest() for kind, path in sources.items()}

    before = digests()
    assert digests() == before
    (folder / "images" / "0.png").write_bytes(png(picture(2)))
    after = digests()
    assert all(after[kind] != before[kind] for kind in sources)
    lines(folder, good(0), good(1, text="more"))
    assert digests()["jsonl"] != after["jsonl"] and digests()["parquet"] == after["parquet"]


def test_the_splits_of_a_file_share_no_image_and_make_up_the_whole(folder):
    rows = [good(k % 2, id=f"{k}") | {"image": f"images/{k // 3}.png"} for k in range(300)]
    file = lines(folder, *rows)
    ids = {}
    for split in ("", "train", "test"):
        source = read_records("jsonl", file, split=split)
        words = [source.words(index) for index in range(len(source))]
        ids[split] = {row.id: row.images[0] for row in words}
    assert ids["train"] | ids["test"] == ids[""]
    assert not set(ids["train"].values()) & set(ids["test"].values())
    assert 10 <= len(ids["test"]) <= 60
    assert len({read_records("jsonl", file, split=split).digest() for split in ids}) == 3


def test_a_split_without_rows_is_named(folder):
    file = lines(folder, *(good(0, id=f"{k}") for k in range(3)))
    splits = [read_records("jsonl", file, split=split) for split in ("train", "test")]
    (empty,) = (source for source in splits if not len(source))
    with pytest.raises(AntgmmError, match=r"has no rows in its split '\w+': bring a file of its own for it"):
        empty.check({})
