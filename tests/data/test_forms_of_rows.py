"""Rows as other trainers and released data sets write them."""

import base64

import pytest

from data.limits import BadRow
from data.rows import columns, image_names, parse
from tests.data.test_chat_rows import GPT, HUMAN, RED, USER, text

PIXEL = b"\x89PNG"
SPELT = f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"


@pytest.mark.parametrize(
    ("raw", "turns", "images", "answer"),
    [
        (  # The Cauldron, FineVision
            {
                "images": [{"bytes": PIXEL, "path": None}],
                "texts": [{"user": "what?", "assistant": "red", "source": "x"}],
            },
            [("user", None, "what?")],
            (PIXEL,),
            "red",
        ),
        (  # ms-swift
            {"conversation": [{"human": "a?", "assistant": "b"}, {"human": "c?", "assistant": "d"}]},
            [("user", "a?"), ("assistant", "b"), ("user", "c?")],
            (),
            "d",
        ),
        (  # TRL's llava-instruct-mix
            {"images": ["a.png"], "prompt": [{**USER, "content": "what?"}], "completion": [RED]},
            [("user", None, "what?")],
            ("a.png",),
            "red",
        ),
        (  # ms-swift with an earlier question
            {"query": "And <image>?", "response": "blue", "history": [["<image>first?", "red"]], "images": ["a", "b"]},
            [("user", None, "first?"), ("assistant", "red"), ("user", "And ", None, "?")],
            ("a", "b"),
            "blue",
        ),
        (
            {"system": "Be brief.", "conversations": [{**HUMAN, "value": "what?"}, {**GPT, "value": "red"}]},
            [("system", "Be brief."), ("user", "what?")],
            (),
            "red",
        ),
        (
            {"messages": [{"role": "system", "content": " "}, {**USER, "content": "what?"}, RED]},
            [("user", "what?")],
            (),
            "red",
        ),
        (  # OpenAI's form for fine-tuning
            {
                "messages": [
                    {**USER, "content": [{"type": "image_url", "image_url": {"url": SPELT}}, text("what?")]},
                    RED,
                ]
            },
            [("user", None, "what?")],
            (PIXEL,),
            "red",
        ),
    ],
)
def test_forms_of_other_trainers_are_read(raw, turns, images, answer):
    row = parse(raw)
    assert ([(turn.role, *turn.parts) for turn in row.turns], row.images, row.answer) == (turns, images, answer)
    assert columns([*raw]) == [*raw]


def test_an_instruction_is_followed_by_its_input():
    raw = {"instruction": "In one word.", "input": "Which colour?", "output": "red", "image": "a.png"}
    assert parse(raw).question == "In one word.\nWhich colour?"
    assert parse({**raw, "input": ""}).question == "In one word."
    assert parse({**raw, "instruction": None}).question == "Which colour?"


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"answers": ["4", "five", "five"]}, "five"),
        ({"answers": [{"answer": "a", "id": 1}, {"answer": "b", "id": 2}]}, "a"),
        ({"answers": ["b", "a"], "multiple_choice_answer": "a"}, "a"),
        ({"label": ["14"]}, "14"),
    ],
)
def test_of_several_answers_the_most_frequent_one_counts(given, answer):
    assert parse({"image": "a", "question": "how many?", **given}).answer == answer


def test_options_must_be_in_the_question():
    """A model would choose among answers that it does not see."""
    raw = {"image": "a", "question": "which is dairy?", "answer": "1", "options": ["bread", "milk"]}
    with pytest.raises(BadRow, match="has options, which are not read: write the options into the question"):
        parse(raw)
    with pytest.raises(BadRow, match="has A, B, which are not read"):
        parse({**raw, "options": None, "A": "bread", "B": "milk"})
    assert parse({**raw, "question": "which is dairy? bread or milk"}).answer == "1"
    assert parse({**raw, "options": []}).answer == "1"


@pytest.mark.parametrize(
    ("image", "read"),
    [
        (SPELT, (PIXEL,)),
        (f"data:image/png;base64,{base64.encodebytes(20 * PIXEL).decode()}", (20 * PIXEL,)),  # in lines
        ("file:///a%20b.png", ("/a b.png",)),
        (None, ()),
        ({"bytes": None, "path": None}, ()),
        ({"bytes": None, "path": "a.png"}, ("a.png",)),
        ({"bytes": b"", "path": None}, "image is empty"),  # it is no row without an image
        ({"bytes": b"", "path": ""}, "image is empty"),
        ("https://a.b/c.png", "'https://a.b/c.png' is not a file: save it and write its path"),
        ("data:image/png;base64,!", "'data:image/png;base64',... holds no base64"),
        ("data:image/png;base64,\xe9", "'data:image/png;base64',... holds no base64"),
        ("x" * 5000, "is a text of 5000 characters, not a path"),
    ],
)
def test_what_an_image_can_be(image, read):
    raw = {"image": image, "question": "what?", "answer": "red"}
    if isinstance(read, tuple):
        assert parse(raw).images == read
        assert image_names(raw) == [name for name in read if isinstance(name, str)]
    else:
        with pytest.raises(BadRow) as refused:
            parse(raw)
        assert read in str(refused.value) and image_names(raw) == []


def test_what_else_a_row_may_have():
    """Columns of other data sets with names that mean something else there, or that repeat what is there."""
    raw = {"image": "a", "question": "what?", "answer": "red"}
    for more in ({"texts": []}, {"texts": ["x"]}, {"completion": "z"}, {"history": "long"}, {"system": 3}):
        assert (parse({**raw, **more}).turns, parse({**raw, **more}).answer) == ((), "red")
    system = {"role": "system", "content": "s"}
    row = parse({"system": "s ", "messages": [system, {**USER, "content": "what?"}, RED]})
    assert [turn.role for turn in row.turns] == ["system", "user"] and row.turns[0].text == "s"
    for blank in ("", [text(" ")]):  # which does not stand for the column
        first = {"role": "system", "content": blank}
        row = parse({"system": "s", "messages": [first, {**USER, "content": "what?"}, RED]})
        assert [(turn.role, turn.text) for turn in row.turns] == [("system", "s"), ("user", "what?")]
    row = parse({"messages": [{**USER, "content": "how?"}, {**RED, "content": "Use <video> or <image>.", "weight": 1}]})
    assert (row.answer, row.images) == ("Use <video> or <image>.", ())
    pictured = {"image": "a.jpg", "image_url": "https://a", "messages": [{**USER, "content": "what?"}, RED]}
    assert parse(pictured).images == ("a.jpg",)
    with pytest.raises(BadRow, match="has messages beside prompt and completion"):
        parse({"messages": [RED], "prompt": [{**USER, "content": "what?"}], "completion": [RED]})
    with pytest.raises(BadRow, match="question is a list, not text"):
        parse({"image": "a", "prompt": [{**USER, "content": "what?"}], "input": "x", "answer": "y"})
    named = {"prompt": [{**USER, "content": [{"type": "image", "image": "b.png"}, text("?")]}], "completion": [RED]}
    assert image_names(named) == ["b.png"] == [*parse(named).images]
    with pytest.raises(BadRow, match="has options, which are not read"):
        parse({**raw, "system": "s", "options": {"A": "bread", "B": "milk"}})


def test_an_id_is_the_first_of_several():
    assert parse({"id": "7", "question_id": 1, "image": "a", "question": "what?", "answer": "red"}).id == "7"
