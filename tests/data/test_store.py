"""Encoded rows on disk: encoded and checked once, encoded again after a change; bad rows are listed together."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from antgmm_jax.families.common.words import IMAGE
from antgmm_jax.families.llava.presets import sized as llava
from antgmm_jax.io import shards
from data import building, readers, store
from data.building import build, read_all
from data.encoding import Encoder
from data.readers import read_records
from data.source import InMemorySource
from data.store import open_encoded, open_if_encoded
from data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = llava(
    vision=(1, 16, 1, 16),
    text=(1, 16, 1, 16),
    head_dims=(16, 16),
    image=16,
    patch=8,
    vocab=512,
    image_token=IMAGE,
)
WORDS = ["is it red or green?", "red", "green", "question: "]


def encoder(**about):
    return Encoder(new_processor(CONFIG, train_tokenizer(WORDS * 3, vocab=512, min_frequency=2)), CONFIG, **about)


@pytest.fixture(scope="module")
def encode():
    return encoder()


@pytest.fixture
def rows(tmp_path):
    """A JSONL file of 6 rows with 3 pictures; one row has no picture, one has two."""
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    shown = ["0.png", "1.png", ["2.png", "0.png"], [], "1.png", "2.png"]
    write(tmp_path, [{"image": image, "question": "is it red?", "answer": f"red {k}"} for k, image in enumerate(shown)])
    return tmp_path / "rows.jsonl"


def write(folder, lines):
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def opened(rows, encode, **about):
    return open_encoded(read_records("jsonl", rows, **about), encode, rows.parent / "cache")


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        if isinstance(one[name], dict):
            same(one[name], other[name])
        else:
            np.testing.assert_array_equal(one[name], other[name])
            assert np.asarray(one[name]).dtype == np.asarray(other[name]).dtype


def test_rows_equal_their_encoding_with_and_without_stored_pictures(rows, encode, monkeypatch):
    source = read_records("jsonl", rows)
    kept = opened(rows, encode)
    monkeypatch.setattr(store, "MOST_BYTES", 2000)  # more than one row, less than all
    decoded = open_encoded(source, encode, rows.parent / "other")
    assert kept.kept and not decoded.kept
    assert kept.index.fingerprint == decoded.index.fingerprint
    for number in range(6):
        expected = encode(source[number])
        for stored in (kept, decoded):
            same(stored[number], expected)
            assert stored.index.prompt[number] == len(expected["prompt"])
            assert stored.index.answer[number] == len(expected["answer"])
    np.testing.assert_array_equal(kept.index.slots, [1, 1, 2, 0, 1, 1])


def test_facts_and_cells_are_stored_and_pictures_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MOST_BYTES", 0)
    config = llava(
        vision=(1, 16, 1, 16), text=(1, 16, 1, 16), head_dims=(16, 16), image=96, patch=48, vocab=512, image_token=IMAGE
    )
    reads = Encoder(new_processor(config, train_tokenizer(WORDS * 3, vocab=512, min_frequency=2)), config)
    source = maad.source("s", "val", 5)
    stored = open_encoded(source, reads, tmp_path)
    assert stored.kept
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "__getitem__", lambda *_: pytest.fail("drawn again"))
        again = open_encoded(source, reads, tmp_path)
        rows = [again[number] for number in range(5)]
    for row, record in zip(rows, source, strict=True):
        np.testing.assert_array_equal(row["images"]["pixels"], record.images[0][None])
        np.testing.assert_array_equal(row["cells"], record.cells)
        assert {name: int(value) for name, value in row["latents"].items()} == record.latents
    assert [again.index.names[kind] for kind in again.index.types] == [record.type for record in source]


def test_a_restart_parses_no_row_and_opens_no_picture(rows, encode, monkeypatch):
    first = opened(rows, encode)
    for module, name in ((readers, "parse"), (store, "build")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("read again"))
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("a picture was opened"))
    again = opened(rows, encode)
    assert again.index.fingerprint == first.index.fingerprint
    for number in range(6):
        same(again[number], first[number])


def test_rows_are_encoded_again_by_another_version_of_the_processor(rows, encode, monkeypatch):
    opened(rows, encode)
    source = read_records("jsonl", rows)
    assert open_if_encoded(source, encode, rows.parent / "cache") is not None
    monkeypatch.setattr("data.encoding.versions_of", lambda *names: {"torchvision": "0.1"})
    assert open_if_encoded(source, encode, rows.parent / "cache") is None


@pytest.mark.parametrize("change", [{"type": "colour"}, {"slice": "rare"}])
def test_what_scores_are_grouped_by_is_part_of_the_data(rows, encode, change):
    before = opened(rows, encode).index.fingerprint
    first, *others = [json.loads(line) for line in rows.read_text().splitlines()]
    write(rows.parent, [{**first, **change}, *others])
    assert opened(rows, encode).index.fingerprint != before


def test_changed_data_or_settings_are_encoded_again(rows, encode):
    before, folder = opened(rows, encode), rows.parent
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    seen = {before.index.fingerprint}

    def changed(encoded_rows):
        assert encoded_rows.index.fingerprint not in seen
        seen.add(encoded_rows.index.fingerprint)

    write(folder, [*lines[:5], {**lines[5], "answer": "green"}])
    reopened = opened(rows, encode)
    changed(reopened)
    assert reopened.source.words(5).answer == "green"
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(folder / "1.png")
    reopened = opened(rows, encode)
    changed(reopened)
    assert not reopened.images(1)["pixels"].any()
    changed(opened(rows, encode, most=5))
    changed(opened(rows, encoder(template="Q: {question}")))
    # Another limit repeats the check of the same rows.
    assert opened(rows, encoder(max_answer=60)).index.fingerprint == reopened.index.fingerprint
    with pytest.raises(AntgmmError, match="6 of 6 rows are too long"):
        opened(rows, encoder(max_answer=1))
    # Earlier encodings are kept.
    write(folder, lines)
    assert len([path for path in (folder / "cache").iterdir() if path.is_dir()]) == 6


def test_long_rows_are_dropped_and_counted_on_request(rows, encode, monkeypatch):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[1]["answer"], lines[4]["question"] = "red " * 9, "is it red? " * 9
    write(rows.parent, lines)
    limits, good = encoder(max_length=20, max_answer=5), [0, 2, 3, 5]
    with pytest.raises(AntgmmError, match=r"2 of 6 rows are too long(.|\n)*line 2: answer of(.|\n)*line 5: prompt of"):
        opened(rows, limits)

    def check(kept_rows):
        assert (kept_rows.dropped, len(kept_rows), len(kept_rows.source)) == (2, 4, 4)
        for place, number in enumerate(good):
            assert kept_rows.source.words(place).answer == lines[number]["answer"]
            same(kept_rows[place], encode(kept_rows.source[place]))
        np.testing.assert_array_equal(kept_rows.index.slots, [1, 2, 0, 1])

    check(opened(rows, limits, drop_long=True))
    with monkeypatch.context() as patch:
        patch.setattr(store, "build", lambda *_, **__: pytest.fail("read again"))
        check(opened(rows, limits, drop_long=True))
        monkeypatch.setattr(store, "MOST_BYTES", 0)
    # The same source can be read again by another encoder.
    source = read_records("jsonl", rows, drop_long=True)
    for limit, count in ((limits, 4), (encoder(), 6)):
        decoded = open_encoded(source, limit, rows.parent / "decoded")
        assert len(decoded) == count == len(source) and not decoded.kept
        if count == 4:
            check(decoded)
    with pytest.raises(AntgmmError, match="6 of 6 rows are too long"):
        opened(rows, encoder(max_answer=1), drop_long=True)


def test_bad_rows_are_listed_together_and_nothing_is_stored(rows, encode):
    folder = rows.parent
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    (folder / "text.png").write_text("no picture")
    lines[1]["image"], lines[2]["image"], lines[4]["answer"] = "none.png", ["0.png", "text.png"], ""
    write(folder, lines)
    with pytest.raises(AntgmmError) as refused:
        opened(rows, encode)
    head, *reasons = str(refused.value).split("\n")
    assert head == f"{rows}: 3 of 6 rows are invalid; correct or remove them"
    assert [reason.split(" cannot")[0] for reason in reasons] == [
        "line 2: image none.png is missing",
        "line 3: image text.png",
        "line 5: answer is empty",
    ]
    assert not [path for path in (folder / "cache").iterdir() if path.is_dir()]
    write(folder, [lines[k] for k in (0, 3, 5)])
    with pytest.raises(AntgmmError, match="has 3 records, but samples = 9: reduce samples"):
        opened(rows, encode, most=9)


def test_a_picture_removed_after_the_check_is_named(rows, encode, monkeypatch):
    monkeypatch.setattr(store, "MOST_BYTES", 0)
    encoded_rows = opened(rows, encode)
    (rows.parent / "1.png").unlink()
    with pytest.raises(AntgmmError, match=r"has changed since it was read: line 2: image 1\.png is missing"):
        encoded_rows.images(1)


def test_a_part_that_is_missing_is_one_line_that_names_what_to_remove(rows, encode, monkeypatch):
    """Its rows were those of another part before."""
    monkeypatch.setattr(building, "PART", 2)
    opened(rows, encode)
    (entry,) = [path for path in (rows.parent / "cache").iterdir() if path.is_dir()]
    for part in ("images", "tokens"):
        (entry / part / "00000-00001.array_record").rename(rows.parent / "away")
        with pytest.raises(AntgmmError, match=f"{part} is damaged, a file is missing: remove {entry} and run it again"):
            opened(rows, encode)
        (rows.parent / "away").rename(entry / part / "00000-00001.array_record")
    opened(rows, encode)
    shutil.rmtree(entry)
    assert len(opened(rows, encode)) == 6


def test_a_killed_writer_leaves_no_partial_rows(rows, encode, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building.folders, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            opened(rows, encode)
    assert len(opened(rows, encode)) == 6


class Watched(Encoder):
    """Counts the records that it encodes, and stops after a number of them."""

    calls, stop, error = 0, 10**9, KeyboardInterrupt

    def __call__(self, record):
        self.calls += 1
        if self.calls > self.stop:
            raise self.error
        return super().__call__(record)


def watched():
    return Watched(new_processor(CONFIG, train_tokenizer(WORDS * 3, vocab=512, min_frequency=2)), CONFIG)


@pytest.mark.parametrize(("drop", "most"), [(False, 1 << 30), (True, 1 << 30), (False, 2000)])
def test_an_interrupted_build_continues_with_the_rows_that_are_missing(rows, encode, monkeypatch, drop, most):
    monkeypatch.setattr(building, "PART", 2)
    monkeypatch.setattr(store, "MOST_BYTES", most)
    monkeypatch.setattr(store, "THREADS", 1)
    lines = [json.loads(line) | {"type": f"t{k % 2}"} for k, line in enumerate(rows.read_text().splitlines())]
    lines[3 if drop else 5]["answer"] = "red " * 70 if drop else "red"
    write(rows.parent, lines)
    first = watched()
    first.stop = 5
    with pytest.raises(KeyboardInterrupt):
        opened(rows, first, drop_long=drop)
    (left,) = [path for path in (rows.parent / "cache").iterdir() if path.is_dir()]
    (left / "tokens" / ".00000-00009.array_record.tmp").write_bytes(b"half a file")
    again = watched()
    resumed = opened(rows, again, drop_long=drop)
    assert again.calls == 2
    whole = open_encoded(read_records("jsonl", rows, drop_long=drop), encode, rows.parent / "whole")
    assert (resumed.kept, resumed.dropped) == (whole.kept, whole.dropped) == (most > 2000, int(drop))
    same(resumed.index._asdict(), whole.index._asdict())
    for number in range(len(whole)):
        same(resumed[number], whole[number])
    assert [path.name for path in (rows.parent / "cache").iterdir() if path.is_dir()] == [left.name[1:-4]]


def test_what_an_interrupted_build_did_of_other_rows_is_encoded_again(rows, encode, monkeypatch):
    monkeypatch.setattr(building, "PART", 2)

    def build_all(encoder, place):
        source = read_records("jsonl", rows)
        build(source, encoder, place, lambda done, note="": None, most=None, about={"data": source.digest()})

    place, first = rows.parent / "built", watched()
    first.stop = 5
    with pytest.raises(KeyboardInterrupt):
        build_all(first, place)
    lines = [json.loads(line) | {"answer": "green"} for line in rows.read_text().splitlines()]
    write(rows.parent, lines)
    again = watched()
    build_all(again, place)
    assert again.calls == 6
    whole = rows.parent / "whole"
    build_all(encode, whole)
    files = [path.relative_to(whole) for path in whole.rglob("*.array_record")]
    assert files and all((place / file).read_bytes() == (whole / file).read_bytes() for file in files)


def test_a_full_disk_is_one_line_and_another_start_continues(rows, encode, monkeypatch):
    monkeypatch.setattr(building, "PART", 2)
    real = shards.ArrayRecordWriter
    with monkeypatch.context() as patch:
        full = iter([False, False, True])  # tokens and images of the first part, then the disk is full

        def writer(path, options):
            return real("/dev/full" if next(full, True) else path, options)

        patch.setattr(shards, "ArrayRecordWriter", writer)
        with pytest.raises(AntgmmError, match=r"^cannot write .*: .*No space left[^\n]*; free space and run it again$"):
            opened(rows, encode)
    again = watched()
    assert len(opened(rows, again)) == 6
    assert again.calls == 4


def test_bad_rows_behind_a_stored_part_are_listed_and_the_part_is_removed(rows, encode, monkeypatch):
    monkeypatch.setattr(building, "PART", 2)
    (rows.parent / "2.png").write_bytes((rows.parent / "2.png").read_bytes()[:200])
    with pytest.raises(AntgmmError, match=r"2 of 6 rows(.|\n)*line 3: image 2.png(.|\n)*line 6: image 2.png"):
        opened(rows, encode)
    assert not [path for path in (rows.parent / "cache").iterdir() if path.is_dir()]


def test_the_cache_removes_the_oldest_data(rows, encode, monkeypatch):
    folder, names = rows.parent, []
    for number in range(4):
        write(folder, [{"image": "0.png", "question": "is it red?", "answer": f"red {number}"}])
        if number == 2:
            monkeypatch.setattr(store, "CACHE_BYTES", 0)  # all but the newest are removed
        opened(rows, encode)
        names.append({path.name for path in (folder / "cache").iterdir() if path.is_dir()})
    assert [len(folders) for folders in names] == [1, 2, 1, 1]
    assert not names[3] & names[2]


def test_data_that_a_process_has_open_stays_in_the_cache(rows, encode, monkeypatch):
    monkeypatch.setattr(store, "CACHE_BYTES", 0)
    first = opened(rows, encode)
    write(rows.parent, [{"image": "0.png", "question": "is it red?", "answer": "no"}])
    cache = rows.parent / "cache"

    def kept():
        opened(rows, encode)
        return {path.name for path in cache.iterdir() if path.is_dir()}

    assert len(kept()) == 2
    write(rows.parent, [{"image": "0.png", "question": "is it red?", "answer": "yes"}])
    assert len(first) == 6 and len(kept()) == 2  # the second one was closed
    del first
    write(rows.parent, [{"image": "0.png", "question": "is it red?", "answer": "perhaps"}])
    names = kept()
    assert len(names) == 1
    assert {path.name for path in cache.iterdir()} == {
        f"{name}{end}" for name in names for end in ("", ".lock", ".used")
    }


def test_progress_is_reported(rows, encode):
    counts = []
    ids = [record.id for _, record in read_all(read_records("jsonl", rows), lambda r: r, lambda n, _: counts.append(n))]
    assert ids == [f"line {number}" for number in range(1, 7)]
    assert counts == [1, 2, 3, 4, 5, 6]


def test_the_fingerprint_of_records_in_memory_covers_their_pixels(encode, tmp_path):
    record = replace(maad.source("s", "val", 1)[0], cells=None)
    other = replace(record, images=(255 - record.images[0],))
    prints = [
        open_encoded(InMemorySource([each]), encode, tmp_path).index.fingerprint for each in (record, other, record)
    ]
    assert prints[0] == prints[2] != prints[1]


_MEMORY = """
import json, sys
from experiments.lab.bench.stream import child
from tests.marks import long
print(json.dumps(child(sys.argv[1], sys.argv[2], 64)))
"""


@pytest.mark.long
def test_memory_does_not_grow_with_rows(tmp_path):
    from experiments.lab.bench import stream

    stream.save_model(tmp_path / "processor", side=64)
    environment, peaks = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}, []
    for count in (200, 6_000):
        file = stream.write_rows(tmp_path / "data", count, side=64)
        command = [sys.executable, "-c", _MEMORY, str(file), str(tmp_path / "processor")]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        peaks.append(json.loads(done.stdout)["peak"])
    # The pixels of all rows are 74 MB.
    assert peaks[1] - peaks[0] < 25e6
