"""The gate lets rounding pass, by the word of float64, and nothing else."""

import jax
import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(("ours", "passes"), [(4e-3, True), (6e-3, False)])
def test_above_it_a_prompt_is_judged_by_the_rounding_of_all(exported, monkeypatch, ours, passes):
    """PyTorch rounds the second prompt by 1e-3; the first may differ by five times that, though itself it is exact."""
    logits = export_gate.torch_logits

    def rounded(model, inputs, batch):
        found = logits(model, inputs, batch).astype(np.float64)
        if model.dtype == torch.float64:
            found[1, 0, 0] += 1e-3
        found[0, 0, 0] += ours
        return found

    monkeypatch.setattr(export_gate, "torch_logits", rounded)
    found = check(*exported)
    assert found.passed == passes
    assert found.torch_rounding == pytest.approx(1e-3, rel=1e-2)
    assert found.max_abs_logit_diff == pytest.approx(ours, rel=1e-2)
    assert passes or found.where == "logits of sample 0 differ by 0.006, more than 0.005"


def test_other_parameters_fail_by_name_whatever_float64_says(exported):
    directory, config, params = exported
    found = check(directory, config, jax.tree.map(lambda leaf: leaf * np.float32(1.001), params))
    assert not found.passed
    assert found.where.startswith("logits of sample ")
    assert found.max_abs_logit_diff > 10 * found.torch_rounding > 0.0
