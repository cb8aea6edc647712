"""The records of runs and caches notice every change, and a run's folder heals after a kill."""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.io.books import _digest, read_book, write_book
from experiments.commands import runs
from experiments.lab.study.run import RESULT, results
from experiments.run.folder import RunFolder, status_of
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import write_recipe
from tests.robustness.mutations import mutated_json, mutated_text

RECORD = {"keep": {"vision/mlp": [0, 2, 5]}, "metrics": {"loss": 0.1, "kept": True}, "note": "ö\n", "none": None}


def test_a_book_is_read_as_it_was_written(tmp_path):
    write_book(tmp_path / "a.json", RECORD)
    assert read_book(tmp_path / "a.json") == RECORD
    assert json.loads((tmp_path / "a.json").read_text()).keys() == {*RECORD, "checksum"}


def test_a_book_is_json_for_every_reader(tmp_path):
    numbers = {"loss": math.nan, "by_type": {"a": [math.inf, -math.inf, 1.0]}, "of_numpy": np.float32("nan")}
    write_book(tmp_path / "a.json", numbers)
    json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert read_book(tmp_path / "a.json") == {"loss": None, "by_type": {"a": [None, None, 1.0]}, "of_numpy": None}


def test_a_book_of_an_earlier_version_with_nan_is_read(tmp_path):
    plain = {"loss": math.nan}
    (tmp_path / "a.json").write_text(json.dumps({**plain, "checksum": _digest(plain)}))
    assert math.isnan(read_book(tmp_path / "a.json")["loss"])


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"checksum": 3}', "null", "[" * 100_000, "{" * 3])
def test_contents_of_another_shape_are_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(AntgmmError, match=rf"{path}.*: remove it and run it again$"):
        read_book(path)


def test_every_change_of_a_stages_record_is_refused(tmp_path):
    checkpoint.save_stage(tmp_path / "a", {"w": jnp.arange(8.0)}, RECORD)
    path = tmp_path / "a" / "stage.json"
    original, rng = path.read_text(), random.Random(0)
    for round_ in range(400):
        text = mutated_json(original, rng) if round_ % 2 else mutated_text(original, rng)
        path.write_bytes(text)
        try:
            same = json.loads(text) == json.loads(original)
        except (ValueError, RecursionError):
            same = False
        if same:
            continue
        with pytest.raises(AntgmmError, match=rf"{tmp_path / 'a'}"):
            checkpoint.load_stage(tmp_path / "a")
        assert not checkpoint.is_complete(tmp_path / "a")


def test_a_report_that_was_changed_is_refused(tmp_path, capsys):
    figures, path = {"params": 7, "scores": {"exact_match": 0.5}}, tmp_path / "report" / "report.json"
    write_book(path, figures)
    runs.report(tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out) == figures
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(AntgmmError, match=rf"{path} is damaged.*: run the command of the run again$"):
        runs.report(tmp_path, as_json=True)


def test_a_result_of_a_study_that_was_changed_is_refused(tmp_path):
    result, out = {"arm": "a", "seed": 0, "exact_match": 0.5, "of": "x"}, tmp_path / "out.json"
    path = tmp_path / "a" / "seed-0" / RESULT
    write_book(path, result)
    assert results({("a", 0): "x"}, tmp_path, out) == [result]
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(AntgmmError, match=rf"{path} is damaged"):
        results({("a", 0): "x"}, tmp_path, out)
    for content in ("[", "3", "[3]", "[{}]"):
        out.write_text(content)
        with pytest.raises(AntgmmError, match=rf"^{out} is not a list of results .*: remove it and run it again$"):
            results({}, tmp_path, out)


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path / "r.toml", tmp_path / "teacher"))


def test_leftovers_of_a_killed_start_are_accepted_and_removed(recipe, tmp_path):
    run = tmp_path / "run"
    left = [".recipe.toml.77.tmp", ".status.json.77.tmp", "report/.report.json.7.tmp"]
    left += ["steps/.01-a.old/x", "stages/.01-a.tmp/x", "steps/02-b/.00000004.tmp/x"]
    for name in left[:2]:
        run.mkdir(exist_ok=True)
        (run / name).write_text("x")
    with RunFolder(run).opened(recipe):
        assert not any((run / name).exists() for name in left)
    for name in left:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    with RunFolder(run).opened(recipe):
        assert not [path for path in run.rglob(".*") if path.name != ".lock"]


@pytest.mark.long
def test_the_status_tells_a_stopped_run_from_a_running_one(recipe, tmp_path):
    run = tmp_path / "run"
    write_recipe(tmp_path / "r.toml", tmp_path / "teacher")
    code = (
        "import os, sys; from experiments.run.folder import RunFolder, status_of;"
        "from experiments.run.schema.recipe import load_recipe;"
        "context = RunFolder(sys.argv[2]).opened(load_recipe(sys.argv[1])); context.__enter__();"
        "os.kill(os.getpid(), 9)"
    )
    with RunFolder(run).opened(recipe):
        assert (state := status_of(run))["state"] == "running"
        assert (state["process"], state["host"]) == (os.getpid(), socket.gethostname())
    assert status_of(run)["state"] == "complete"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.toml"), str(run)], check=False)
    assert json.loads((run / "status.json").read_text())["state"] == "running"
    assert status_of(run)["state"] == "stopped"


def test_a_folder_that_is_removed_under_a_run_is_an_error(recipe, tmp_path):
    run = tmp_path / "run"

    def work():
        with RunFolder(run).opened(recipe):
            shutil.rmtree(run)

    with pytest.raises(AntgmmError, match="was removed while the run was using it"):
        work()
    assert not run.exists()
