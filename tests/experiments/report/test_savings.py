"""Energy of a year of requests and payback, by hand."""

import pytest

from experiments.report.savings import kwh_a_year, payback


def test_a_year_and_a_payback_by_hand():
    # 31 536 000 seconds; 3.6 J are a millionth of a kWh.
    assert kwh_a_year(3.6, 1) == pytest.approx(31.536)
    assert kwh_a_year(1.0, 10_000) == pytest.approx(87_600)
    assert payback(0.5, 2.0) == 900_000
    assert payback(1.0, 7.0) == 514_286
    assert payback(0.5, 0.0) is None and payback(0.5, -1.0) is None
