"""Search: fitted rates, the search for a measured latency, and the printed stages."""

import json
import tomllib
from functools import cache

import numpy as np
import pytest
from scipy.optimize import nnls

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import violations
from antgmm_jax.presets import preset
from experiments.lab.planning import rates as rating
from experiments.lab.planning import search as searching
from experiments.lab.planning.rates import (
    LARGEST,
    Rates,
    RequestSize,
    amounts,
    calibration_models,
    fit,
    non_negative,
    predict,
)
from experiments.lab.planning.search import TRIES, Tried, by_latency, export_dtype
from experiments.report.latency import Latency
from pruning import planned_config, resolve, search
from pruning.costs import TOKENS, parameters, total_parameters
from tests.pruning.models import CONFIGS

REQUEST = RequestSize(length=40, answer=8)
RATES = Rates(np.array([0.3, 0.2, 0.1]), np.array([0.07, 0.04, 0.003]), 3e-8, 4e-8)


@pytest.mark.parametrize("seed", range(5))
def test_non_negative_least_squares_equal_scipys(seed):
    rng = np.random.default_rng(seed)
    rows, values = rng.normal(size=(9, 5)) * 10.0 ** np.arange(5), rng.normal(size=9)
    np.testing.assert_allclose(non_negative(rows, values), nnls(rows, values)[0], rtol=1e-6, atol=1e-12)


def test_amounts_of_a_request_by_hand():
    llava = CONFIGS["llava"]  # 3 layers in both stacks; the projector counts as one
    counted = amounts(llava, REQUEST)
    np.testing.assert_array_equal(counted[:, :3], np.eye(3))
    np.testing.assert_array_equal(np.diag(counted[:, 3:6]), [7, 6, 7 * 6])
    assert (counted[:, 6:] > 0).all()


@pytest.mark.parametrize("name", ["antgmm-deep", "llava-tiny"])
def test_fit_recovers_the_rates(name):
    teacher = preset(name)
    models = calibration_models(teacher)
    measured = []
    for model in models:
        phases = amounts(model, REQUEST) @ np.concatenate([RATES.phase, RATES.sublayer, RATES[2:]])
        measured.append((amounts(model, REQUEST), Latency(phases.sum(), 0.0, *phases)))
    fitted = fit(measured)
    assert predict(fitted, teacher, REQUEST) == pytest.approx(predict(RATES, teacher, REQUEST), rel=1e-4)


@pytest.mark.parametrize("name", ["antgmm-deep", "antgmm-5b", "llava-tiny", "qwen2.5-vl-3b", "llava-1.5-7b"])
def test_calibration_models_are_legal_and_small_with_layers_of_two_widths(name):
    """Tokens alone may exceed the limit: widths cut until they did not would say nothing of the time of products."""
    models = calibration_models(preset(name))
    assert len(models) == 4
    for model in models:
        assert not violations(model)
        counts = parameters(model)
        assert sum(counts.values()) - counts[TOKENS] <= LARGEST
    assert {sizes(model)["vision/layers"] for model in models} == {1, 5}
    for wide, narrow in (models[:2], models[2:]):
        assert sizes(wide)["vision/mlp"] > 2 * sizes(narrow)["vision/mlp"] > 2


@cache
def price(model):
    """Predicted milliseconds; searches of all tests meet the same models."""
    return predict(RATES, model, REQUEST)


def search_latency(budget, truth):
    """`by_latency` on antgmm-deep with measured latencies of `truth` times the predicted ones."""
    teacher = preset("antgmm-deep")
    return by_latency(teacher, budget, lambda *given: search(teacher, *given), price, lambda m: truth * price(m))


@pytest.mark.long
@pytest.mark.parametrize("truth", [1.0, 0.4, 3.0])
def test_the_search_ends_within_the_budget_and_near_it(truth):
    best, tried = search_latency(6.0, truth)
    assert 0.8 * 6 <= best.measured <= 6
    assert best in tried
    assert len(tried) <= TRIES
    assert best.measured == max(each.measured for each in tried if each.measured <= 6)


