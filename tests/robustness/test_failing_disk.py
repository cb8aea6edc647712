"""A disk that the kernel fills or makes read-only: one line, nothing half-written, and the next start goes on."""

import errno
import filecmp
import os
import re
import shutil
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint, convert, folders
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.shards import Writer
from data.maad import source
from data.writers import write_jsonl
from experiments import cli
from experiments.package import build as packaging
from experiments.package import pytorch
from experiments.package.requests import Limits, Shape
from experiments.report.write import finish
from experiments.run import mirror, pipeline
from experiments.run.export import export_gate
from experiments.run.export.publishing import fresh
from experiments.run.mirror import mirrored
from experiments.run.pipeline import Run
from experiments.run.rows.random_batches import random_batch
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import save_llava, save_teacher, write_recipe
from tests.robustness.kills import arrays_of
from tests.robustness.mounts import FULL, READ_ONLY, REASON

KINDS = pytest.mark.parametrize("kind", [FULL, READ_ONLY])


@pytest.fixture(autouse=True)
def _silent(monkeypatch, capfd):
    """No traceback comes from a destructor or a thread, in Python or C++."""
    unraisable = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    yield
    assert not unraisable and "Traceback" not in capfd.readouterr().err


@pytest.fixture
def refused():
    """Runs a command that must end with exit code 2, and returns its error."""

    def line(*arguments) -> str:
        result = CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="antgmm")
        assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output
        assert result.stdout == "" and result.stderr.count("error: ") == 1
        return result.stderr.splitlines()[-1].removeprefix("error: ")

    return line


def run(*arguments):
    result = CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="antgmm")
    assert result.exit_code == 0, result.output


