"""The gate lets rounding pass, by the word of float64, and nothing else."""

import jax
import numpy as np
import pytest

from antgmm_jax.convert import load_hf
from experiments import export_gate
from experiments.commands.sources import random_batch
from tests import reference


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = reference.saved(reference.blip2(), tmp_path_factory.mktemp("gate") / "export")
    return directory, *load_hf(directory)


def check(directory, config, params):
    batches = [random_batch(config, 3)]
    return export_gate.check(directory, config, params, batches, max_new_tokens=4, eos=1, pad=0)


def test_what_is_within_the_tolerance_needs_no_float64(exported, monkeypatch):
    loads = []
    load = export_gate.torch_model
    monkeypatch.setattr(export_gate, "torch_model", lambda directory: loads.append(directory) or load(directory))
    found = check(*exported)
    assert found.passed and found.torch_rounding == 0.0
    assert len(loads) == 1


def test_above_it_float64_decides(exported, monkeypatch):
    monkeypatch.setattr(export_gate, "TOLERANCE", 0.0)
    monkeypatch.setattr(export_gate, "ROUNDING", 20.0)
    found = check(*exported)
    assert found.passed
    assert 0.0 < found.torch_rounding < 1e-4


def test_other_parameters_fail_by_name_whatever_float64_says(exported):
    directory, config, params = exported
    found = check(directory, config, jax.tree.map(lambda leaf: leaf * np.float32(1.001), params))
    assert not found.passed
    assert found.where.startswith("logits of sample ")
    assert found.max_abs_logit_diff > 10 * found.torch_rounding > 0.0
