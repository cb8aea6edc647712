"""The energy of a request, counted over a loop of requests."""

from contextlib import contextmanager

import pytest

from experiments.report import latency
from experiments.run.host import metering
from experiments.run.host.energy import Energy


def test_a_requests_energy_is_the_loops_over_its_number(monkeypatch):
    asked = []

    @contextmanager
    def counted():
        yield lambda: Energy(len(asked) * 1e-6, 0.0, 1.0, "estimated", 1.0, 0.0, 0.0, [])

    def request():
        asked.append(1)
        return 0.1, 0.2, 0.3

    monkeypatch.setattr(metering, "metered", counted)
    monkeypatch.setattr(latency, "ENERGY_SECONDS", 0.0)
    found = latency.consumption(request, 7)
    assert len(asked) == found["requests"] == 7
    assert found["joules"] == pytest.approx(3.6) and found["kwh"] == pytest.approx(7e-6)
    monkeypatch.setattr(latency, "ENERGY_SECONDS", 0.05)
    assert latency.consumption(request, 1)["requests"] > 1