def noise(megabytes):
    return {"w": jnp.asarray(np.random.default_rng(0).integers(0, 256, int(megabytes * 1e6), dtype=np.uint8))}


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        (FULL, (checkpoint, "_orbax")),
        (FULL, (checkpoint, "_versions")),
        (READ_ONLY, (checkpoint, "_versions")),
        (READ_ONLY, (checkpoint, "_orbax")),
        (READ_ONLY, (folders, "checksums")),
        (READ_ONLY, (folders, "publish")),
    ],
)
def test_a_stage(disk, monkeypatch, kind, moment):
    stages, tree = disk.path / "stages", noise(0.5)
    checkpoint.save_stage(stages / "01-a", noise(0.1), {})
    before = disk.names()
    with monkeypatch.context() as patched:
        patched.setattr(*moment, disk.failing_before(getattr(*moment), kind))
        reason = "no space left on the disk; free some" if kind == FULL else "the disk is read-only; make it writable"
        with pytest.raises(
            AntgmmError, match=rf"^cannot save .*02-b: {reason} and run it again; earlier check.*intact$"
        ):
            checkpoint.save_stage(stages / "02-b", tree, {})
    assert not (stages / "02-b").exists() and checkpoint.is_complete(stages / "01-a")
    disk.repair()
    checkpoint.save_stage(stages / "02-b", tree, {})
    np.testing.assert_array_equal(checkpoint.load_stage(stages / "02-b")[0]["w"], tree["w"])
    assert {name for name in disk.names() if "02-b" not in name} == before  # no hidden file is left


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        (FULL, (convert, "write")),
        (FULL, (convert, "_write_config")),
        (READ_ONLY, (convert, "hf_tensors")),
        (READ_ONLY, (convert, "write")),
        (READ_ONLY, (convert, "_write_config")),
        (READ_ONLY, (folders, "publish")),
        (READ_ONLY, (folders, "replace")),
    ],
)
def test_an_export(disk, monkeypatch, teacher, kind, moment):
    config, params = load_hf(teacher)
    export = disk.path / "export"

    def publish(shift):
        with fresh(export) as hidden:
            convert.save_hf(config, jax.tree.map(lambda leaf: leaf + shift, params), hidden, like=teacher)

    publish(0)
    before = (export / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(*moment, disk.failing_before(getattr(*moment), kind))
        with pytest.raises(AntgmmError, match=rf"^[^\n]*export[^\n]*{REASON[kind]}[^\n]*$"):
            publish(1)
    assert (export / "model.safetensors").read_bytes() == before
    disk.repair()
    publish(1)
    jax.tree.map(np.testing.assert_array_equal, load_hf(export)[1], jax.tree.map(lambda leaf: leaf + 1, params))
    assert {path.name for path in disk.path.iterdir()} == {"export"}


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # of transformers
def test_a_run_whose_disk_becomes_read_only_while_it_saves_resumes_with_the_same_arrays(disk, tmp_path):
    path = write_recipe(tmp_path / "recipe.toml", save_llava(tmp_path / "llava"), sizes='"vision/layers" = 1')
    # All moments are after the training.
    recipe = load_recipe(path, ["stage.blocks.importance=magnitude", "stage.blocks.mask_steps=0"])
    finish(Run(recipe, tmp_path / "whole"), report=False)
    moments = {
        "stage": (checkpoint, "save_stage"),
        "arrays of the stage": (folders, "checksums"),
        "after the stage": (checkpoint, "discard_steps"),
        "export": (convert, "write"),
        "config of the export": (convert, "_write_config"),
        "gate": (export_gate, "check"),
        "end of the export": (folders, "replace"),
    }
    assert pipeline.checkpoint is checkpoint
    for name, moment in moments.items():
        if name in ("export", "config of the export", "gate", "end of the export"):  # goes on from the finished stage
            shutil.copytree(tmp_path / "whole", disk.path / "run", ignore=shutil.ignore_patterns("export"))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(*moment, disk.failing_before(getattr(*moment), READ_ONLY))
            with pytest.raises(AntgmmError, match=r"^[^\n]*(is read-only|Read-only)[^\n]*$"):
                finish(Run(recipe, disk.path / "run"), report=False)
        disk.repair()
        finish(Run(recipe, disk.path / "run"), report=False)
        assert arrays_of(disk.path / "run") == arrays_of(tmp_path / "whole"), moment
        assert not [name for name in disk.names() if re.search(r"\.(tmp|old|unchecked)(/|$)", name)]
        folders.discard(disk.path / "run")


def program(folder, size):
    """Files such as those of a compiled program."""
    folder.mkdir()
    (folder / "a.so").write_bytes(np.random.default_rng(0).bytes(size))
    (folder / "a_metadata.json").write_text('{"AOTI_DEVICE_KEY": "cpu"}')
    return {"start_1x8": [str(path) for path in sorted(folder.iterdir())]}


def test_a_package_has_the_bytes_of_its_programs(tmp_path):
    programs = program(tmp_path / "program", 300_000)
    pytorch.pack(programs, tmp_path / "ours.pt2")
    pytorch.package_aoti(str(tmp_path / "theirs.pt2"), programs)

    def contents(name):
        with zipfile.ZipFile(tmp_path / name) as file:
            assert file.testzip() is None
            entries = {each.partition("/")[2]: file.read(each) for each in file.namelist()}
        return {name: content for name, content in entries.items() if "serialization_id" not in name}

    assert contents("ours.pt2") == contents("theirs.pt2")


@KINDS
@pytest.mark.filterwarnings("default")  # of transformers
def test_a_package(disk, monkeypatch, tmp_path, teacher, kind):
    config, params = load_hf(teacher)
    batch, out = random_batch(config, 1, answer=2), disk.path / "student.pt2"
    shapes, form = [Shape(1, packaging.longest([batch]))], pytorch.pytorch(teacher, config, params, Limits(2, (1,), 0))
    build = partial(packaging.build, out, [batch], shapes, form)
    programs = program(tmp_path / "program", 17_000_000)  # more than the disk holds
    compiled = disk.failing_before(lambda *_: programs, kind) if kind == READ_ONLY else lambda *_: programs
    monkeypatch.setattr(pytorch, "_compiled", compiled)
    with pytest.raises(AntgmmError, match=rf"^cannot write {out}: {REASON[kind]}; free disk space or choose another"):
        build()
    disk.repair()
    assert not out.exists()
    monkeypatch.setattr(pytorch, "_compiled", lambda *_: program(tmp_path / "smaller", 1_000_000))
    monkeypatch.setattr(pytorch.Answerer, "load", lambda *_: None)
    monkeypatch.setattr(packaging, "_compared", lambda *_: packaging.Packaged(1, 1, 0))
    build()
    assert disk.names() == {"student.pt2"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("cc: No space left on device")]
)
@pytest.mark.filterwarnings("default")
def test_temporary_files_of_the_compiler(monkeypatch, tmp_path, teacher, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch.export, "export", full)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config, params = load_hf(teacher)
    batch = random_batch(config, 1, answer=2)
    shapes, form = [Shape(1, packaging.longest([batch]))], pytorch.pytorch(teacher, config, params, Limits(2, (1,), 0))
    line = rf"^cannot write {tmp_path}: No space left on device; free disk space, or set TORCHINDUCTOR_CACHE_DIR"
    with pytest.raises(AntgmmError, match=line):
        packaging.build(tmp_path / "a.pt2", [batch], shapes, form)
    assert not [*tmp_path.iterdir()]


@KINDS
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_of_maad(disk, tmp_path, refused, form, kind):
    arguments = ("data", "maad", "--split", "test", "--samples", 12, "--format", form, "--out")
    run(*arguments, tmp_path / "whole")
    disk.fail(kind)
    assert re.match(rf"cannot write {disk.path}/d/[^\n]*{REASON[kind]}", refused(*arguments, disk.path / "d"))
    assert not any((disk.path / "d").glob("test.*"))
    disk.repair()
    run(*arguments, disk.path / "d")
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*")]
    assert filecmp.cmpfiles(tmp_path / "whole", disk.path / "d", names, shallow=False) == (names, [], [])


