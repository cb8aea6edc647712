"""Batches of prepared data equal those of the rows bit for bit; what does not fit is refused in one line."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from antgmm_jax.io.folders import claimed
from data.prepared import PreparedSource, prepare
from data.readers import read_records
from data.tokenizer import train_tokenizer
from experiments.run.progress.forecast import look_at
from experiments.run.rows.datasets import load_records
from experiments.run.rows.samples import Samples
from experiments.run.schema.tables import PreparedData
from tests.data.test_store import CONFIG, WORDS, encoder

ROWS = 9


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A JSONL file of questions and conversations of several lengths, and its prepared folder."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for row in range(ROWS):
        pixels = np.random.default_rng(row).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        about = {"image": [f"{row}.png"] * (row % 3), "type": f"t{row % 2}", "id": f"ad-{row}"}
        turns = [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "red " * (1 + row)}]
        single = {"question": "is it green?", "answer": "green " * (1 + row % 4), "text": "red"}
        lines.append({**about, **({"messages": turns * 2} if row % 4 == 1 else single)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stored = prepare(read_records("jsonl", folder / "rows.jsonl"), encoder(max_answer=40), folder / "prepared")
    assert (len(stored), stored.kept) == (ROWS, True)
    return folder


def samples(source, **about):
    processor = new_processor(CONFIG, train_tokenizer(WORDS * 3, vocab=512, min_frequency=2))
    return Samples(source, processor, CONFIG, **{"max_length": 512, "max_answer": 40, **about})


@pytest.mark.parametrize("about", [{}, {"buckets": (16, 32)}, {"pack": 64}], ids=["whole", "buckets", "packed"])
def test_batches_equal_those_of_the_rows_bit_for_bit(files, about):
    rows = samples(read_records("jsonl", files / "rows.jsonl"), **about)
    data = PreparedData(kind="prepared", path=str(files / "prepared"), samples=ROWS)
    prepared = samples(load_records(data), **about)
    assert prepared.fingerprint == rows.fingerprint
    whole, again = rows.shuffled(2, 3, shift=1), prepared.shuffled(2, 3, shift=1)
    for _ in range(8):  # two epochs
        one, other = next(whole), next(again)
        assert one.keys() == other.keys()
        jax.tree.map(np.testing.assert_array_equal, one, other)
    ids = np.arange(ROWS)
    assert prepared.names(ids)[0] == rows.names(ids)[0]
    for row in range(ROWS):
        one, other = (vars(each.records.words(row)) for each in (rows, prepared))
        assert {**one, "images": ()} == other


def test_the_rows_files_are_not_needed_and_the_forecast_reads_prepared_rows(files, tmp_path):
    shutil.copytree(files / "prepared", tmp_path / "moved")
    source = PreparedSource(tmp_path / "moved")
    looks = look_at(source, encoder(max_answer=40))
    expected = look_at(read_records("jsonl", files / "rows.jsonl"), encoder(max_answer=40))
    assert {**looks, "read": 0, "unread": 0} == {**expected, "read": 0, "unread": 0}
    assert looks["unread"] == 0
    with pytest.raises(AntgmmError, match="holds encoded rows without their images"):
        source[0]


def refused(message, call, *arguments, **about):
    with pytest.raises(AntgmmError, match=message) as caught:
        call(*arguments, **about)
    assert "\n" not in str(caught.value)


def test_other_settings_and_another_processor_are_refused(files):
    source = PreparedSource(files / "prepared")
    refused("prepared with max_answer = 40, not 50: prepare", samples, source, max_answer=50)
    refused("prepared with prompt = '.*', not 'Q: {question}'", samples, source, prompt="Q: {question}")
    other = new_processor(CONFIG, train_tokenizer(["is it blue?"] * 9, vocab=512, min_frequency=2))
    refused("prepared with another processor", Samples, source, other, CONFIG, max_length=512, max_answer=40)
    refused("has 9 records, but samples = 5: set samples = 9", PreparedSource, files / "prepared", 5)


def test_damaged_and_foreign_folders_are_refused(files, tmp_path):
    refused("is not prepared data", PreparedSource, files)
    refused("is not prepared data", PreparedSource, tmp_path / "nothing")
    for number, change in enumerate((lambda x: x.unlink(), lambda x: x.write_bytes(x.read_bytes()[:-1]))):
        folder = shutil.copytree(files / "prepared", tmp_path / str(number))
        change(folder / "tokens" / "00000-00000.array_record")
        refused("damaged: tokens/00000-00000.array_record is missing or has another size", PreparedSource, folder)
    folder = shutil.copytree(files / "prepared", tmp_path / "flipped")
    file = folder / "images" / "00000-00000.array_record"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused(re.escape(f"{file} is damaged"), lambda: [*samples(PreparedSource(folder)).in_order(3)])


def test_a_folder_is_prepared_once_and_other_rows_need_another_one(files, monkeypatch):
    source = read_records("jsonl", files / "rows.jsonl")
    monkeypatch.setattr("data.prepared.build", lambda *_, **__: pytest.fail("prepared again"))
    assert len(prepare(source, encoder(max_answer=40), files / "prepared")) == ROWS
    fewer = read_records("jsonl", files / "rows.jsonl", most=4)
    refused("holds other rows or was made with other settings", prepare, fewer, encoder(), files / "prepared")


def test_prepared_rows_overlap_with_the_files_that_they_were_made_from(files, tmp_path):
    rows, parts = files / "rows.jsonl", {}
    for name, about in {"first": {"most": 4}, "train": {"split": "train"}}.items():
        prepare(read_records("jsonl", rows, **about), encoder(max_answer=40), tmp_path / name)
        parts[name] = PreparedSource(tmp_path / name)
    parts["whole"] = PreparedSource(files / "prepared")
    shutil.copytree(files, tmp_path / "other", ignore=shutil.ignore_patterns("prepared"))
    other = tmp_path / "other" / "rows.jsonl"
    other.write_text(rows.read_text().replace("red?", "blue?"))

    def overlapping(source):
        results = {name: prepared.overlaps(source) for name, prepared in parts.items()}
        assert results == {name: source.overlaps(prepared) for name, prepared in parts.items()}
        return {name for name, overlaps in results.items() if overlaps}

    assert overlapping(read_records("jsonl", rows)) == {"first", "train", "whole"}
    assert overlapping(read_records("jsonl", rows, most=2, spread=True)) == {"first", "train", "whole"}
    assert overlapping(read_records("jsonl", rows, split="test")) == {"first", "whole"}
    assert overlapping(read_records("jsonl", rows, split="train", most=3)) == {"first", "train", "whole"}
    assert overlapping(read_records("jsonl", other)) == set()
    assert overlapping(parts["train"]) == {"first", "train", "whole"}


def test_a_second_process_does_not_prepare_into_the_same_folder(files):
    rows = read_records("jsonl", files / "rows.jsonl")
    with claimed(files / "twice"):
        refused("is being written by another process", prepare, rows, encoder(), files / "twice")


@pytest.mark.parametrize("path", ["gs://bucket/prepared", "hf:org/rows/prepared"])
def test_a_folder_in_a_store_or_on_the_hub_is_refused_in_one_line(path):
    data = PreparedData(kind="prepared", path=path, samples=ROWS)
    refused("prepared data is read from a disk alone: copy the folder to one", load_records, data)


def test_copied_rows_are_noticed_where_their_pictures_are_copied_too(files, tmp_path):
    """On another machine files have other times."""
    prepared = PreparedSource(files / "prepared")
    for folder in ("copied", "other"):
        (tmp_path / folder).mkdir()
        for file in (*files.glob("*.png"), files / "rows.jsonl"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    assert prepared.overlaps(read_records("jsonl", tmp_path / "copied" / "rows.jsonl"))
    assert read_records("jsonl", tmp_path / "copied" / "rows.jsonl", most=2).overlaps(prepared)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "other" / "1.png")
    assert not prepared.overlaps(read_records("jsonl", tmp_path / "other" / "rows.jsonl"))


def test_rows_that_another_version_prepared_are_named(files, monkeypatch):
    source = PreparedSource(files / "prepared")
    assert source.other_versions() == ""
    here = source._about["versions"]
    monkeypatch.setattr("data.prepared.versions", lambda: {**here, "pillow": "99.0"})
    assert source.other_versions() == f"pillow {here['pillow']} (here 99.0)"
