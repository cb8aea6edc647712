"""The copy of a run in a store: a new machine continues from it, also after the store was lost for a while."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint, stores
from experiments.run import mirror
from experiments.run.mirror import mirrored
from experiments.run.schema.recipe import dump_recipe, load_recipe
from tests.experiments.tiny import write_recipe

URL = "memory://bucket/run"


@pytest.fixture
def bucket():
    memory = MemoryFileSystem()
    memory.store.clear()
    yield memory
    memory.store.clear()


@pytest.fixture
def run(tmp_path):
    """The folder of a run in its second stage, with the temporary files of a killed process."""
    folder = tmp_path / "run"
    (folder / "steps" / "02-b").mkdir(parents=True)
    (folder / "cache").mkdir()
    for name, text in {"recipe.toml": "seed = 1\n", "status.json": "{}", "inputs.json": "{}", "cache/x": "x"}.items():
        (folder / name).write_text(text)
    checkpoint.save_stage(folder / "stages" / "01-a", {"w": jnp.arange(3.0)}, {"metrics": {}})
    step(folder, 2)
    (folder / "steps" / "02-b" / ".00000003.tmp").mkdir()
    (folder / "steps" / "02-b" / ".00000003.tmp" / "part").write_text("half")
    return folder


def step(folder, number):
    checkpoint.save_step(folder / "steps" / "02-b", number, {"w": jnp.full(3, float(number))}, {"step": number})()


def names(bucket):
    return {name.removeprefix("/bucket/run/") for name in bucket.find("/bucket/run")}


def test_a_new_machine_gets_stages_and_steps(bucket, run, tmp_path):
    with mirrored(run, URL):
        pass
    assert not any(part in name for name in names(bucket) for part in (".tmp", "cache/"))
    new = tmp_path / "elsewhere"
    with mirrored(new, URL):
        assert (new / "recipe.toml").read_text() == "seed = 1\n"
        assert (new / "inputs.json").exists()
        assert checkpoint.is_complete(new / "stages" / "01-a")
        restored, record = checkpoint.load_step(new / "steps" / "02-b", 2, {"w": jnp.zeros(3)})
        np.testing.assert_array_equal(restored["w"], [2, 2, 2])
        assert record["step"] == 2
        step(new, 4)
        step(new, 6)
    assert {name.split("/")[2] for name in names(bucket) if name.startswith("steps/")} == {"00000004", "00000006"}
    with mirrored(run, URL):  # the first machine again
        assert checkpoint.latest_step(run / "steps" / "02-b") == 6


def test_quantized_exports_are_copied_and_removed_with_the_folder(bucket, run):
    for name in ("export/config.json", "export-w8a8/config.json", "export-w8a8/more/x.json", ".export-fp8/config.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    with mirrored(run, URL):
        pass
    exports = {name for name in names(bucket) if "export" in name}
    assert exports == {"export/config.json", "export-w8a8/config.json", "export-w8a8/more/x.json"}
    shutil.rmtree(run / "export-w8a8")
    with mirrored(run, URL):
        pass
    assert {name for name in names(bucket) if "export" in name} == {"export/config.json"}


def test_a_new_machine_leaves_exports_until_it_has_made_its_own(bucket, run, tmp_path):
    """One that is stopped before would otherwise remove the only student and its report."""
    for name in ("export/a", "export/b", "export-w8a8/a", "report/report.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    with mirrored(run, URL):
        pass
    new = tmp_path / "elsewhere"
    with pytest.raises(KeyboardInterrupt), mirrored(new, URL):
        raise KeyboardInterrupt
    assert {"export/a", "export/b", "export-w8a8/a", "report/report.json"} < names(bucket)
    shutil.rmtree(new)
    with mirrored(new, URL):
        (new / "export").mkdir()
        (new / "export" / "a").write_text("again")
    assert {name for name in names(bucket) if name.startswith(("export", "report"))} == {
        "export/a",
        "export-w8a8/a",
        "report/report.json",
    }
    assert bucket.cat("/bucket/run/export/a") == b"again"


def test_books_that_an_interrupted_copy_lacks_are_fetched(bucket, run):
    with mirrored(run, URL):
        pass
    (run / "inputs.json").unlink()
    with mirrored(run, URL):
        assert (run / "inputs.json").exists()


def test_a_step_without_its_record_is_incomplete(bucket, run, tmp_path):
    with mirrored(run, URL):
        pass
    bucket.rm_file("/bucket/run/steps/02-b/00000002/step.json")
    with mirrored(tmp_path / "new", URL):
        assert checkpoint.latest_step(tmp_path / "new" / "steps" / "02-b") is None
        assert checkpoint.is_complete(tmp_path / "new" / "stages" / "01-a")


def test_records_are_written_after_arrays_and_removed_before_them(bucket, run, monkeypatch):
    written, removed = [], []
    put, remove = MemoryFileSystem.put_file, MemoryFileSystem.rm_file
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, a, b, **o: written.append(b) or put(self, a, b, **o))
    monkeypatch.setattr(MemoryFileSystem, "rm_file", lambda self, path: removed.append(path) or remove(self, path))
    with mirrored(run, URL):
        pass
    shutil.rmtree(run / "steps" / "02-b" / "00000002")
    with mirrored(run, URL):
        step(run, 8)
        shutil.rmtree(run / "steps" / "02-b" / "00000002")  # it came back from the store
    first = [place for place, name in enumerate(written) if name.endswith(("step.json", "stage.json"))]
    assert min(first) > max(place for place, name in enumerate(written[: first[0] + 1]) if "arrays" in name)
    assert removed[0].endswith("00000002/step.json") and len(removed) > 1


def test_a_step_that_is_removed_while_it_is_copied_does_not_hold_up_the_others(bucket, run, monkeypatch):
    """A slow copy of every step, each replaced meanwhile, once left none complete in the store."""
    step(run, 4)
    written, put = [], MemoryFileSystem.put_file

    def slow(self, local, remote, **options):
        written.append(remote)
        put(self, local, remote, **options)
        if "00000004/" in remote:  # newer ones have replaced it
            shutil.rmtree(run / "steps" / "02-b" / "00000004", ignore_errors=True)

    monkeypatch.setattr(MemoryFileSystem, "put_file", slow)
    assert not mirror._Copy(run, stores.opened(URL)).attempt()
    assert {"stages/01-a/stage.json", "steps/02-b/00000002/step.json"} <= names(bucket)
    assert "steps/02-b/00000004/step.json" not in names(bucket)
    steps = [name.split("/")[-2] for name in written if name.endswith(("step.json", "stage.json"))]
    assert steps == ["01-a", "00000002"]  # finished stages first


def test_the_last_copy_does_not_wait_for_that_of_older_steps(bucket, run, monkeypatch):
    """After SIGTERM there may be little time; the newest step is the one that the run continues from."""
    copy, records, put = mirror._Copy(run, stores.opened(URL)), [], MemoryFileSystem.put_file

    def ends_meanwhile(self, local, remote, **options):
        put(self, local, remote, **options)
        if remote.endswith(("step.json", "stage.json")):
            records.append(remote.split("/")[-2])
            copy.over.set()

    monkeypatch.setattr(mirror, "EVERY", 0)
    monkeypatch.setattr(MemoryFileSystem, "put_file", ends_meanwhile)
    copy.follow()
    step(run, 4)
    copy.finish()
    assert records == ["01-a", "00000004", "00000002"]


def test_what_the_store_has_is_not_copied_again_by_the_next_start(bucket, run, tmp_path, monkeypatch):
    with mirrored(run, URL):
        pass
    written, put = [], MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, a, b, **o: written.append(b) or put(self, a, b, **o))

    def copied():
        """Names of what was copied of stages and steps."""
        names = [name.removeprefix("/bucket/run/") for name in written]
        written.clear()
        return {name for name in names if name.startswith(("stages/", "steps/"))}

    for place in (run, tmp_path / "new"):
        with mirrored(place, URL):
            pass
        assert not copied()
    (lost,) = (name for name in names(bucket) if name.startswith("steps/") and name.endswith("step.json"))
    array = min(name for name in names(bucket) if name.startswith("stages/01-a/arrays"))
    bucket.rm_file(f"/bucket/run/{lost}")
    bucket.rm_file(f"/bucket/run/{array}")
    with mirrored(run, URL):
        pass
    assert array in copied() and {lost, array} <= names(bucket)
    shutil.rmtree(run / "stages" / "01-a")
    checkpoint.save_stage(run / "stages" / "01-a", {"w": jnp.zeros(3)}, {"metrics": {}})
    with mirrored(run, URL):
        pass
    record = "stages/01-a/stage.json"
    assert record in copied()
    assert bucket.cat_file(f"/bucket/run/{record}") == (run / record).read_bytes()


def test_a_lost_store_does_not_stop_the_run(bucket, run, monkeypatch, capsys):
    lost, put = [True], MemoryFileSystem.put_file

    def flaky(self, *arguments, **options):
        if lost:
            raise ConnectionError("no route to host")
        return put(self, *arguments, **options)

    monkeypatch.setattr(mirror, "EVERY", 0.02)
    monkeypatch.setattr(MemoryFileSystem, "put_file", flaky)
    with mirrored(run, URL):
        while "no route to host" not in (said := capsys.readouterr().err):
            pass
        lost.clear()
        step(run, 4)
    assert "cannot write memory://bucket/run/" in said and f"the run goes on in {run}" in said
    assert "steps/02-b/00000004/step.json" in names(bucket)


def test_a_store_that_is_lost_at_the_end_is_an_error_and_the_folder_is_kept(bucket, run, monkeypatch):
    def lost(*_, **__):
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "put_file", lost)
        refused = pytest.raises(AntgmmError, match=r"no route to host.* is complete: run the same command again")
        with refused, mirrored(run, URL):
            pass
        with pytest.raises(KeyboardInterrupt), mirrored(run, URL):  # the run's own error comes first
            raise KeyboardInterrupt
    with mirrored(run, URL):
        pass
    assert "stages/01-a/stage.json" in names(bucket)


def test_a_run_that_has_saved_nothing_leaves_no_copy(bucket, tmp_path):
    (tmp_path / "recipe.toml").write_text("seed = 1\n")
    with mirrored(tmp_path, URL):
        pass
    assert names(bucket) == set()


def test_the_copy_of_another_recipe_is_refused(bucket, run):
    with mirrored(run, URL):
        pass
    (run / "recipe.toml").write_text("seed = 2\n")
    with pytest.raises(AntgmmError, match=f"^{URL} is the copy of a run of another recipe"), mirrored(run, URL):
        pass


def test_a_copy_of_another_recipe_is_refused_before_its_stages_are_fetched(bucket, run, tmp_path, monkeypatch):
    ours = load_recipe(write_recipe(tmp_path / "r.toml", tmp_path / "teacher"))
    (run / "recipe.toml").write_text(dump_recipe(ours))
    with mirrored(run, URL):
        pass
    fetched, get = [], MemoryFileSystem.get_file
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, a, b, **o: fetched.append(a) or get(self, a, b, **o))
    changed = ours.model_copy(update={"seed": ours.seed + 1})
    refused = pytest.raises(AntgmmError, match=r"is a run of another recipe \(seed.*with --mirror another URL")
    with refused, mirrored(tmp_path / "new", URL, changed):
        pass
    assert {name.rsplit("/", 1)[1] for name in fetched} == {"recipe.toml", "inputs.json", "status.json"}
    with mirrored(tmp_path / "other", URL, ours):
        assert checkpoint.is_complete(tmp_path / "other" / "stages" / "01-a")


def test_a_store_out_of_reach_is_refused_at_the_start(bucket, run, monkeypatch):
    def lost(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "find", lost)
    with pytest.raises(AntgmmError, match=rf"^cannot read {URL} \(no route to host\)"), mirrored(run, URL):
        pass


def test_the_final_status_is_copied(bucket, run):
    with mirrored(run, URL):
        pass
    with mirrored(run, URL):
        (run / "status.json").write_text('{"state": "complete"}')
    assert json.loads(bucket.cat_file("/bucket/run/status.json")) == {"state": "complete"}


def test_steps_that_the_folder_has_removed_are_not_fetched(bucket, run):
    """A copy may still hold an older step, or steps of a stage that is finished, here or there."""
    with mirrored(run, URL):
        pass
    shutil.rmtree(run / "steps" / "02-b" / "00000002")
    step(run, 4)
    with mirrored(run, URL):
        assert not (run / "steps" / "02-b" / "00000002").exists()
        shutil.rmtree(run / "steps")
        checkpoint.save_stage(run / "stages" / "02-b", {"w": jnp.arange(3.0)}, {"metrics": {}})
    stored = bucket.find("/bucket/run")
    bucket.pipe_file("/bucket/run/steps/02-b/00000009/step.json", b"{}")
    with mirrored(run, URL):
        assert not (run / "steps").exists()
    shutil.rmtree(run / "stages" / "02-b")
    bucket.pipe_file("/bucket/run/steps/02-b/00000009/step.json", b"{}")
    assert any("stages/02-b" in name for name in stored)
    with mirrored(run, URL):
        assert checkpoint.is_complete(run / "stages" / "02-b")
        assert not (run / "steps").exists()
