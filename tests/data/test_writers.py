"""Writers of rows: what they write is read back, and a failed write leaves nothing."""

import json

import numpy as np
import pytest

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from data.maad.tiers import TIERS, products
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
from tests.data.own_files import read


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
