"""Pairs: questions of one sample with the picture of another, answered once by the teacher."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from data.record import Turn
from data.source import InMemorySource
from experiments.run.rows import pairs
from experiments.run.rows.datasets import encoded
from experiments.run.rows.samples import Samples
from experiments.run.schema.recipe import load_recipe
from experiments.run.scores.evaluation import evaluate
from tests.experiments.tiny import save_llava, save_teacher, taken, write_recipe

ROWS = 10


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    directory = save_teacher(tmp_path_factory.mktemp("m") / "teacher")
    config, params = load_hf(directory)
    processor = load_processor(directory)
    recipe = load_recipe(write_recipe(directory.with_name("r.toml"), directory), ["teacher.pairs=14"])
    return recipe, Samples(maad.source("s", "train", ROWS), processor, config), config, params, processor


def with_ends(*model, **limits):
    """Scores and answers of a random model, which never ends an answer, cut to texts of 0 to 4 characters."""
    figures, replies = evaluate(*model, **limits)
    return figures, [reply[: 2 * (row % 3)] for row, reply in enumerate(replies)]


def test_every_sample_gives_its_question_and_its_picture_once_per_round(given):
    samples = given[1].records
    source = pairs.paired(samples, 2 * ROWS)
    made, names = [*source], [record.id for record in samples]
    for turn in (made[:ROWS], made[ROWS:]):
        asks, shows = zip(*(record.id.split(" on ") for record in turn), strict=True)
        assert sorted(asks) == sorted(shows) == sorted(names)
        assert all(ask != show for ask, show in zip(asks, shows, strict=True))
    for row, record in enumerate(made):
        ask, show = (samples[names.index(name)] for name in record.id.split(" on "))
        assert (record.question, record.text, record.type) == (ask.question, ask.text, ask.type)
        np.testing.assert_array_equal(record.images[0], show.images[0])
        words = source.words(row)
        assert (words.id, words.question, words.answer) == (record.id, record.question, record.answer)
    assert [record.id for record in pairs.paired(samples, 5)] == [record.id for record in made[:5]]


def test_answers_are_the_teachers_and_computed_once(given, tmp_path, monkeypatch):
    recipe, samples, config, params, processor = given
    longest = {"evaluate": recipe.evaluate.model_copy(update={"max_new_tokens": 6})}
    recipe = recipe.model_copy(update=longest)
    monkeypatch.setattr(pairs, "evaluate", with_ends)
    both = pairs.with_pairs(recipe, samples, config, params, processor, tmp_path)
    made = Samples(pairs.paired(samples.records, 14), processor, config)
    _, replies = with_ends(config, params, made, processor, max_new_tokens=6)
    assert {len(text) for text in replies} == {0, 2, 4}
    expected = [(r.id, text) for r, text in zip(made.records, replies, strict=True) if text]
    records = [both.records.words(row) for row in range(len(both))]
    assert [(r.id, r.answer) for r in records[ROWS:]] == expected
    assert [(r.id, r.answer) for r in both.records][ROWS:] == expected
    assert [r.id for r in records[:ROWS]] == [r.id for r in samples.records]
    first = np.arange(ROWS)
    jax.tree.map(np.testing.assert_array_equal, taken(both, first)["images"], taken(samples, first)["images"])

    monkeypatch.setattr(pairs, "evaluate", lambda *a, **k: pytest.fail("answered again"))
    again = pairs.with_pairs(recipe, samples, config, params, processor, tmp_path)
    assert again.fingerprint == both.fingerprint != samples.fingerprint
    # A shorter limit gives other answers.
    shorter = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"max_new_tokens": 2})})
    with pytest.raises(pytest.fail.Exception, match="answered again"):
        pairs.with_pairs(shorter, samples, config, params, processor, tmp_path)


def test_answers_that_may_be_cut_are_left_out(given, tmp_path, capsys):
    recipe, samples, config, params, processor = given
    both = pairs.with_pairs(recipe, samples, config, params, processor, tmp_path)
    assert len(both) == ROWS
    assert "pairs: 14 of 14 answers are empty, cut or too long, and left out" in capsys.readouterr().err


def test_a_pair_of_conversations_is_the_last_question_alone():
    """Earlier answers are about the pictures of their own row."""
    turns = (
        Turn("system", ("brief",)),
        Turn("user", (None, "what?")),
        Turn("assistant", ("wine",)),
        Turn("user", ("red?",)),
    )
    records = [replace(record, turns=turns, question="red?") for record in maad.source("s", "train", 2)]
    source = pairs.paired(InMemorySource(records), 2)
    assert source[0].turns == (Turn("system", ("brief",)), Turn("user", (None, "red?")))
    shown = next(record for record in records if source[0].id.endswith(f" on {record.id}"))
    np.testing.assert_array_equal(source[0].images[0], shown.images[0])


def test_pairs_are_packed_like_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "evaluate", with_ends)
    directory = save_llava(tmp_path / "teacher")
    config, params = load_hf(directory)
    processor = load_processor(directory)
    recipe = load_recipe(write_recipe(tmp_path / "r.toml", directory), ["teacher.pairs=6", "pack=256"])
    samples = encoded(recipe, maad.source("s", "train", ROWS), processor, config, trained=True)
    both = pairs.with_pairs(recipe, samples, config, params, processor, tmp_path)
    batch = next(both.shuffled(1, 0))
    assert batch["segment_ids"].shape == (1, 256) and batch["segment_ids"].max() > 1


def test_empty_answers_are_dropped_and_another_key_computes_answers_again(given, tmp_path):
    made = pairs.paired(given[1].records, 3)
    records = pairs.answered(made, lambda: ["a", "", "b"], tmp_path / "x.json", "one")
    assert [(r.id, r.answer) for r in records] == [(made[0].id, "a"), (made[2].id, "b")]
    np.testing.assert_array_equal(records[1].images[0], made[2].images[0])
    again = pairs.answered(made, lambda: pytest.fail("answered again"), tmp_path / "x.json", "one")
    assert [r.answer for r in again] == ["a", "b"]
    assert [r.answer for r in pairs.answered(made, lambda: ["c"] * 3, tmp_path / "x.json", "two")] == ["c"] * 3


def test_pairs_that_are_too_long_are_left_out_where_samples_are(given):
    _, _, config, _, processor = given
    records = InMemorySource([*maad.source("s", "train", 4)])
    records = InMemorySource(
        [replace(r, question="red " * 300 * (row % 2) + r.question) for row, r in enumerate(records)]
    )
    made = [*pairs.paired(records, 4)]
    with pytest.raises(AntgmmError, match="^2 of 4 rows are too long"):
        Samples(pairs.paired(records, 4), processor, config, max_length=250)
    records.drops_long = True
    samples = Samples(pairs.paired(records, 4), processor, config, max_length=250)
    expected = [record for record in made if len(record.question) < 1000]
    assert len(samples) == len(expected) == samples.rows.dropped == 2
    for row, record in enumerate(expected):
        assert (samples.records.words(row).id, samples.records[row].id) == (record.id, record.id)
        np.testing.assert_array_equal(samples.records[row].images[0], record.images[0])
    assert samples.records.digest() == pairs.paired(records, 4).digest()
