"""Fixtures that run the command line."""

import pytest
from typer.testing import CliRunner

from experiments import cli
from tests.experiments.quick import time_few_requests


@pytest.fixture(scope="session", autouse=True)
def _few_requests():
    with pytest.MonkeyPatch.context() as patch:
        time_few_requests(patch.setattr)
        yield


@pytest.fixture
def antgmm(monkeypatch, tmp_path):
    """Runs the command line in an empty folder."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="antgmm")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def refused(antgmm):
    """Runs a command that must fail with exit code 2 and returns its error; at most its first line comes before."""

    def complaint(*arguments) -> str:
        result = antgmm(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        *earlier, last = result.stderr.splitlines()
        assert last.startswith("error: "), result.stderr
        assert not earlier or (len(earlier) == 1 and not earlier[0].startswith("error")), earlier
        return last.removeprefix("error: ")

    return complaint
