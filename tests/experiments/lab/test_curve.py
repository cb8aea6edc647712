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


def test_the_knee_is_farthest_above_the_line_by_hand():
    # By the logarithms of 1, 10, 100, 1000 the line from 0.9 to 0.0 is at 0.6 and 0.3: 0.25 and 0.1 above it.
    assert knee([1, 10, 100, 1000], [0.9, 0.85, 0.4, 0.0]) == 1
    # Plain costs would choose the first of these: the line falls by 0.008 only up to 10.
    assert knee([1, 10, 100, 1000], [0.9, 0.65, 0.6, 0.0]) == 2
    assert knee([1000, 1, 100, 10], [0.0, 0.9, 0.6, 0.65]) == 2


@pytest.fixture(scope="module")
def curve():
    teacher = CONFIGS["blip2_t5"]
    found = []
    for name, wanted, score in (
        ("half", {"vision/mlp": 8}, 0.9),
        ("small", {"vision/mlp": 8, "decoder/layers": 1}, 0.4),
    ):
        small = pruning.planned_config(teacher, wanted)
        common = {"arm": name, "params": total_parameters(small), "sizes": sizes(small)}
        found += [{**common, "seed": 0, "exact_match": score, "exact_match_hard": 0.3}]
        found += [{**common, "seed": 1, "exact_match": score - 0.1}]
    return teacher, found, with_costs(found, teacher, RequestSize(12, 2))


def test_the_shape_that_is_timed_is_the_one_that_was_left():
    """Of the Q-Former's layers every other one reads the picture; the two that are kept may be those or not."""
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


def test_costs_are_ratios_to_the_teacher(curve):
    teacher, before, after = curve
    for given, result in zip(before, after, strict=True):
        assert result["smaller"] == pytest.approx(total_parameters(teacher) / given["params"])
        assert {name: result[name] for name in given} == given
    # Seeds of an arm have one shape, which is timed once.
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
