"""Sizes of a recipe: converted to counts, checked, and rounded up to legal sizes."""

import pytest

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2.frequency import every
from pruning.targets import legal_above, planned_config, resolve
from tests.pruning.models import CONFIGS

BLIP, LLAVA = CONFIGS["blip2_t5"], CONFIGS["llava"]


def test_fractions_become_counts():
    assert resolve(BLIP, {"vision/mlp": 0.5, "encoder/heads": 2}) == {"vision/mlp": 10, "encoder/heads": 2}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"vision/embed": 12}, r"vision/embed 8 or 16$"),
        ({"vision/mlp": 21}, "would enlarge the axis"),
        ({"vision/mpl": 4}, "did you mean 'vision/mlp'"),
    ],
)
def test_impossible_sizes_are_refused(targets, message):
    with pytest.raises(AntgmmError, match=message):
        resolve(BLIP, targets)


@pytest.mark.parametrize(
    ("config", "wanted", "legal"),
    [
        (BLIP, {"vision/embed": 16}, {"vision/embed": 16}),
        (BLIP, {"vision/embed": 9, "vision/mlp": 7}, {"vision/embed": 16, "vision/mlp": 7}),
        (BLIP, {"encoder/layers": 2, "decoder/layers": 1}, {"encoder/layers": 2, "decoder/layers": 1}),
        (LLAVA, {"text/embed": 31}, {"text/embed": 36}),
        # Two heads would tie the width to 16.
        (BLIP, {"vision/heads": 2, "vision/embed": 17}, {"vision/heads": 3, "vision/embed": 24}),
    ],
)
def test_legal_above_rounds_up_to_legal_sizes(config, wanted, legal):
    assert legal_above(config, wanted) == legal


def test_the_planned_config_has_the_tied_counts():
    smaller = planned_config(BLIP, {"vision/embed": 16, "encoder/heads": 2, "bridge/layers": 2})
    changed = {axis: n for axis, n in sizes(smaller).items() if n != sizes(BLIP)[axis]}
    assert changed == {"vision/embed": 16, "vision/heads": 2, "encoder/heads": 2, "decoder/heads": 2,
                       "decoder/cross_heads": 2, "bridge/layers": 2}  # fmt: skip
    assert every(smaller) == 2
