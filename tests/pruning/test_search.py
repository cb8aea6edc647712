"""Search: sizes are legal, within the budget, as large as it allows, and pinned sizes are kept."""

from itertools import pairwise

import numpy as np
import pytest

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, violations
from antgmm_jax.presets import preset
from antgmm_jax.pure import local_axes
from pruning import by_stage, free_axes, plan, planned_config, search, shrunk_config
from pruning.costs import cost, parameters, total_parameters
from pruning.keep import gate_shape
from pruning.planning import illegal_reason
from pruning.sizing import next_smaller
from tests.marks import long
from tests.pruning.models import CONFIGS, EACH

MODELS = {**CONFIGS, "antgmm-deep": preset("antgmm-deep"), "llava-tiny": preset("llava-tiny")}
NAMES = [*EACH, long("antgmm-deep"), long("llava-tiny")]
SHARES = (0.9, 0.5, 0.3, 0.2, 0.12, 0.06)


def count(config):
    return sum(parameters(config).values())


def sublayers(config):
    """The sublayers that a request passes through: a price that does not depend on widths."""
    return sum(sum(towers.values()) for towers in cost(config, 1, 64, 16).sublayers.values())


@pytest.mark.parametrize("name", NAMES)
def test_results_are_legal_within_the_budget_and_grow_with_it(name):
    config = MODELS[name]
    smallest = search(config, count, 0)
    assert all(next_smaller(config, smallest.sizes, axis) == 0 for axis in smallest.sizes)
    results = [search(config, count, share * count(config)) for share in SHARES]
    for share, sized in zip(SHARES, results, strict=True):
        assert sized.price == count(sized.config) <= max(share * count(config), smallest.price)
        assert not violations(sized.config)
        assert complete(config, sized.sizes) == sizes(sized.config)
    assert all(larger.price >= smaller.price for larger, smaller in pairwise(results))


def test_an_axis_is_cut_below_its_least_size_only_if_nothing_else_is_left():
    config, weights = CONFIGS["llava"], {"text/layers": 0.01}  # layers go first
    least = {"text/layers": 2}
    tight, smallest = 0.5 * count(config), search(config, count, 0)
    assert search(config, count, tight, weights=weights).sizes["text/layers"] == 1
    held = search(config, count, tight, weights=weights, least=least)
    assert held.sizes["text/layers"] == 2 and held.price <= tight
    assert search(config, count, 0, weights=weights, least=least) == smallest
    assert smallest.sizes["text/layers"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_next_larger_size_on_any_axis_exceeds_the_budget(name):
    config = MODELS[name]
    budget = 0.3 * count(config)
    best, more = search(config, count, budget).sizes, {}
    for axis in free_axes(config):
        above = [
            n for n in range(best[axis] + 1, sizes(config)[axis] + 1) if not illegal_reason(config, {**best, axis: n})
        ]
        # The next larger size is the largest one that steps down to the chosen size.
        if next_up := [n for n in above if next_smaller(config, {**best, axis: n}, axis) == best[axis]]:
            more[axis] = search(config, count, np.inf, pins={**best, axis: next_up[-1]}).price
    assert len(more) > 1
    assert min(more.values()) > budget


def test_a_whole_model_within_the_budget_stays_whole():
    for config in CONFIGS.values():
        assert search(config, count, count(config)).config == config


def test_sizes_step_down_to_three_significant_bits_rounded_up_to_legal_sizes():
    def ladder(config, axis, *multiple):
        at, steps = sizes(config), []
        at = {name: at[name] for name in free_axes(config)}
        while at[axis]:
            steps.append(at[axis])
            at[axis] = next_smaller(config, at, axis, *multiple)
        return steps

    deep = MODELS["antgmm-deep"]
    assert ladder(deep, "decoder/layers") == [37, 32, 28, 24, 20, 16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1]
    assert ladder(deep, "vision/embed") == [192, 160, 128, 96, 64, 32]
    # Six query heads divide the width.
    assert ladder(CONFIGS["llava"], "text/embed") == [36, 30, 24, 18, 12, 6]
    # Nine query heads: multiples of 8 x 9 down to the square of 8, and not 513, 450, 387.
    assert ladder(preset("smolvlm-135m"), "text/embed") == [
        576,
        504,
        432,
        360,
        288,
        216,
        144,
        72,
        63,
        54,
        45,
        36,
        27,
        18,
        9,
    ]
    # Kernels of four bits take multiples of 32 alone: with nine query heads those of 288, with six those of 96.
    assert ladder(preset("smolvlm-135m"), "text/embed", 32) == [576, 288]
    assert next_smaller(preset("smolvlm-135m"), {"text/embed": 288, "text/heads": 2}, "text/embed", 32) == 192
    assert ladder(preset("smolvlm-135m"), "text/mlp", 32)[-3:] == [96, 64, 32]


def test_a_step_takes_the_axis_with_the_best_saving():
    # By hand: one layer of 3 less costs 3 x (3/2 - 1) = 1.5 on both stacks. A text layer saves 2 sublayers at the
    # prompt and 2 at each of 15 further tokens; an image layer saves 2.
    llava = CONFIGS["llava"]
    assert sublayers(llava) == 3 * 2 + 1 + 3 * 2 * 16
    result = search(llava, sublayers, 72)
    assert {axis: n for axis, n in result.sizes.items() if n != sizes(llava)[axis]} == {"text/layers": 2}
    assert result.price == 3 * 2 + 1 + 2 * 2 * 16


def test_widths_are_multiples_of_what_kernels_take():
    config = preset("smolvlm-135m")
    budget = total_parameters(config) // 18
    result = search(config, total_parameters, budget, multiple=32)
    assert result.price <= budget
    assert {n % 32 for axis, n in result.sizes.items() if axis.endswith(("embed", "mlp"))} == {0}


def test_a_latency_budget_cuts_layers_first_and_a_parameter_budget_widths():
    deep = MODELS["antgmm-deep"]

    def kept(price):
        chosen = search(deep, price, 0.2 * price(deep)).sizes
        return {axis: chosen[axis] / sizes(deep)[axis] for axis in ("decoder/layers", "vision/layers", "text/embed")}

    few, quick = kept(count), kept(sublayers)
    assert few["decoder/layers"] > few["text/embed"]
    assert quick["text/embed"] == 1
    assert quick["decoder/layers"] < quick["vision/layers"]


@pytest.mark.parametrize(
    ("family", "pins", "held"),
    [
        ("blip2_t5", {"vision/layers": 2, "vision/heads": 2}, {"vision/layers": 2, "vision/embed": 16}),
        long("blip2_t5", {"decoder/mlp": 0.5}, {"encoder/mlp": 6, "decoder/mlp": 6}),
        ("llava", {"bridge/mlp": 24}, {"text/embed": 24, "bridge/mlp": 24}),
    ],
)
def test_pinned_sizes_and_their_tied_sizes_are_kept(family, pins, held):
    config = CONFIGS[family]
    for share in (0.8, 0.4, 0):
        chosen = sizes(search(config, count, share * count(config), pins=pins).config)
        assert {axis: chosen[axis] for axis in held} == held
    assert chosen != sizes(config)


@pytest.mark.long
def test_a_tower_with_a_larger_weight_stays_larger():
    deep = MODELS["antgmm-deep"]
    plain, vision = (search(deep, count, 1e6, weights=weights) for weights in ({}, {"vision": 8.0}))
    assert parameters(vision.config)["vision"] > parameters(plain.config)["vision"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pins": {"vision/mpl": 3}}, "did you mean 'vision/mlp'"),
        ({"pins": {"vision/embed": 12}}, "nearest legal sizes: vision/embed 8 or 16"),
        ({"weights": {"image": 2.0}}, "unknown tower 'image': this model has vision, bridge, encoder, text, decoder"),
    ],
)
def test_invalid_pins_and_weights_are_refused(options, message):
    with pytest.raises(AntgmmError, match=message):
        search(CONFIGS["blip2_t5"], count, 1000, **options)


