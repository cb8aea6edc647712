"""The command line as tests run it."""

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
    """A command's one line of complaint; its exit code is 2 and before it stands at most what the command does."""

    def complaint(*arguments) -> str:
        result = antgmm(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        *begun, last = result.stderr.splitlines()
        assert last.startswith("error: "), result.stderr
        assert not begun or (len(begun) == 1 and not begun[0].startswith("error")), begun
        return last.removeprefix("error: ")

    return complaint
