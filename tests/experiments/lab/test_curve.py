"""A study's curve: ratios to the teacher, and the knee by hand."""

import json

import numpy as np
import pytest

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from experiments.lab.planning.rates import RequestSize
from experiments.lab.study.curve import knee, markdown, shape_of, with_costs, write_curve
from pruning.costs import total_parameters
from tests.pruning.models import CONFIGS


def test_the_knee_by_hand():
    # Over log costs the line from 0.9 to 0.0 passes 0.6 at 10 and 0.3 at 100: the scores are 0.25 and 0.1 above it.
    assert knee([1, 10, 100, 1000], [0.9, 0.85, 0.4, 0.0]) == 1
    # Over plain costs the first would win, because the line falls by only 0.008 up to 10.
    assert knee([1, 10, 100, 1000], [0.9, 0.65, 0.6, 0.0]) == 2
    assert knee([1000, 1, 100, 10], [0.0, 0.9, 0.6, 0.65]) == 2


@pytest.fixture(scope="module")
def curve():
    teacher = CONFIGS["blip2_t5"]
    runs = []
    for name, wanted, score in (
        ("half", {"vision/mlp": 8}, 0.9),
        ("small", {"vision/mlp": 8, "decoder/layers": 1}, 0.4),
    ):
        small = pruning.planned_config(teacher, wanted)
        common = {"arm": name, "params": total_parameters(small), "sizes": sizes(small)}
        runs += [{**common, "seed": 0, "exact_match": score, "exact_match_hard": 0.3}]
        runs += [{**common, "seed": 1, "exact_match": score - 0.1}]
    return teacher, runs, with_costs(runs, teacher, RequestSize(12, 2))


def test_shape_of_restores_the_shape_from_sizes_and_parameters():
    """Every second Q-Former layer has cross-attention, so equal sizes can have different shapes."""
    teacher = CONFIGS["blip2_t5"]
    every = {}
    for layers in ([0, 1], [0, 2]):
        left = pruning.shrunk_config(teacher, {"bridge/layers": np.array(layers)})
        result = {"arm": "a", "sizes": sizes(left), "params": total_parameters(left)}
        assert shape_of(teacher, result) == left
        every[tuple(layers)] = left.bridge.stack.cross_every
    assert every == {(0, 1): 2, (0, 2): 1}
    with pytest.raises(AntgmmError, match="arm 'a': no model of its sizes has 7 parameters: run it again"):
        shape_of(teacher, {**result, "params": 7})


@pytest.mark.long
def test_costs_are_ratios_to_the_teacher(curve):
    teacher, before, after = curve
    for given, result in zip(before, after, strict=True):
        assert result["smaller"] == pytest.approx(total_parameters(teacher) / given["params"])
        assert {name: result[name] for name in given} == given
    # The seeds of an arm share a shape, which is timed once.
    assert after[0]["latency_ms"] == after[1]["latency_ms"] != after[2]["latency_ms"]
    assert after[0]["faster"] / after[2]["faster"] == pytest.approx(after[2]["latency_ms"] / after[0]["latency_ms"])


def test_the_curve_is_written_with_its_knee(curve, tmp_path):
    *_, results = curve
    write_curve(results, tmp_path / "curve.json")
    assert json.loads((tmp_path / "curve.json").read_text()) == results
    text = (tmp_path / "curve.md").read_text()
    assert text == markdown(results)
    assert "0.850 (0.800 to 0.900)" in text
    assert "The knee: by times fewer parameters at" in text
    first = (tmp_path / "curve.svg").read_bytes()
    write_curve(results, tmp_path / "curve.json")
    assert first.count(b"<svg") == 1 and first == (tmp_path / "curve.svg").read_bytes()
