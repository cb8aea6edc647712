"""The FLOPs of a report are those of the test records, not of one picture of the usual size."""

from types import SimpleNamespace

import numpy as np

from antgmm_jax.presets import preset
from experiments.report.figures import size_of


def records(*slots):
    index = SimpleNamespace(prompt=np.full(len(slots), 12), slots=np.array(slots), answer=np.full(len(slots), 3))
    return SimpleNamespace(rows=SimpleNamespace(index=index))


def test_flops_follow_the_image_slots_of_the_records():
    config = preset("llava-tiny")
    none, one, tiles = (size_of(config, records(*slots))["flops_by_phase"] for slots in ((0, 0), (1, 1), (2, 5)))
    assert none["vision"] == 0 and tiles["vision"] == 3.5 * one["vision"]
    assert none["prefill"] == one["prefill"] == tiles["prefill"]
