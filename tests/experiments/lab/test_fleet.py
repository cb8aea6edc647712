"""A year of a service's energy by hand, and the figures in the document."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import cli
from experiments.lab.fleet import service

ROOT = Path(__file__).resolve().parents[3]


def test_a_service_by_hand():
    figures = service(400.0, 1.0, 700.0, 90.0, rate=10.0)
    assert figures["requests_a_day"] == 864_000
    # 400 W x 0.7 s = 280 J; 10 requests per second need 2 800 W; x 8 760 h.
    expected = {"joules": 280.0, "kwh_a_year": 24_528.0, "megawatts": 0.0028, "busy": 7.0}
    assert figures["teacher"] == pytest.approx(expected)
    assert figures["student"] == pytest.approx(
        {"joules": 36.0, "kwh_a_year": 3_153.6, "megawatts": 0.00036, "busy": 0.9}
    )
    assert figures["saved"] == pytest.approx(
        {"joules": 244.0, "kwh_a_year": 21_374.4, "megawatts": 0.00244, "busy": 6.1}
    )


@pytest.mark.parametrize(
    ("watts", "pue", "a_day"), [(300.0, 1.0, 4.0422e9), (400.0, 1.0, 3.0317e9), (400.0, 1.5, 2.0211e9)]
)
def test_the_papers_claim_by_hand(watts, pue, a_day):
    figures = service(watts, pue, 700.0, 90.0, kwh=75e6)
    # 75e6 kWh x 3.6e6 J / (watts x pue x 0.61 s) / 365 days.
    assert figures["requests_a_day"] == pytest.approx(a_day, rel=1e-4)
    # 75e6 kWh / 8 760 h.
    assert figures["saved"]["megawatts"] == pytest.approx(8.5616, rel=1e-4)
    assert figures["saved"]["kwh_a_year"] == pytest.approx(75e6)


def test_the_document_shows_what_the_command_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = re.findall(
        r"```console\n\$ antgmm (.*)\n((?:.*\n)*?)```", (ROOT / "docs" / "lab" / "energy.md").read_text()
    )
    assert len(shown) == 4
    for words, printed in shown:
        output = CliRunner().invoke(cli.app, words.split(), prog_name="antgmm").stdout
        assert [line.rstrip() for line in output.splitlines()] == printed.splitlines()
