"""Images of batches as transformers' models take them, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.blocks.pictures import as_hf, from_hf


@pytest.mark.parametrize("used", [(3, 0, 2), (1, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize("unused_behind", [0, 4])
def test_from_hf_is_the_inverse_of_as_hf(used, unused_behind):
    rng, used = np.random.default_rng(0), np.array(used)
    valid = np.arange(3)[None, :] < used[:, None]
    images = {"pixels": rng.normal(size=(3, 3, 2, 2, 3)).astype(np.float32), "valid": valid}
    flat = np.concatenate([as_hf(images), np.ones((unused_behind, 3, 2, 2), np.float32)])
    by_slot = np.moveaxis(images["pixels"], -1, 2)
    for pixel_values in (flat, by_slot):
        back = from_hf(jnp.asarray(pixel_values), jnp.asarray(used), 3)
        np.testing.assert_array_equal(back["valid"], valid)
        np.testing.assert_array_equal(np.asarray(back["pixels"])[valid], images["pixels"][valid])