@pytest.mark.parametrize(("name", "free"), [("vision/heads", "vision/embed"), ("bridge", "text/embed")])
def test_weights_of_what_follows_another_axis_are_refused(name, free):
    config = CONFIGS["llava"]
    with pytest.raises(AntgmmError, match=f"the weight of '{name}' has no effect: .* so weigh {free}"):
        search(config, count, 1000, weights={name: 4.0})
    search(config, count, count(config), weights={free: 4.0, "vision": 2.0})
    # The bridge of other families has axes of its own.
    search(CONFIGS["blip2_t5"], count, count(CONFIGS["blip2_t5"]), weights={"bridge": 4.0})


@pytest.mark.parametrize("seed", range(3))
def test_a_cut_to_the_chosen_sizes_has_their_price_for_any_scores(seed):
    # Scores may choose Q-Former layers that all have cross-attention.
    config, rng = CONFIGS["blip2_t5"], np.random.default_rng(seed)
    result = search(config, count, 0.5 * count(config), pins={"bridge/layers": 2})
    present, local = sizes(config), local_axes(config)
    scores = {axis: rng.random(gate_shape(axis, present, local)) for axis in present}
    scores["bridge/layers"] = np.array([1.0, 0, 1.0, 0])
    assert count(shrunk_config(config, plan(scores, config, result.sizes))) == result.price


@pytest.mark.parametrize("name", NAMES)
def test_stages_reach_the_chosen_sizes_in_legal_steps(name):
    config = MODELS[name]
    for share in SHARES:
        result = search(config, count, share * count(config))
        stages, at = by_stage(config, result.sizes), config
        assert all(axis.endswith("layers") for axis in stages.get("blocks", ()))
        for wanted in stages.values():
            assert not illegal_reason(at, wanted)
            at = planned_config(at, wanted)
        assert sizes(at) == sizes(result.config)


def test_heads_that_do_not_divide_the_full_width_are_cut_with_it():
    llava = CONFIGS["llava"]  # 36 wide, 3 x 2 query heads; of 40, 5 x 2
    assert not illegal_reason(llava, {"text/embed": 32, "text/heads": 2})
    assert by_stage(llava, {"text/embed": 24, "text/heads": 2})["intermediate"] == {"text/heads": 2}
    wide = planned_config(llava, {"text/embed": 30})
    assert by_stage(wide, {"text/embed": 24, "text/heads": 2}) == {"hidden": {"text/embed": 24, "text/heads": 2}}
