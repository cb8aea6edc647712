"""Rows of JSONL files and JSON arrays: accepted forms, refused rows and their error messages."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from antgmm_jax.errors import AntgmmError
from data import json_rows
from data.readers import read_records
from tests.data.own_files import good, lines, picture, png, read


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


@pytest.mark.parametrize("empty", ["\n", "\r\n", " \n\n"])
def test_a_file_that_begins_with_a_byte_order_mark_and_an_empty_line_is_read(folder, empty):
    text = f"\ufeff{empty}{json.dumps(good(0))}\n{json.dumps(good(1))}\n"
    (folder / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    before = empty.count("\n")
    records = read("jsonl", folder / "rows.jsonl")
    assert [record.id for record in records] == [f"line {before + 1}", f"line {before + 2}"]
    assert [record.answer for record in records] == ["thing 0", "thing 1"]


def test_any_line_ending_is_read(folder):
    text = "\ufeff" + json.dumps(good(0)) + "\r\n\r\n  \n" + json.dumps(good(1, text="é"), ensure_ascii=False)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    source = read_records("jsonl", folder / "rows.jsonl")
    assert [source.words(number).id for number in range(2)] == ["line 1", "line 4"]
    assert source.words(1).text == "é"
