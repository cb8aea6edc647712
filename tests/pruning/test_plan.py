"""The units that a plan keeps, and the sizes that it refuses."""

import itertools

import numpy as np
import pytest

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2.frequency import every
from antgmm_jax.pure import local_axes
from pruning.keep import check, gate_shape, shrunk_config
from pruning.planning import check_scores, plan
from tests.pruning.models import CONFIGS

BLIP, LLAVA = CONFIGS["blip2_t5"], CONFIGS["llava"]


def scores_of(config, seed=0):
    rng, present, local = np.random.default_rng(seed), sizes(config), local_axes(config)
    return {axis: rng.random(gate_shape(axis, present, local), np.float32) for axis in present}


def test_units_with_the_largest_scores_are_kept_in_order():
    scores = {"text/layers": np.array([0.3, 0.1, 0.2]), "vision/mlp": np.tile(np.arange(20.0), (3, 1))}
    scores["vision/mlp"][1] = -scores["vision/mlp"][1]
    keep = plan(scores, LLAVA, {"text/layers": 2, "vision/mlp": 3})
    np.testing.assert_array_equal(keep["text/layers"], [0, 2])
    np.testing.assert_array_equal(keep["vision/mlp"], [[17, 18, 19], [0, 1, 2], [17, 18, 19]])
    assert {rows.dtype for rows in keep.values()} == {np.dtype(np.int32)}


def test_ties_keep_the_first_units():
    np.testing.assert_array_equal(plan({"text/layers": np.ones(3)}, LLAVA, {"text/layers": 2})["text/layers"], [0, 1])


def test_a_float_is_a_fraction_of_the_present_size():
    keep = plan(scores_of(LLAVA), LLAVA, {"text/mlp": 0.25, "vision/layers": 1.0, "text/layers": 1})
    assert {axis: rows.shape for axis, rows in keep.items()} == {
        "text/mlp": (3, 5), "vision/layers": (3,), "text/layers": (1,)
    }  # fmt: skip


def test_tied_axes_get_tied_counts_and_their_own_indices():
    keep = plan(scores_of(BLIP), BLIP, {"encoder/heads": 2, "vision/embed": 16, "encoder/mlp": 5})
    counts = {axis: rows.shape for axis, rows in keep.items()}
    assert counts == {
        "encoder/heads": (2,), "decoder/heads": (2,), "decoder/cross_heads": (3, 2), "vision/embed": (16,),
        "vision/heads": (3, 2), "encoder/mlp": (3, 5), "decoder/mlp": (3, 5),
    }  # fmt: skip
    check(BLIP, keep)


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (LLAVA, {"text/mpl": 3}, "unknown axis 'text/mpl': did you mean 'text/mlp'"),
        (LLAVA, {"text/mlp": 21}, "text/mlp = 21 would enlarge the axis: it has 20"),
        (LLAVA, {"text/mlp": 1.5}, "would enlarge"),
        (LLAVA, {"text/mlp": 0}, "keeps none of the 20 units"),
        (BLIP, {"vision/embed": 12}, r"vision/embed = 12 is not legal: .*vision/embed 8 or 16$"),
        (BLIP, {"vision/embed": 5}, r"nearest legal sizes: vision/embed 8$"),
        (BLIP, {"vision/embed": 12, "bridge/embed": 9}, r"sizes: vision/embed 8 or 16; bridge/embed 8 or 16$"),
        (BLIP, {"encoder/heads": 2, "decoder/heads": 1}, r"encoder/heads 1; decoder/heads 2$"),
        (LLAVA, {"text/embed": 17, "text/heads": 2}, r"sizes: text/embed 16 or 20$"),
    ],
)
def test_illegal_sizes_are_refused_with_a_remedy(config, targets, message):
    with pytest.raises(AntgmmError, match=message):
        plan(scores_of(config), config, targets)


def test_an_axis_without_scores_is_named():
    with pytest.raises(AntgmmError, match="decoder/mlp has no scores"):
        plan({"encoder/mlp": np.ones((3, 12))}, BLIP, {"encoder/mlp": 4})


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_q_former_layers_are_the_best_legal_set(count, seed):
    scores = scores_of(BLIP, seed)
    layers_kept = plan(scores, BLIP, {"bridge/layers": count})["bridge/layers"]
    score = scores["bridge/layers"]

    def legal(layers):
        cross = [layer % 2 == 0 for layer in layers]
        return cross == [i % 2 == 0 for i in range(count)] or all(cross)

    best = max(filter(legal, itertools.combinations(range(4), count)), key=lambda layers: score[list(layers)].sum())
    assert tuple(layers_kept) == best
    assert every(shrunk_config(BLIP, {"bridge/layers": layers_kept})) in (1, 2)


def test_scores_of_zero_on_an_axis_that_is_cut_are_refused():
    scores = scores_of(LLAVA)
    scores["vision/mlp"][1] = 0  # a layer of zeros, as of one without such units
    cut = plan(scores, LLAVA, {"vision/mlp": 3, "text/layers": 2})
    check_scores(scores, cut)
    zeros = {axis: 0 * score for axis, score in scores.items()}
    check_scores(zeros, plan(zeros, LLAVA, {"vision/mlp": 1.0}))
    remedy = "all importance scores are 0, so its first units would be kept: use more calibration rows"
    for axis, more in {"vision/mlp": ", some with images", "text/layers": ""}.items():
        with pytest.raises(AntgmmError, match=f"^{axis}: {remedy}{more}, or another importance$"):
            check_scores(scores | {axis: zeros[axis]}, cut)
