"""A run is complete after its report, which is written while the run's folder is locked."""

import json
from contextlib import contextmanager

import pytest

from antgmm_jax.io.books import write_book
from experiments.report import write
from experiments.run.export import exporting
from experiments.run.folder import InUse, RunFolder
from experiments.run.pipeline import Run
from experiments.run.schema.recipe import load_recipe
from experiments.run.start import Origin
from tests.experiments.tiny import write_recipe


@contextmanager
def opened(run):
    run.test = run.hard = None
    run.origin = Origin(None, None, "", "")
    with run.folder.opened(run.recipe):
        yield None


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """A recipe of which a run ends at once, with its report to write."""
    monkeypatch.setattr(Run, "_opened", opened)
    monkeypatch.setattr(exporting, "exported", lambda recipe, folder, origin, student, test: student)
    return load_recipe(write_recipe(tmp_path / "recipe.toml", tmp_path))


def test_an_interrupted_report_is_written_when_the_run_is_repeated(recipe, monkeypatch, tmp_path):
    folder = tmp_path / "run"

    def state():
        return json.loads((folder / "status.json").read_text())["state"]

    def stop(outcome):
        assert outcome.recipe == recipe and state() == "running"
        with pytest.raises(InUse), RunFolder(folder).opened(recipe):
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "write_report", stop)
    with pytest.raises(KeyboardInterrupt):
        write.finish(Run(recipe, folder))
    assert state() == "stopped"
    monkeypatch.setattr(write, "write_report", lambda outcome: {"state": state()})
    assert write.finish(Run(recipe, folder)) == {"state": "running"}
    assert state() == "complete"


def test_a_report_is_measured_once_for_each_export(recipe, monkeypatch, tmp_path):
    folder, path = tmp_path / "run", tmp_path / "run" / "report" / "report.json"
    measured, rendered = [], []

    def measure(outcome):
        measured.append(outcome)
        write_book(path, {"number": len(measured)})
        return {"number": len(measured)}

    monkeypatch.setattr(write, "write_report", measure)
    monkeypatch.setattr(write, "render", lambda directory, report: rendered.append(report))
    numbers = [write.finish(Run(recipe, folder))["number"] for _ in range(2)]
    assert numbers == [1, 1] and rendered == [{"number": 1}]
    assert write.finish(Run(recipe, folder), report=False) == {}
    assert write.finish(Run(recipe, folder), again=True) == {"number": 2}
    path.write_text("{}")  # damaged
    assert write.finish(Run(recipe, folder)) == {"number": 3}
    exporting.forget(RunFolder(folder))  # before a stage is trained again, and before an export
    assert not path.exists()
    assert write.finish(Run(recipe, folder)) == {"number": 4}


def test_the_figures_of_a_report_are_written_last(recipe, monkeypatch, tmp_path):
    def stop(directory, report):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "render", stop)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        write._write(folder, ({"examples": []}, []))
    assert not (folder.report / "report.json").exists()
