"""A row that cannot be read is one line, in every format; no reader waits for a pipe or decodes a huge picture."""

import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from antgmm_jax.presets import preset
from data import limits
from data.arrow_rows import row_bytes
from data.building import read_all
from data.encoding import Encoder, refuse
from data.files import decode_image
from data.limits import LONGEST_SIDE, MOST_PIXELS, SAMPLE_BYTES, BadRow
from data.readers import read_records
from data.tokenizer import corpus, train_tokenizer
from experiments.run.host.console import printable
from tests.robustness.files import TABLES, TEXTS, as_arrow, as_jsonl, as_named_tar, as_parquet, png

GOOD = {"question": "what?", "answer": "red"}
DEEP = "[" * 100_000
LONG = "x" * 1_000_000


def turns(**first):
    """A conversation of one turn, which has these fields."""
    return {"messages": [{"content": "what?", **first}]}


def header_of(width, height):
    """A PNG of 80 bytes that says it has `width` x `height` pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


CASES = [
    *((write, {**GOOD, "answer": "\ud800"}, r"answer holds '\\ud800', half of a character") for write in TEXTS),
    *((write, {**GOOD, "id": "a\udfff"}, "id holds") for write in TEXTS),
    *((write, {**GOOD, "latents": {"price": 2**40}}, "more than 32 bits") for write in TEXTS),
    *((write, {**GOOD, "text": "x" * (1 << 23)}, "text has 8388608 characters") for write in TEXTS),
    *((write, DEEP.encode(), "is not JSON") for write in TEXTS),
    *((write, b'{"question": ' + b"9" * 5000 + b"}", "is not JSON") for write in TEXTS),
    *((write, b'{"question": "\xff"}', "not UTF-8|is not JSON") for write in TEXTS),
    (as_parquet, {**GOOD, "answer": b"\xff\xfe"}, "row 2: cannot be read"),
    (as_arrow, {**GOOD, "answer": b"\xff\xfe"}, "Invalid UTF8 sequence at string index 1"),
    *((write, {**GOOD, "id": np.datetime64(2**40, "s")}, "cannot be read") for write in TABLES),
    *((write, turns(role=["user"]), r"messages\[0\] has role \['user'\]: only system") for write in (*TEXTS, *TABLES)),
    *((write, turns(role={"a": 1}), r"messages\[0\] has role \{'a': 1\}: only system") for write in (*TEXTS, *TABLES)),
]


@pytest.mark.parametrize(("write", "row", "message"), CASES, ids=[f"{w.__name__}-{m[:20]}" for w, _, m in CASES])
def test_a_bad_row_is_one_line(tmp_path, write, row, message):
    kind, path = write(tmp_path, [GOOD, row])
    with pytest.raises(AntgmmError, match=message):
        read(kind, path)


def read(kind, path, **about):
    return [record for _, record in read_all(read_records(kind, path, **about), lambda record: record)]


def test_a_huge_picture_is_refused_by_its_header():
    for size in ((30_000, 30_000), (LONGEST_SIDE + 1, 1), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(BadRow, match=f"has {size[0]} x {size[1]} pixels|cannot be decoded"):
            decode_image(header_of(*size))
    with pytest.raises(BadRow, match="cannot be decoded"):
        decode_image(header_of(8192, MOST_PIXELS // 8192))


def test_formats_that_start_programs_or_have_no_decoder_are_refused(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    dds = b"DDS " + struct.pack("<7I", 124, 0x1007, 4, 4, 16, 0, 0) + bytes(100)
    for content in (eps, dds, b"", b"GIF89a", png()[:40]):
        with pytest.raises(BadRow, match="cannot be decoded"):
            decode_image(content)


def test_pipes_and_links_to_themselves_are_one_line(tmp_path):
    as_jsonl(tmp_path, [])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    rows = [{**GOOD, "image": name} for name in ("pipe.png", "loop.png", "x" * 5000, "a\ud800.png")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(AntgmmError, match="4 of 4 rows are invalid") as caught:
        read("jsonl", tmp_path / "rows.jsonl")
    for words in ("image pipe.png is a device or pipe", "'loop.png' is not a path"):
        assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "webdataset", "tfds"])
def test_data_that_is_no_file_is_one_line(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = tmp_path / "folder"
    folder.mkdir()
    for suffix in ("jsonl", "parquet", "arrow", "tar"):
        os.mkfifo(folder / f"a.{suffix}")
    for path in (tmp_path / "pipe", tmp_path / "loop", folder, tmp_path / ("x" * 5000)):
        with pytest.raises(AntgmmError):
            read(kind, path)


def test_a_tfds_folder_names_no_class_of_others(tmp_path):
    content = {"pythonClassName": "tensorflow_datasets.x", "a": [{"python\u0043lassName": "os.path.Evil"}]}
    (tmp_path / "features.json").write_text(json.dumps(content))
    with pytest.raises(AntgmmError, match=r"features.json names a class 'os.path.Evil' that is not of TFDS"):
        read("tfds", tmp_path)


def test_a_sample_of_an_archive_is_refused_by_its_size(tmp_path):
    with (tmp_path / "rows.tar").open("wb") as file:
        member = tarfile.TarInfo("0.png")
        member.size = SAMPLE_BYTES + 1
        file.write(member.tobuf())
        file.truncate(file.tell() + SAMPLE_BYTES + 2048)  # a hole, which takes no space on the disk
    with pytest.raises(AntgmmError, match="MiB are supported"):
        read("webdataset", tmp_path / "rows.tar")


def save(folder, kind, table):
    """Writes a table as a file of a kind, in one row group or batch."""
    if kind == "parquet":
        pq.write_table(table, folder / "rows.parquet", compression="zstd")
        return folder / "rows.parquet"
    with pa.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as stream:
        stream.write_table(table)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    names = ["question", "answer", "image", "image", "other", "other"]
    table = pa.Table.from_arrays([pa.array(["what?"])] * len(names), names)
    with pytest.raises(AntgmmError, match=r"rows\.\w+ has two columns 'image': remove or rename one"):
        read(kind, save(tmp_path, kind, table))


REPEATED = {
    "text": {"question": ["q" * 100_000] * 40},
    "turns": {"messages": [turns(role="user", content="q" * 100_000)["messages"] * 4] * 10},
    "compressed": {"question": [f"{number}" * 100_000 for number in range(40)]},
    "fixed length": {"id": pa.array([b"q" * 100_000] * 40, pa.binary(100_000))},
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_row_group_of_a_few_bytes_does_not_become_many(tmp_path, monkeypatch, name):
    monkeypatch.setattr(limits, "GROUP_BYTES", 1 << 20)
    about = "column '(question|messages)' of row group 1" if name in ("text", "turns") else "parquet: row group 1"
    path = save(tmp_path, "parquet", pa.table(REPEATED[name]))
    before = pa.total_allocated_bytes()
    with pytest.raises(
        AntgmmError, match=rf"{about} holds [346] MiB in a file of \d+ bytes: shorten its values or write"
    ):
        read("parquet", path)
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_parquet_file_with_fewer_than_0_rows_is_one_line(tmp_path):
    path = save(tmp_path, "parquet", pa.table({"question": ["what?"] * 3000}))
    path.write_bytes(path.read_bytes().replace(b"\xf0\x2e", b"\xef\x2e"))  # 3000 and -3000 as Thrift writes them
    with pytest.raises(AntgmmError, match=r"rows\.parquet is not a readable Parquet file"):
        read("parquet", path)


def test_row_groups_of_pictures_have_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GROUP_BYTES", 1000)
    contents = [png((200, 150), seed=seed) for seed in range(3)]
    shared = [{"bytes": contents[number % 3], "path": None} for number in range(30)]
    rows = {"image": shared, "question": [f"what? {number}" for number in range(30)], "answer": ["red"] * 30}
    records = read("parquet", save(tmp_path, "parquet", pa.table(rows)))
    assert [record.question for record in records] == rows["question"]
    for number, record in enumerate(records):
        np.testing.assert_array_equal(record.images[0], decode_image(contents[number % 3]))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("large", [{"text": "x" * 200_000}, {"images": [png()] * 2000}], ids=["text", "images"])
def test_a_large_row_of_a_table_is_refused_by_its_size(tmp_path, monkeypatch, kind, large):
    monkeypatch.setattr(limits, "SAMPLE_BYTES", 100_000)
    rows = [{**GOOD, "text": "", "images": [png()]}, {**GOOD, "images": [png()], **large}]
    with pytest.raises(AntgmmError, match=r"1 of 2 rows(.|\n)*row 2: has \d{6} bytes, at most .* make it smaller"):
        read(kind, save(tmp_path, kind, pa.Table.from_pylist(rows)))


def test_the_bytes_of_rows():
    texts = pa.array(["abc", None, "", "abcde"])
    pairs = pa.array([[("a", "bc")], None, [], [("a", "b")] * 2], pa.map_(pa.string(), pa.string()))
    columns = {
        "texts": (texts, [3, 0, 0, 5]),
        "shared": (texts.dictionary_encode(), [3, 0, 0, 5]),
        "lists": (pa.array([["ab", "c"], None, [], ["abc"]]), [128 + 3, 0, 0, 64 + 3]),
        "fixed": (pa.array([["ab", "c"], ["", ""]] * 2, pa.list_(pa.string(), 2)), [128 + 3, 128, 128 + 3, 128]),
        "structs": (
            pa.array([{"a": b"ab", "b": [1]}, None, {"a": None, "b": []}, {"a": b"c", "b": None}]),
            [66, 0, 0, 1],
        ),
        "pairs": (pairs, [64 + 3, 0, 0, 128 + 4]),
        "numbers": (pa.array([1, 2, None, 4]), [0] * 4),
    }
    for name, (array, expected) in columns.items():
        for start in (0, 1, 3):
            sizes = row_bytes(pa.table({name: array.slice(start)}))
            np.testing.assert_array_equal(sizes, expected[start:], err_msg=name)
    together = pa.table({name: array for name, (array, _) in columns.items()})
    np.testing.assert_array_equal(row_bytes(together), np.sum([expected for _, expected in columns.values()], axis=0))
    outside = pa.DictionaryArray.from_arrays(pa.array([0, 7]), pa.array(["a"]), safe=False)
    with pytest.raises(ValueError, match="not in its dictionary"):
        row_bytes(pa.table({"a": outside}))


def test_an_arrow_folder_names_only_its_own_files(tmp_path):
    as_arrow(tmp_path / "..", [GOOD])
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../rows.arrow"}]}))
    with pytest.raises(AntgmmError, match="outside the folder"):
        read("arrow", tmp_path)


def test_special_tokens_in_rows_are_refused(tmp_path):
    kind, path = as_jsonl(tmp_path, [GOOD, *({**GOOD, "question": f"{t}what?"} for t in ("</s>", "<pad>", "<image>"))])
    config = preset("llava-tiny")
    encoder = Encoder(new_processor(config, train_tokenizer(corpus("s", 50), min_frequency=2)), config)
    parts = [encoder.special_parts(record) for record in read(kind, path)]
    # The processor itself places the image token of a question.
    assert parts == [[], [("question", "</s>")], [("question", "<pad>")], []]
    with pytest.raises(AntgmmError, match="line 2: answer contains </s>"):
        refuse([("line 2", ("answer", "</s>"))], [], 2)


@pytest.mark.parametrize(
    "row",
    [
        {"image": f"../../../{LONG}"},
        {"image": f"a/{LONG}"},
        {"image": "\ud800" * 100_000},
        turns(role=LONG),
        turns(role="user", content=[{"type": LONG}]),
        turns(role="user", content=[{"type": [[["x"] * 1000] * 9] * 9}]),
        turns(role="user", content=[{"type": json.loads("[" * 900 + "]" * 900)}]),
        turns(role="user", content=[{"type": "image", "image": f"https://a.b/{LONG}"}]),
    ],
    ids=["outside", "long-name", "half-characters", "role", "type", "wide-type", "deep-type", "url"],
)
def test_long_values_are_shortened_in_errors(tmp_path, row):
    kind, path = as_jsonl(tmp_path, [{**GOOD, **row} if "image" in row else row])
    with pytest.raises(AntgmmError, match="line 1: (image|messages)") as caught:
        read(kind, path)
    assert len(str(caught.value)) < 1000 + len(str(path))


def test_long_ids_and_names_in_archives_are_shortened_in_errors(tmp_path):
    kind, path = as_jsonl(tmp_path, [{**GOOD, "id": LONG}] * 2)
    with pytest.raises(AntgmmError, match=r"line 2: id 'xx.*\.\.\..*xx' is also that of line 1") as caught:
        read(kind, path)
    assert len(str(caught.value)) < 1000
    as_named_tar(tmp_path / "rows.tar", [(f"{LONG}.{LONG}", b"{}")])
    with pytest.raises(AntgmmError, match=r"needs an image and a \.json, has \.x") as caught:
        read("webdataset", tmp_path / "rows.tar")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["0.json", "0.JSON", "0.png"])
def test_a_sample_of_an_archive_has_one_file_of_a_name(tmp_path, name):
    fields = json.dumps(GOOD).encode()
    as_named_tar(tmp_path / "rows.tar", [("0.png", png()), ("0.json", fields), (name, b"{}")])
    with pytest.raises(AntgmmError, match=rf"rows\.tar 0: has two files '{name[1:].lower()}': remove one"):
        read("webdataset", tmp_path / "rows.tar")


@pytest.mark.parametrize("split", ["", "train", "test"])
def test_half_a_character_in_a_path_is_an_error_of_its_row(tmp_path, split):
    rows = [{**GOOD, "image": f"{number}\ud800.png"} for number in range(40)]
    kind, path = as_jsonl(tmp_path, rows)
    with pytest.raises(AntgmmError, match=r"line \d+: image path '\d+\\ud800.png' is not a path"):
        read(kind, path, split=split)


def test_escapes_of_terminals_are_printed_escaped():
    assert printable("a\x1b[2J\x07b\u202e\ud800\tc\nd €") == "a\\x1b[2J\\x07b\\u202e\\ud800\tc\nd €"
