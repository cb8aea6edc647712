"""Rows with conversations: accepted forms in each kind of file, and errors."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from antgmm_jax.errors import AntgmmError
from data import arrow_rows
from data.limits import BadRow
from data.readers import read_records
from data.record import Turn
from data.rows import parse
from tests.data.own_files import good, lines, picture, png, read

HUMAN, GPT = ({"from": speaker} for speaker in ("human", "gpt"))
USER, ASSISTANT = ({"role": role} for role in ("user", "assistant"))
IMAGE, RED = {"type": "image"}, {**ASSISTANT, "content": "red"}
PARTS = [{"type": "text", "text": "this "}, IMAGE, {"type": "text", "text": " or"}, IMAGE]


def text(words):
    return {"type": "text", "text": words}


def parsed(turns, **more):
    """The turns of a row (role and parts), its pictures, and its last answer."""
    row = parse({"messages": turns, **more})
    return [(turn.role, *turn.parts) for turn in row.turns], row.images, row.answer


def test_llavas_instruction_file_is_read(folder):
    """Repeated ids, rows without pictures, a placeholder at the end, and a record with several questions."""
    first = [{**HUMAN, "value": "<image>\nwhat is it?"}, {**GPT, "value": " a dog\n"}]
    more = [{**HUMAN, "value": "which colour?"}, {**GPT, "value": "brown"}]
    last = [{**HUMAN, "value": "what is it?\n<image>"}, {**GPT, "value": "a cat"}]
    rows = [
        {"id": "33471", "image": "images/0.png", "conversations": [*first, *more]},
        {"id": "33471", "image": "images/1.png", "conversations": last},
        {"id": "x", "model": "", "conversations": more},
    ]
    (folder / "llava.json").write_text(json.dumps(rows))
    records = read("jsonl", folder / "llava.json")
    assert [record.id for record in records] == ["33471 (row 1)", "33471 (row 2)", "x (row 3)"]
    assert records[0].turns == (
        Turn("user", (None, "what is it?")),
        Turn("assistant", ("a dog",)),
        Turn("user", ("which colour?",)),
    )
    assert (records[0].question, records[0].answer) == ("which colour?", "brown")
    assert records[1].turns == (Turn("user", ("what is it?", None)),)
    assert records[2].turns == (Turn("user", ("which colour?",)),) and records[2].images == ()
    np.testing.assert_array_equal(records[1].images[0], picture(1))


def test_messages_of_parts():
    question_turns = [{"role": "system", "content": [text("s")]}, {**USER, "content": PARTS}]
    answer = {**ASSISTANT, "content": [text(" it is"), text(" red ")]}
    turns, images, last_answer = parsed([*question_turns, answer, {**USER, "content": "sure?"}, RED], images=["a", "b"])
    assert turns == [
        ("system", "s"),
        ("user", "this ", None, " or", None),
        ("assistant", "it is red"),
        ("user", "sure?"),
    ]
    assert (images, last_answer) == (("a", "b"), "red")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "own"},
        {"type": "image", "path": "own", "text": None},
        {"type": "image", "url": "own"},
        {"type": "image_url", "image_url": {"url": "own"}},
        {"image": "own"},
        {"type": "image", "image": {"bytes": None, "path": "own"}},
    ],
)
def test_parts_may_name_files_in_addition_to_those_of_the_row(part):
    turns, images, _ = parsed([{**USER, "content": [IMAGE, part, text("?"), IMAGE]}, RED], images=["a", "b"])
    assert turns == [("user", None, None, "?", None)]
    assert images == ("a", "own", "b")


def test_pictures_without_places_go_before_the_first_question():
    system, sure = {"role": "system", "content": "s"}, {**USER, "content": "sure?"}
    turns, images, _ = parsed([system, {**USER, "content": "what?"}, RED, sure, RED], image=["a", "b"])
    assert turns == [("system", "s"), ("user", None, None, "what?"), ("assistant", "red"), ("user", "sure?")]
    assert images == ("a", "b")
    # Consecutive questions stay separate turns.
    assert parsed([sure, sure, RED])[0] == [("user", "sure?")] * 2


def test_placeholders_keep_their_places():
    question = {**USER, "content": "compare <image> with\n<image>\nand <image>"}
    turns, _, _ = parsed([question, RED], images=["a", "b", "c"])
    assert turns == [("user", "compare ", None, " with", None, "and ", None)]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([text("<image>\nWhat?")], (None, "What?")),
        (["<image>", "What?", "<image>\nor?"], (None, "What?", None, "or?")),
        ([text("see <image>\n"), "and", IMAGE, {"text": "this"}], ("see ", None, "and", None, "this")),
    ],
)
def test_places_in_texts_of_a_list_are_those_of_images(content, parts):
    names = ("a", "b")[: parts.count(None)]
    turns, images, _ = parsed([{**USER, "content": content}, RED], images=[*names])
    assert turns == [("user", *parts)]
    assert images == names


@pytest.mark.parametrize("question", ["<image>\nwhat?", "what? <image>", "<image> what? <image>"])
def test_places_around_a_single_question_are_removed(question):
    row = parse({"question": question, "answer": "red", "image": ["a", "b"][: question.count("<image>")]})
    assert row.question == "what?"


WHAT = {**USER, "content": "what?"}
BAD = {
    "1 images, but 2 places for them in messages": {
        "messages": [{**USER, "content": [text("<image> what?"), "<image>"]}, RED],
        "image": "a",
    },
    "question has 2 places of images (<image>), the row has 1 images": {
        "question": "<image><image> what?",
        "answer": "red",
        "image": "a",
    },
    "question has 1 places of images (<image>), the row has 2 images": {
        "question": "<image> what?",
        "answer": "red",
        "images": ["a", "b"],
    },
    "question has <image> between its words: write messages": {
        "question": "is <image> red?",
        "answer": "yes",
        "image": "a",
    },
    "question is empty": {"question": "<image>\n", "answer": "yes", "image": "a"},
    "messages is not a list of turns": {"messages": "what?"},
    "'messages' and 'conversations' both contain turns": {"messages": [WHAT, RED], "conversations": [WHAT, RED]},
    "messages[1] has role 'tool': only system, user": {"messages": [WHAT, {"role": "tool", "content": "1"}, RED]},
    "messages[0] has role None": {"messages": [{"content": "what?"}, RED]},
    "messages[0] is an answer (assistant) that does not follow a question": {"messages": [RED, WHAT, RED]},
    "messages[2] is an answer (assistant) that does not follow": {"messages": [WHAT, RED, RED]},
    "messages end with a turn of the user: the answer (assistant) is missing": {"messages": [WHAT, RED, WHAT]},
    "messages[0] has a part of type 'video': video is not supported": {
        "messages": [{**USER, "content": [{"type": "video", "video": "a.mp4"}]}, RED]
    },
    "messages[0] has a part of type 'audio': only text and image": {
        "messages": [{**USER, "content": [{"type": "audio"}]}, RED]
    },
    "contains <video>: video is not supported": {"messages": [{**USER, "content": "<video>\nwhat?"}, RED]},
    "has a video: video is not supported": {"messages": [WHAT, RED], "video": "a.mp4"},
    "has a videos: video is not supported": {"question": "q", "answer": "a", "image": "b", "videos": ["a.mp4"]},
    "messages[1] is a turn of the assistant with an image": {
        "messages": [WHAT, {**ASSISTANT, "content": "<image>"}],
        "image": "a.png",
    },
    "messages[0] names a picture as '<img>a.jpg</img>': write <image>": {
        "messages": [{**USER, "content": "Picture 1: <img>a.jpg</img>\nwhat?"}, RED]
    },
    "has no image, but 'image_url', which is not read: rename it": {"messages": [WHAT, RED], "image_url": "a.jpg"},
    "has no image, but 'image_1', which is not read: rename it": {"messages": [WHAT, RED], "image_1": {"bytes": b"a"}},
    "has no image, but 'picture', which is not read": {
        "image": None,
        "picture": "a.jpg",
        "question": "q",
        "answer": "a",
    },
    "images in messages have the index 1, 0: put them in ascending order": {
        "messages": [{**USER, "content": [{**IMAGE, "index": 1}, text("and"), {**IMAGE, "index": 0}]}, RED],
        "images": ["a", "b"],
    },
    "has label false, so its answer is not to be learnt": {"messages": [WHAT, RED], "label": False},
    "has <bbox> in place of one of its objects: write the words": {
        "messages": [{**USER, "content": "find the sheep"}, {**ASSISTANT, "content": "<bbox>"}],
        "objects": {"ref": ["sheep"], "bbox": [[1, 2, 3, 4]]},
    },
    "messages[1] has reasoning_content, which is not read": {"messages": [WHAT, {**RED, "reasoning_content": "so"}]},
    "messages[1] is an answer that is not to be learnt": {"messages": [WHAT, {**RED, "weight": 0}, WHAT, RED]},
    "messages[3] is an answer that is not to be learnt": {"messages": [WHAT, RED, WHAT, {**RED, "loss": False}]},
    "messages[1] calls tools, which is not supported": {"messages": [WHAT, {**RED, "tool_calls": [{"id": "1"}]}]},
    "image has max_pixels: resize its file": {
        "messages": [
            {**USER, "content": [{"type": "image", "image": "a.jpg", "max_pixels": 50176}, text("what?")]},
            RED,
        ]
    },
    "has a system prompt beside another one in messages: remove one": {
        "messages": [{"role": "system", "content": "s"}, WHAT, RED],
        "system": "t",
    },
    "messages[0] is a turn of the system with an image": {
        "messages": [{"role": "system", "content": [IMAGE]}, WHAT, RED]
    },
    "messages[1] is empty": {"messages": [WHAT, {**ASSISTANT, "content": [text(" ")]}]},
    "messages[0] is empty": {"messages": [{**USER, "content": " "}, RED]},
    "messages[0] has int content: write a text or a list of parts": {"messages": [{**USER, "content": 3}, RED]},
    "messages[0] has a part that is a int": {"messages": [{**USER, "content": [3]}, RED]},
    "messages[0] has a part of type 'text' without a text": {"messages": [{**USER, "content": [text(None)]}, RED]},
    "2 images, but 1 places for them in messages": {
        "messages": [{**USER, "content": [IMAGE, text("?")]}, RED],
        "images": ["a", "b"],
    },
    "0 images, but 1 places for them in messages": {"messages": [{**USER, "content": "<image> what?"}, RED]},
    "image 'https://a.b/c.png' is not a file: save it and write its path": {
        "messages": [{**USER, "content": [{"type": "image", "url": "https://a.b/c.png"}, text("?")]}, RED]
    },
    "image is a int, not a path": {"messages": [{**USER, "content": [{"type": "image", "image": 3}]}, RED]},
    "has a text beside messages: write it into a turn": {"messages": [WHAT, RED], "text": "new"},
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_conversations_are_refused_by_name(message):
    with pytest.raises(BadRow) as refused:
        parse(BAD[message])
    assert message in str(refused.value)


CHATS = [
    {"messages": [{**USER, "content": [IMAGE, text("what?"), IMAGE]}, {**ASSISTANT, "content": [text("red")]}]},
    {"messages": [{**USER, "content": [text("what?")]}, {**ASSISTANT, "content": [text("green")]}]},
]
TURNS = [(Turn("user", (None, "what?", None)),), (Turn("user", ("what?",)),)]


def as_vision_table():
    """Rows in the form of TRL: `messages` of parts and a list of `images`, as Hugging Face datasets stores them."""
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    shown = [[{"bytes": png(picture(k)), "path": None} for k in range(2)], []]
    columns = {"messages": pa.array([row["messages"] for row in CHATS], pa.list_(turn))}
    columns |= {"images": pa.array(shown, pa.list_(image)), "other": pa.array([1, 2])}
    return pa.table(columns)


def assert_chats(records):
    assert [record.turns for record in records] == TURNS
    assert [record.answer for record in records] == ["red", "green"]
    assert [len(record.images) for record in records] == [2, 0]
    for number, image in enumerate(records[0].images):
        np.testing.assert_array_equal(image, picture(number))


def test_parquet_with_messages_and_images(tmp_path):
    pq.write_table(as_vision_table(), tmp_path / "train-00000-of-00001.parquet")
    assert_chats(read("parquet", tmp_path))


def saved_to_disk(folder, tables, names=()):
    """Writes a folder like `datasets.Dataset.save_to_disk`: Arrow streams and a list of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            for batch in table.to_batches(max_chunksize=1):
                stream.write(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_of_save_to_disk(tmp_path):
    table = as_vision_table()
    saved_to_disk(tmp_path / "all" / "train", [table.slice(0, 1), table.slice(1)])
    (tmp_path / "all" / "train" / "cache-1.arrow").write_bytes(b"left by map")
    records = read_records("arrow", tmp_path / "all" / "train")
    assert_chats([records[0], records[1]])
    assert [records.words(number).id for number in (1, 0)] == ["row 2", "row 1"]
    # Files are read in the order of state.json.
    saved_to_disk(tmp_path / "two", [table.slice(1), table.slice(0, 1)], names=["b.arrow", "a.arrow"])
    assert [record.answer for record in read("arrow", tmp_path / "two")] == ["green", "red"]
    (tmp_path / "all" / "dataset_dict.json").write_text("{}")
    saved_to_disk(tmp_path / "all" / "test", [table])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.arrow").write_bytes(b"nothing")
    for path, message in (
        (tmp_path / "all", "all holds the splits test, train: specify the folder of one of them"),
        (tmp_path / "bad", r"a\.arrow is not an Arrow file of datasets\.save_to_disk"),
        (tmp_path / "none", "does not exist: specify a arrow file or its folder"),
    ):
        with pytest.raises(AntgmmError, match=message):
            read_records("arrow", path)
    (tmp_path / "two" / "state.json").write_text("[]")
    with pytest.raises(AntgmmError, match=r"state\.json is damaged"):
        read_records("arrow", tmp_path / "two")


def as_json_table(contents, images, last=None):
    """Conversations of two turns as `datasets` stores contents of mixed types: each is JSON."""
    written = [json.dumps(content) for pair in contents for content in pair]
    storage = pa.array(written if last is None else [*written[:-1], last])
    fields = {
        "role": pa.array(["user", "assistant"] * len(contents)),
        "content": pa.ExtensionArray.from_storage(pa.json_(), storage),
    }
    turns = pa.StructArray.from_arrays([*fields.values()], names=[*fields])
    messages = pa.ListArray.from_arrays(pa.array(range(0, 2 * len(contents) + 1, 2), pa.int32()), turns)
    return pa.table({"messages": messages, "images": pa.array(images)})


def test_contents_of_mixed_types_are_json(folder):
    contents = [
        ([IMAGE, text("what?")], "red"),
        ("which?", [text("green")]),
        ([text("own: "), {**IMAGE, "path": "images/0.png"}], "blue"),
    ]
    table = as_json_table(contents, [["images/1.png"], [], []])
    pq.write_table(table, folder / "rows.parquet")
    saved_to_disk(folder, [table])
    for kind, path in (("parquet", folder / "rows.parquet"), ("arrow", folder)):
        first, second, third = read(kind, path)
        assert [(turn.role, turn.parts) for turn in first.turns] == [("user", (None, "what?"))]
        assert (first.answer, second.answer, third.answer) == ("red", "green", "blue")
        np.testing.assert_array_equal(first.images[0], picture(1))
        np.testing.assert_array_equal(third.images[0], picture(0))
    assert arrow_rows.row_bytes(table)[2] > len("images/0.png")
    before = read_records("arrow", folder).digest()
    (folder / "images" / "0.png").write_bytes(png(picture(7)) + b"x")
    assert read_records("arrow", folder).digest() != before
    broken = as_json_table([("a?", "b"), ("c?", "d")], [[], []], last="{")
    pq.write_table(broken, folder / "broken.parquet")
    with pytest.raises(AntgmmError, match=r"broken\.parquet row 2: cannot be read: Expecting property name"):
        read("parquet", folder / "broken.parquet")


def test_shards_with_conversations(tmp_path):
    members = {f"a.{number}.png": png(picture(number)) for number in range(11)}
    many = [{**USER, "content": [IMAGE] * 11}, RED]
    members |= {"a.json": json.dumps({"messages": many}).encode(), "b.json": json.dumps(CHATS[1]).encode()}
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    many, none = read("webdataset", tmp_path)
    assert (none.turns, none.answer, none.images) == (TURNS[1], "green", ())
    assert many.turns == (Turn("user", (None,) * 11),)
    for number, image in enumerate(many.images):
        np.testing.assert_array_equal(image, picture(number))


def test_a_digest_covers_pictures_named_in_parts(folder):
    def chat(**part):
        return {"messages": [{**USER, "content": [{**IMAGE, **part}, text("?")]}, RED]}

    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("path", pa.string())])
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    rows = [chat(path="images/0.png") | {"other": 1}]
    rows[0]["messages"][1] = {**ASSISTANT, "content": [text("red")]}
    table = pa.table({"messages": pa.array([row["messages"] for row in rows], turns)})
    pq.write_table(table, folder / "a.parquet")
    saved_to_disk(folder, [table])
    paths = {
        "jsonl": lines(folder, chat(path="images/0.png"), good(1)),
        "parquet": folder / "a.parquet",
        "arrow": folder,
    }
    before = {kind: read_records(kind, path).digest() for kind, path in paths.items()}
    for kind, path in paths.items():
        np.testing.assert_array_equal(read(kind, path)[0].images[0], picture(0))
    (folder / "images" / "0.png").write_bytes(png(picture(2, (9, 9))))
    after = {kind: read_records(kind, path).digest() for kind, path in paths.items()}
    assert all(after[kind] != before[kind] for kind in paths)


