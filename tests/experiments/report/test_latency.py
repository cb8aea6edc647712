"""The energy of a request, measured over a loop of requests."""

from contextlib import contextmanager

import pytest

from experiments.report import latency
from experiments.run.host import metering
from experiments.run.host.energy import Energy


def test_energy_per_request_is_the_loops_energy_over_the_requests(monkeypatch):
    requests = []

    @contextmanager
    def counted():
        yield lambda: Energy(len(requests) * 1e-6, 0.0, 1.0, "estimated", 1.0, 0.0, 0.0, [])

    def request():
        requests.append(1)
        return 0.1, 0.2, 0.3

    monkeypatch.setattr(metering, "metered", counted)
    monkeypatch.setattr(latency, "ENERGY_SECONDS", 0.0)
    consumed = latency.consumption(request, 7)
    assert len(requests) == consumed["requests"] == 7
    assert consumed["joules"] == pytest.approx(3.6) and consumed["kwh"] == pytest.approx(7e-6)
    monkeypatch.setattr(latency, "ENERGY_SECONDS", 0.05)
    assert latency.consumption(request, 1)["requests"] > 1
