"""Sizes of a student."""

from types import SimpleNamespace

import pytest

import pruning
from antgmm_jax.axes import sizes
from experiments.auto import sizing
from experiments.lab.planning.search import NoLegalModel
from pruning.costs import total_parameters
from tests.pruning.models import CONFIGS


def test_a_budget_below_what_rows_without_images_allow_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(sizing, "_sensitivity", lambda *_: pytest.fail("measured"))
    config, samples = CONFIGS["llava"], SimpleNamespace(totals={"slots": 0})
    kept = {axis: units for axis, units in sizes(config).items() if axis.startswith("vision/")}
    free, bound = (pruning.search(config, total_parameters, 0, pins=pins).price for pins in ({}, kept))
    budget = (free + bound) // 2
    with pytest.raises(NoLegalModel, match=f"no legal model has at most {budget:,} parameters"):
        sizing.within(SimpleNamespace(config=config), samples, budget, 0, "float32", 1.0)
