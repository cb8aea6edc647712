"""A run is complete after its report, which is written while the run's folder is locked."""

import json
from contextlib import contextmanager

import pytest

from experiments.report import write
from experiments.run.folder import InUse, RunFolder
from experiments.run.pipeline import Run
from experiments.run.schema.recipe import load_recipe
from experiments.run.start import Origin
from tests.experiments.tiny import write_recipe


def test_an_interrupted_report_is_written_when_the_run_is_repeated(monkeypatch, tmp_path):
    recipe, folder = load_recipe(write_recipe(tmp_path / "recipe.toml", tmp_path)), tmp_path / "run"

    def state():
        return json.loads((folder / "status.json").read_text())["state"]

    @contextmanager
    def opened(run):
        run.test = run.hard = None
        run.origin = Origin(None, None, "", "")
        with run.folder.opened(run.recipe):
            yield None

    def stop(outcome):
        assert outcome.recipe == recipe and state() == "running"
        with pytest.raises(InUse), RunFolder(folder).opened(recipe):
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_opened", opened)
    monkeypatch.setattr(Run, "_export", lambda run, student: student)
    monkeypatch.setattr(write, "write_report", stop)
    with pytest.raises(KeyboardInterrupt):
        write.finish(Run(recipe, folder))
    assert state() == "stopped"
    monkeypatch.setattr(write, "write_report", lambda outcome: {"state": state()})
    assert write.finish(Run(recipe, folder)) == {"state": "running"}
    assert state() == "complete"