@KINDS
@pytest.mark.parametrize("moment", [(Writer, "flush"), (np, "savez"), None])
def test_prepared_rows(disk, tmp_path, monkeypatch, refused, teacher, moment, kind):
    recipe = write_recipe(tmp_path / "recipe.toml", teacher)
    if moment is None:
        disk.fail(kind)
    else:
        monkeypatch.setattr(*moment, disk.failing_before(getattr(*moment), kind))
    line = refused("data", "prepare", recipe, "--out", disk.path / "rows")
    assert line.startswith(f"cannot write {disk.path}/") and REASON[kind].lower() in line.lower(), line
    assert not (disk.path / "rows").exists()
    disk.repair()
    run("data", "prepare", recipe, "--out", disk.path / "rows")
    assert {path.name for path in disk.path.iterdir()} == {"rows"}


@KINDS
def test_a_task_for_a_harness(disk, tmp_path, refused, kind):
    write_jsonl(source("s", "test", 4), tmp_path / "rows.jsonl")
    arguments = ("data", "lmms-eval", "--data", f"jsonl:{tmp_path}/rows.jsonl", "--out", disk.path / "task")
    disk.fail(kind)
    assert REASON[kind] in refused(*arguments)
    disk.repair()
    run(*arguments)
    assert {path.name for path in disk.path.iterdir()} == {"task"}


@KINDS
def test_the_cache_of_an_imported_checkpoint(disk, monkeypatch, refused, teacher, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk.path))
    monkeypatch.setattr("antgmm_jax.io.stores.Store.files", disk.failing_before(mirror.Store.files, kind))
    line = refused("import", f"file://{teacher}")
    assert re.match(rf"cannot write {disk.path}/[^\n]*: {REASON[kind]}; free disk space or choose another", line), line
    disk.repair()
    run("import", f"file://{teacher}")
    assert not [name for name in disk.names() if name.endswith(".tmp")]


@pytest.fixture
def folder(tmp_path):
    """The folder of a run with a stage."""
    place = tmp_path / "run"
    place.mkdir()
    (place / "recipe.toml").write_text("seed = 1\n" * 1000)
    checkpoint.save_stage(place / "stages" / "01-a", noise(0.5), {})
    return place


@KINDS
def test_a_store_that_fails_during_a_run(disk, folder, tmp_path, monkeypatch, capfd, kind):
    url = f"file://{disk.path}/copy"
    monkeypatch.setattr(mirror, "EVERY", 0.02)
    disk.fail(kind)
    with mirrored(folder, url):
        said = ""
        while not said.endswith("\n"):
            said += capfd.readouterr().err
        assert re.match(rf"cannot write [^\n]*{REASON[kind]}[^\n]*the run goes on in {folder}[^\n]*\n$", said), said
        # The next attempt may be under way. A part of a recipe would be taken for the recipe of another run.
        assert all(name.endswith((".ballast", ".tmp")) for name in disk.names())
        disk.repair()
    with mirrored(tmp_path / "new", url):
        assert checkpoint.is_complete(tmp_path / "new" / "stages" / "01-a")


@KINDS
def test_a_store_that_fails_at_the_end(disk, folder, tmp_path, kind):
    url = f"file://{disk.path}/copy"
    refused = pytest.raises(AntgmmError, match=rf"^cannot write [^\n]*{REASON[kind]}[^\n]* is complete: run the same")
    with refused, mirrored(folder, url):
        disk.fail(kind)
    assert not disk.names() - {".ballast"}
    disk.repair()
    with mirrored(folder, url):
        pass
    with mirrored(tmp_path / "new", url):
        assert checkpoint.is_complete(tmp_path / "new" / "stages" / "01-a")


@KINDS
def test_a_disk_that_fails_while_a_run_is_fetched(disk, folder, tmp_path, monkeypatch, kind):
    url, new, get = f"file://{tmp_path}/copy", disk.path / "run", mirror.Store.get
    with mirrored(folder, url):
        pass

    def one_by_one(store, names, place):
        """Fails after the first file: the folder of the stage exists then, without its record."""
        for number, name in enumerate(names):
            if number == 1:
                disk.fail(kind)
            get(store, [name], place)

    with monkeypatch.context() as patched:
        patched.setattr(mirror.Store, "get", one_by_one)
        refused = pytest.raises(AntgmmError, match=rf"^cannot write {new}[^\n]*: {REASON[kind]}; free disk space or")
        with refused, mirrored(new, url):
            pass
    assert (new / "stages" / "01-a").exists() and not checkpoint.is_complete(new / "stages" / "01-a")
    disk.repair()
    with mirrored(new, url):
        assert checkpoint.is_complete(new / "stages" / "01-a")
    assert (new / "recipe.toml").read_text() == (folder / "recipe.toml").read_text()
