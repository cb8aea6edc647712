"""A run's folder sums the time and energy of all processes that worked on it."""

import json
import time

import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.books import write_book
from experiments.run import status as status_file
from experiments.run.folder import RunFolder, status_of
from experiments.run.host.energy import Energy
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import write_recipe


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path / "r.toml", tmp_path / "teacher"))


def status(path):
    return json.loads((path / "status.json").read_text())


def test_seconds_sum_over_all_starts(recipe, tmp_path):
    path = tmp_path / "run"
    with RunFolder(path).opened(recipe):
        assert status(path)["state"] == "running"
    assert status(path)["state"] == "complete"
    # The state after another process was stopped, was killed or failed.
    for state in ("running", "failed"):
        write_book(path / "status.json", {"state": state, "seconds": 1000.0, "energy": {}})
        again = RunFolder(path)
        with again.opened(recipe):
            assert 1000 <= again.status.seconds < 1100
        assert 1000 <= status(path)["seconds"] < 1100
    # A damaged record holds no time.
    (path / "status.json").write_text(json.dumps({**status(path), "seconds": 9.0}))
    with RunFolder(path).opened(recipe):
        pass
    assert 0 < status(path)["seconds"] < 100


def test_energy_sums_over_all_starts_by_part(recipe, tmp_path):
    path = tmp_path / "run"
    earlier = Energy(2.0, 1.0, 3000.0, "measured", 10.0, 20.0, 30.0, ["counters"])
    with RunFolder(path).opened(recipe):
        pass
    noted = {"state": "running", "seconds": 1000.0, "energy": {"01-a": earlier._asdict()}}
    write_book(path / "status.json", noted)
    again = RunFolder(path)
    with again.opened(recipe):
        with again.status.metered("01-a") as energy, again.status.metered("cache"):
            pass
        first = energy()
        assert 3000 < first.seconds < 3100 and 2.0 < first.kwh < 2.1 and first.assumes[0] == "counters"
        # The same part a second time in this process.
        with again.status.metered("01-a") as energy:
            pass
        assert first.seconds < energy().seconds < 3100
        assert 0 < again.status.energy["cache"].seconds < 100
    noted = status(path)["energy"]
    assert noted.keys() == {"01-a", "cache", "run"}
    assert Energy(**noted["01-a"]) == energy()
    assert noted["run"]["seconds"] < 100


def test_a_killed_process_has_recorded_its_time(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(status_file, "BEAT", 0.01)
    path = tmp_path / "run"
    with RunFolder(path).opened(recipe):
        first = status(path)
        end = time.monotonic() + 60
        while any(_taken(status(path))[i] == taken for i, taken in enumerate(_taken(first))):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert status(path)["state"] == "running"


def _taken(noted):
    return noted["seconds"], noted["energy"]["run"]["seconds"], noted["energy"]["run"]["kwh"]


@pytest.mark.parametrize(("error", "state"), [(AntgmmError("no"), "failed"), (KeyboardInterrupt(), "stopped")])
def test_a_run_that_ends_early_has_recorded_its_time(recipe, tmp_path, error, state):
    path = tmp_path / "run"

    def run():
        with RunFolder(path).opened(recipe):
            (path / "status.json").unlink()
            raise error

    with pytest.raises(type(error)):
        run()
    assert status(path)["state"] == state
    assert status(path)["seconds"] > 0


@pytest.mark.parametrize(
    "change", [{"energy": None}, {"seconds": "x"}, {"energy": {"run": {"watts": 1}}}, {"energy": [1]}]
)
def test_a_status_of_another_form_holds_no_time(recipe, tmp_path, capsys, change):
    path = tmp_path / "run"
    with RunFolder(path).opened(recipe):
        pass
    write_book(path / "status.json", {"state": "running", "seconds": 1000.0, "energy": {}, **change})
    with RunFolder(path).opened(recipe):
        pass
    assert "holds no time and energy: time and energy count from now" in capsys.readouterr().err
    assert status(path)["seconds"] < 100
    write_book(path / "status.json", {"state": 5})
    with pytest.raises(AntgmmError, match=r"status\.json holds no state: start the run again"):
        status_of(path)
