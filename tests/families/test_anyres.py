"""Images of any size as tiles with newlines: which are read, how they are computed with, and what is refused."""

import math
import tracemalloc
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import inputs
from antgmm_jax.families.llava_onevision import tiles
from antgmm_jax.families.llava_onevision.inputs import place_of
from data.shifting import shifted_squares
from tests.families.cases import case_of, config_with
from tests.families.test_inputs import assert_computed, picture, text_of
from tests.marks import long

ONEVISION = "llava_onevision"
WHOLE, SHRUNK = "Qwen2", "shrunk, tied, rest of a patch"


@pytest.fixture(scope="module", params=[WHOLE, SHRUNK])
def case(request, tmp_path_factory):
    return case_of(ONEVISION, request.param, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("size", [(23, 47), *map(long, ((2, 2), (64, 16), (1, 300), (20000, 5)))], ids=str)
def test_an_image_of_any_size_is_computed_with_as_pytorch_computes(case, size):
    assert_computed(case, case.reads, picture(*size))


@pytest.mark.parametrize(("size", "shape"), [((40, 17), (3, 2)), ((20, 60), (1, 3)), ((33, 32), (2, 2))], ids=str)
def test_each_token_takes_its_state_from_the_patches_of_transformers(size, shape):
    """States, shrunk and joined by PyTorch's own interpolation, are those that the taps name."""
    side, most, rng = 4, 2, np.random.default_rng(0)
    whole = tiles.group(size, shape, side, most)
    place = np.concatenate([tiles.base((5, 5), side, 1), tiles.base(size, side, 0), whole])
    states = rng.normal(size=(len(place), side, side, 3)).astype(np.float32)
    canvas = states[2:].reshape(*shape, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(shape[0] * side, -1, 3)
    top, left, high, wide = whole[0, 6:10]
    shown = torch.from_numpy(canvas[top : top + high, left : left + wide].transpose(2, 0, 1)[None].copy())
    ratio = math.sqrt(high * wide / (most * side**2))
    assert ratio > 1.1
    smaller = [int(high // ratio), int(wide // ratio)]
    shrunk = torch.nn.functional.interpolate(shown, smaller, mode="bilinear").numpy()[0].transpose(1, 2, 0)
    newline = np.full((smaller[0], 1, 3), 7, np.float32)
    lines = np.concatenate([shrunk, newline], axis=1).reshape(-1, 3)
    expected = np.concatenate([states[0].reshape(-1, 3), newline[0], states[1].reshape(-1, 3), lines])

    order = jnp.arange(tiles.tokens(place))[None]
    taps, ends = tiles.sources(order, jnp.array(place)[None], side)
    flat = states.reshape(-1, 3)
    got = sum(np.asarray(weight)[0, :, None] * flat[np.asarray(patch)[0]] for patch, weight in taps)
    np.testing.assert_allclose(np.where(np.asarray(ends)[0, :, None], 7, got), expected, atol=1e-5)
    assert [image.stop - image.start for image in tiles.images_of(place)] == [1, 1 + math.prod(shape)]


def test_several_images_are_base_tiles_only(case):
    images = [picture(64, 16), picture(20, 20)]
    ids, tree = case.reads(text_of(case.reads, images), images)
    assert len(tree["pixels"]) == 2
    assert (ids == case.config.image_token).sum() == 2 * (case.config.image_tokens + 1)


def test_tiles_of_bytes_stay_bytes(case):
    side = case.config.side
    made, place = np.zeros((1, 200, 3, side, side), np.uint8), np.zeros((200, tiles.COLUMNS), np.int32)
    tracemalloc.start()
    tree = case.reads._tree(made, [place])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tree["pixels"].shape == (200, side, side, 3)
    assert peak < 4 * made.nbytes


def test_tiles_are_shifted_as_one_image_and_the_base_tile_alone(case):
    _, tree = case.reads(text_of(case.reads, [0]), [picture(64, 30)])
    moved = shifted_squares(tree["pixels"], tree["place"], np.array([0, 2]))
    rows, columns = tree["place"][1, 2:4]
    assert columns > 1 and len(tree["pixels"]) == 1 + rows * columns
    np.testing.assert_array_equal(moved[0, :, 2:], tree["pixels"][0, :, :-2])
    np.testing.assert_array_equal(moved[2, :, :2], tree["pixels"][1, :, -2:])


def test_the_usual_image_is_one_of_the_size_of_a_tile(case):
    size = (case.config.vision.image, case.config.vision.image)
    np.testing.assert_array_equal(case.config.usual_place, place_of(case.config, size, alone=True))
    assert case.config.slots == 2
    assert case.config.usual_tokens == 2 * case.config.image_tokens + case.config.patches_per_side


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_aspect_ratio": "anyres"},
            "vision_aspect_ratio = 'anyres' is not supported: it must be 'anyres_max_",
        ),
        ({"image_grid_pinpoints": [[16, 24]]}, r"has \[16, 24\]: heights and widths must be multiples of image_size"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "it must be siglip_vision_model"),
        ({"vision_feature_layer": [1, 2]}, r"vision_feature_layer = \[1, 2\] is not supported"),
    ],
    ids=str,
)
def test_variants_that_are_not_supported_are_refused_by_field_and_value(changes, message):
    with pytest.raises(AntgmmError, match=message) as error:
        config_with(ONEVISION, WHOLE, **changes)
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_refused(case):
    processor, config = case.reads.processor, case.config
    with pytest.raises(AntgmmError, match="<video> stands for a video, which is not supported: use images"):
        case.reads("what is <video> ?", [])
    for other, name in ((replace(config, most_tiles=5), "vision_aspect_ratio"),
                        (replace(config, resolutions=config.resolutions[:2]), "image_grid_pinpoints")):  # fmt: skip
        with pytest.raises(AntgmmError, match=f"the processor's {name} is .* save the model's own processor"):
            inputs(other, processor)
    with pytest.raises(AntgmmError, match="needs a LlavaOnevisionProcessor"):
        inputs(config, object.__new__(ProcessorMixin))
    thin = replace(config, resolutions=((config.vision.image, 90 * config.vision.image),))
    with pytest.raises(AntgmmError, match="an image of 300 x 1 pixels is too long to be shrunk: crop it"):
        place_of(thin, (1, 300), alone=True)
