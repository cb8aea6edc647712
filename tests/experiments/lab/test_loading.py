"""The benchmark of loading names every part and counts pictures, not rows."""

import numpy as np
import pytest

from data.record import Record
from data.source import InMemorySource
from experiments.lab.bench import loading
from experiments.lab.bench.stream import shown
from tests.data.test_prepared import samples


@pytest.fixture(scope="module")
def rows():
    """Twenty rows with two pictures each."""
    picture = np.zeros((16, 16, 3), np.uint8)
    return samples(InMemorySource([Record(images=(picture,) * 2, question="is it red?", answer="red")] * 20))


def test_parts_and_rates_of_kept_pictures(rows, monkeypatch):
    measured = {"parts": loading.parts(rows), "rates": loading.rates(rows)}
    assert {*measured["parts"]} == {*loading.PARTS}
    assert min(measured["parts"].values()) >= 0
    assert {*measured["rates"]} == {"files", "stored"}
    assert all(rate > 0 for each in measured["rates"].values() for rate in each.values())
    one = {"peak": 2**20, "first": 1.0, "seconds": 2.0, "kept": True, "loading": measured}
    tables = shown({"rows": {"20": {"new": one, "again": one}}, "side": 16})
    assert [table.row_count for table in tables] == [2, len(loading.PARTS) + 2 * len(loading.THREADS)]


def test_a_rate_counts_pictures(rows, monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(clock))
    # Twelve batches of sixteen rows with two pictures each, in two seconds.
    assert loading._rate(rows, rows.rows.images, 1) == 12 * 16 * 2 / 2
