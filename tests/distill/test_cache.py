"""A teacher cache holds the teacher's states; a stale, damaged or incomplete cache is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import shards
from antgmm_jax.io.books import read_book, write_book
from distill.build import cache_size
from distill.cache import fingerprint, open_cache, stored_names
from experiments.lab.servers.starting import free_port
from tests.distill import toy
from tests.distill.cached import KEY, PARAMS, STATES, TEACHER, batches, build

ROOT = Path(__file__).resolve().parents[2]


def test_rows_are_the_final_states_at_answer_positions(tmp_path):
    seen = []
    build(tmp_path / "cache", progress=lambda done, samples: seen.append((done, samples)))
    assert seen == [(4, 8), (8, 8)]
    build(tmp_path / "cache", progress=lambda done, samples: seen.append((done, samples)))
    assert seen[2:] == [(8, 8)]  # a complete cache is not built again
    cache = open_cache(tmp_path / "cache", key=KEY)
    host = toy.batch(1, length=5, answers=2)
    final = TEACHER.apply(PARAMS, toy.device(host), collect=("final",))["final"]
    expected = np.take_along_axis(np.asarray(final), host["positions"][..., None], axis=1)
    expected = np.where((host["targets"] >= 0)[..., None], expected, 0)  # padding is not stored
    shuffled = {name: x[::-1] for name, x in host.items()}
    rows = cache.rows(shuffled)["final"]
    assert rows.shape == (4, 2, 6)
    np.testing.assert_array_equal(rows, expected[::-1].astype(jnp.bfloat16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


@pytest.mark.parametrize("in_memory", [False, True])
def test_states_are_stored_by_name(tmp_path, in_memory):
    build(tmp_path / "cache", names=STATES)
    cache = open_cache(tmp_path / "cache", key=KEY, names=STATES, in_memory=in_memory)
    states = TEACHER.apply(PARAMS, toy.device(toy.batch(0)), collect=("text/states",))["text/states"]
    expected = np.asarray(states).swapaxes(0, 1)[[2, 0, 2]].astype(jnp.bfloat16)
    rows = cache.rows({"index": np.array([2, 0, 2]), **{k: toy.batch(0)[k] for k in ("targets", "input_ids")}})
    np.testing.assert_array_equal(rows["text/states"], expected)
    alone = open_cache(tmp_path / "cache", key=KEY, in_memory=in_memory)
    np.testing.assert_array_equal(alone.read(np.arange(8))["final"], cache.read(np.arange(8))["final"])
    assert [*alone.read(np.arange(8))] == ["final"]


def test_a_stale_or_absent_cache_is_refused(tmp_path):
    build(tmp_path / "cache")
    changed = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), PARAMS)
    for key in (fingerprint(changed, "data"), fingerprint(PARAMS, "other data")):
        with pytest.raises(AntgmmError, match="another teacher, processor or data"):
            open_cache(tmp_path / "cache", key=key)
    with pytest.raises(AntgmmError, match="no teacher cache"):
        open_cache(tmp_path / "nothing", key=KEY)


def flip(content: bytes) -> bytes:
    """The content with one bit of a row's states flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (flip, r"00000-00001\.array_record is damaged"),
        (lambda content: content[:-40], r"00000-00001\.array_record is damaged"),
        (lambda content: None, "a file is missing"),
    ],
    ids=["altered", "cut short", "missing"],
)
def test_a_damaged_cache_is_refused(tmp_path, change, reason):
    build(tmp_path / "cache")
    file = tmp_path / "cache" / "00000-00001.array_record"
    content = change(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(AntgmmError, match=rf"{reason}.*remove .*cache"):
        open_cache(tmp_path / "cache", key=KEY, in_memory=True)


def test_a_stale_cache_is_replaced_and_a_current_one_kept(tmp_path):
    build(tmp_path / "cache", key="old")
    build(tmp_path / "cache")
    assert open_cache(tmp_path / "cache", key=KEY).samples == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    build(tmp_path / "cache", batches=lambda: (pytest.fail("a complete cache was built again") for _ in range(1)))


def test_a_cache_with_more_names_is_kept_and_one_with_fewer_is_replaced(tmp_path):
    build(tmp_path / "cache", names=STATES)
    made = (tmp_path / "cache" / "meta.json").stat().st_mtime_ns
    build(tmp_path / "cache", names=STATES[:1])
    assert (tmp_path / "cache" / "meta.json").stat().st_mtime_ns == made
    build(tmp_path / "less", names=STATES[1:])
    assert stored_names(tmp_path / "less", KEY) == STATES[1:]
    build(tmp_path / "less", names=STATES)
    open_cache(tmp_path / "less", key=KEY, names=STATES)
    assert {*stored_names(tmp_path / "less", KEY)} == {*STATES}
    assert stored_names(tmp_path / "less", "another") == stored_names(tmp_path / "absent", KEY) == ()


def test_an_interrupted_build_resumes(tmp_path):
    def broken():
        yield toy.batch(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", batches=broken)
    assert not (tmp_path / "cache").exists()
    # A file that a killed process was writing.
    (tmp_path / "cache.partial" / ".00000-00001.array_record.tmp").write_bytes(b"half a file")
    poisoned = toy.batch(0) | {"positions": np.full((4, 3), 10**6, np.int32)}  # stored: it must not run again
    build(tmp_path / "cache", batches=lambda: [poisoned, toy.batch(1)])
    build(tmp_path / "whole", batches=lambda: [toy.batch(0), toy.batch(1)])
    assert same_files(tmp_path / "cache", tmp_path / "whole")


def same_files(one: Path, other: Path) -> bool:
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return contents[0] == contents[1]


def test_repeated_rows_are_written_once(tmp_path):
    twice = {name: np.concatenate([x, x[-1:]]) for name, x in toy.batch(1).items()}
    build(tmp_path / "cache", batches=lambda: [toy.batch(0), twice, toy.batch(0)])
    build(tmp_path / "once", batches=lambda: [toy.batch(0), toy.batch(1)])
    assert same_files(tmp_path / "cache", tmp_path / "once")


def test_missing_rows_left_padding_and_long_batches_are_refused(tmp_path):
    with pytest.raises(AntgmmError, match="4 of 8 samples"):
        build(tmp_path / "cache", batches=lambda: [toy.batch(0)])
    padded = toy.batch(1)
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(AntgmmError, match="left"):
        build(tmp_path / "left", batches=lambda: [toy.batch(0), padded], names=STATES)
    build(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", key=KEY)
    with pytest.raises(AntgmmError, match="holds 3 positions"):
        cache.rows(toy.batch(0, answers=4))
    with pytest.raises(AntgmmError, match="8 samples"):
        cache.rows(toy.batch(2))


def test_a_cache_that_does_not_fit_is_refused_before_the_teacher_runs(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=287)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(AntgmmError, match="needs 2.88e-07 GB, but only 2.87e-07 GB are free"):
        build(tmp_path / "cache", batches=lambda: (pytest.fail("a batch was read") for _ in range(1)), size=288)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=288))
    build(tmp_path / "cache", size=288)


def test_a_full_disk_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ArrayRecordWriter", lambda _, options: ArrayRecordWriter("/dev/full", options))
    with pytest.raises(AntgmmError, match=r"^cannot write .*00000-00000.array_record: .*No space left[^\n]*; free"):
        build(tmp_path / "cache")


def test_cache_size_equals_the_stored_bytes(tmp_path):
    hosts = batches()
    counts = {"answer": [x["targets"] >= 0 for x in hosts], "text": [x["attention_mask"] for x in hosts]}
    totals = {name: int(sum(x.sum() for x in each)) for name, each in counts.items()}
    size = cache_size(TEACHER, PARAMS, toy.batch(0), samples=8, totals=totals, names=STATES)
    # Eight rows of 1, 2, 3, 1 and 1, 2, 1, 2 answer tokens of width 6; four states of 6, 5, 6, 5 and 5, 4, 5, 4 tokens.
    assert size == {"final": 2 * 13 * 6 + 32, "text/states": 2 * 40 * 4 * 6 + 32}
    build(tmp_path / "cache", names=STATES)
    stored = shards.Shards(tmp_path / "cache", 8)
    assert sum(len(stored[row]) for row in range(8)) == sum(size.values())


def test_a_cache_of_another_version_is_refused_and_replaced(tmp_path):
    build(tmp_path / "cache")
    meta = tmp_path / "cache" / "meta.json"
    write_book(meta, {**read_book(meta), "format": 1})
    with pytest.raises(AntgmmError, match="another version: delete it"):
        open_cache(tmp_path / "cache", key=KEY)
    build(tmp_path / "cache")
    assert open_cache(tmp_path / "cache", key=KEY).samples == 8


def build_in_two(directory: Path, moment: str, mesh: str = "data=2,tensor=2") -> list[int]:
    """Builds a cache in two processes of two devices each; returns their exit codes."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "tests.distill.cache_process", str(directory), moment, mesh, address]
    both = [subprocess.Popen([*command, str(process)], cwd=ROOT) for process in range(2)]
    try:
        return [process.wait(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The rows of a cache built by one process."""
    folder = tmp_path_factory.mktemp("alone") / "cache"
    build(folder, names=STATES)
    return open_cache(folder, key=KEY, names=STATES).read(np.arange(8))


def assert_same(directory: Path, expected: dict[str, np.ndarray]) -> None:
    stored = open_cache(directory, key=KEY, names=STATES).read(np.arange(8))
    for name, rows in expected.items():
        # Programs for different devices may round the last bit of a bfloat16 differently.
        np.testing.assert_allclose(stored[name].astype(np.float32), rows.astype(np.float32), rtol=2**-7, atol=1e-6)


def held(directory: Path, process: int, folder: Path) -> list[int]:
    """Indices of the rows in the files of one process."""
    folder.mkdir()
    for path in directory.glob(f"{process:05d}-*.array_record"):
        shutil.copy(path, folder)
    return np.flatnonzero(shards.Shards(folder, 8).held).tolist()


@pytest.mark.long
@pytest.mark.parametrize(
    ("mesh", "rows"),
    # One of the devices that hold the same rows writes them.
    [("data=2,tensor=2", [[0, 1, 4, 5], [2, 3, 6, 7]]), ("tensor=4", [[*range(8)], []])],
)
def test_two_processes_write_their_own_rows(alone, tmp_path, mesh, rows):
    assert build_in_two(tmp_path / "cache", "never", mesh) == [0, 0]
    assert_same(tmp_path / "cache", alone)
    assert [held(tmp_path / "cache", process, tmp_path / str(process)) for process in range(2)] == rows


@pytest.mark.long
def test_one_process_completes_the_cache_of_two(alone, tmp_path):
    assert build_in_two(tmp_path / "cache", "half") != [0, 0]
    assert len([*(tmp_path / "cache.partial").glob("0000[01]-00000.array_record")]) == 2
    poisoned = toy.batch(0) | {"positions": np.full((4, 3), 10**6, np.int32)}
    build(tmp_path / "cache", batches=lambda: [poisoned, batches()[1]], names=STATES)
    assert_same(tmp_path / "cache", alone)