@pytest.mark.long
def test_the_search_improves_a_student_far_below_the_budget():
    # Widths cost more than predicted, so that the first correction overshoots.
    def timed(model):
        return predict(RATES._replace(flop=8 * RATES.flop), model, REQUEST)

    teacher = preset("antgmm-deep")
    best, tried = by_latency(teacher, 6.0, lambda *given: search(teacher, *given), price, timed)
    below = [each.measured for each in tried if each.measured <= 6]
    assert tried[0].measured > 6 > best.measured == max(below)
    assert best.measured > 0.8 * 6


@pytest.mark.long
def test_an_unreachable_latency_names_the_fastest_student():
    fastest = r"the fastest of 1 measured takes .* ms, at load .* cores \(vision/layers 1, "
    with pytest.raises(AntgmmError, match="within 0.1 ms: " + fastest):
        search_latency(0.1, 1.0)
    with pytest.raises(AntgmmError, match="no pruning is necessary"):
        search_latency(1000.0, 1.0)


def test_latency_is_measured_in_the_dtype_that_a_report_times(monkeypatch):
    used, config = [], CONFIGS["llava"]
    monkeypatch.setattr(searching, "compute_dtype", lambda stored: stored)
    assert export_dtype() == "bfloat16" and export_dtype(["seed=3", "export.dtype=float32"]) == "float32"
    monkeypatch.setattr(rating, "jax_request", lambda *given: used.append(given[-1]) or (lambda: None))
    for module in (rating, searching):
        monkeypatch.setattr(
            module, "measure", lambda timed, **_: dict.fromkeys(timed, Latency(3.0, 3.0, 1.0, 1.0, 1.0))
        )
    smaller = total_parameters(config) // 2
    monkeypatch.setattr(
        searching,
        "by_latency",
        lambda config, ms, find, price, timed: (Tried(find(total_parameters, smaller), timed(config)), []),
    )
    figures = searching.run(config, parameters=None, latency=9.0, pins={}, weights={}, request=REQUEST)
    assert figures["dtype"] == "bfloat16" and figures["student"]["measured_ms"] == 3.0
    assert len(used) == len(calibration_models(config)) + 1 and {*used} == {"bfloat16"}


@pytest.mark.parametrize("name", ["antgmm-deep", "llava-tiny"])
def test_the_printed_stages_cut_to_the_printed_sizes(antgmm, name):
    words = ["search", "--preset", name, "--params", "700000", "--size", "vision/layers=4"]
    figures = json.loads(antgmm(*words, "--json").stdout)
    at = preset(name)
    for wanted in figures["stages"].values():
        at = planned_config(at, resolve(at, wanted))
    assert sizes(at) == figures["student"]["sizes"]
    assert figures["student"]["sizes"]["vision/layers"] == 4
    assert figures["student"]["params"] == sum(parameters(at).values()) <= 700_000
    printed = antgmm(*words).stdout
    stages = tomllib.loads(printed[printed.index("[[stage]]") :])["stage"]
    assert {stage["name"]: stage["sizes"] for stage in stages} == figures["stages"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --params or --latency-ms"),
        (["--params", "9", "--latency-ms", "9"], "either --params or --latency-ms"),
        (["--params", "60000"], "no legal model has at most 60,000 parameters: the smallest has "),
        (["--params", "60000000"], "no pruning is necessary"),
        (["--latency-ms", "-1"], "--latency-ms -1.0: it must be above 0"),
        (
            ["--latency-ms", "9", "--length", "16"],
            "a prompt of 16 tokens is too short for 16 image tokens: use --length 48",
        ),
        (["--latency-ms", "9", "--size", "vision/embed=5"], "nearest legal sizes: vision/embed 64"),
        (["--params", "9", "--size", "vision/embed"], "write it as vision/layers=12"),
        (["--params", "9", "--weigh", "vision=0"], "--weigh vision=0: choose a number from 1e-06 to 1e+06"),
        (["--params", "9", "--weigh", "vision=5e-324"], "choose a number from"),
        (["--params", "9", "--weigh", "vision=1", "--weigh", "vision=2"], "--weigh names vision twice"),
        (["--params", "9", "--size", "vision/mlp=1", "--size", "vision/mlp=2"], "--size names vision/mlp twice"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(refused, words, message):
    assert message in refused("search", "--preset", "llava-tiny", *words)