def test_turns_as_an_object_of_lists():
    """As `datasets` before version 4 and TFDS store a sequence of objects."""
    turns = {"from": ["human", "gpt"], "value": ["what?", "red"]}
    row = parse({"conversations": turns, "image": "a.png"})
    assert (row.turns, row.answer, row.images) == ((Turn("user", (None, "what?")),), "red", ("a.png",))
    with pytest.raises(BadRow, match="conversations is not a list of turns"):
        parse({"conversations": {"from": ["human", "gpt"], "value": ["what?"]}})


def test_a_digest_covers_pictures_in_objects_in_values_and_by_whole_paths(folder):
    part = {"type": "image", "path": "images/0.png"}
    whole = str(folder / "images" / "0.png")
    rows = {
        "object": {**good(0), "image": {"path": "images/0.png"}},
        "value": {"conversations": [{**HUMAN, "value": [part, text("?")]}, {**GPT, "value": "red"}]},
        "whole": {**good(0), "image": whole},
    }
    for row in rows.values():
        (folder / "images" / "0.png").write_bytes(png(picture(0)))
        path = lines(folder, row)
        before = read_records("jsonl", path).digest()
        np.testing.assert_array_equal(read("jsonl", path)[0].images[0], picture(0))
        (folder / "images" / "0.png").write_bytes(png(picture(2, (9, 9))))
        assert read_records("jsonl", path).digest() != before


def test_parts_of_a_system_turn_are_one_text():
    """Templates of Gemma 3 and Mistral read its first part alone."""
    system = {"role": "system", "content": [text("be"), text(" brief")]}
    turns, _, _ = parsed([system, {**USER, "content": "what?"}, RED])
    assert turns[0] == ("system", "be brief")
