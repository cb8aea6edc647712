"""Weights of the bridge's output tokens equal those from PyTorch's gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from antgmm_jax.blocks.projector import OUT
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.pure import functional
from distill import LossConfig, bridge_weights, make_loss, online, parts
from distill.sensitivity import FLOOR
from pruning.keep import identity
from tests import reference
from tests.pruning.models import CONFIGS, EACH, batch_of, parameters


def torch_shares(model, arrays, targets) -> np.ndarray:
    """Each token's share of |gradient|^2 |features|^2 at the input of the last linear map, averaged over samples."""
    seen = []
    hook = model.language_projection.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) or inputs[0].retain_grad()
    )
    logits = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits
    hook.remove()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()).backward()
    (features,) = seen
    effect = (features.grad**2).sum(-1) * (features**2).sum(-1)
    return (effect / effect.sum(1, keepdim=True)).mean(0).detach().numpy()


def test_weights_equal_the_shares_of_pytorchs_gradients(tmp_path):
    model = reference.blip2(seed=5)
    config, params = load_hf(reference.saved(model, tmp_path / "model"))
    arrays, rng = reference.batch(model), np.random.default_rng(1)
    # Token 0 is hidden from one sample, token 2 from all.
    arrays["attention_mask"][0, 0] = arrays["attention_mask"][:, 2] = 0
    targets = rng.integers(2, 48, arrays["decoder_input_ids"].shape)
    shares = torch_shares(model, arrays, targets)
    ours = {**reference.ours(arrays), "targets": targets, "positions": np.broadcast_to(np.arange(5), targets.shape)}
    weights = bridge_weights(functional(config), params, [ours])
    expected = (shares * len(shares) + FLOOR) / (1 + FLOOR)
    assert expected[2] < 0.1 < expected[0] < 0.9 < expected[1]
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)


def test_an_unused_image_token_has_the_floor_weight():
    config, batch = CONFIGS["llava"], batch_of(CONFIGS["llava"])
    ids = np.array(batch["input_ids"])
    last = np.array([np.flatnonzero(row == config.image_token)[-1] for row in ids])
    unread = {**batch, "input_ids": ids.copy()}
    # A word replaces the last image token of each sample.
    unread["input_ids"][np.arange(len(ids)), last] = 5
    both, only = (bridge_weights(functional(config), parameters("llava"), seen) for seen in ([unread, batch], [unread]))
    np.testing.assert_allclose(only[-1], FLOOR / (1 + FLOOR), rtol=1e-6)
    assert both[-1] > 2 * only[-1]
    images = {**batch["images"], "valid": np.zeros_like(batch["images"]["valid"])}
    none = {**batch, "images": images, "input_ids": np.where(ids == config.image_token, 5, ids)}
    more = bridge_weights(functional(config), parameters("llava"), [unread, none, batch])
    np.testing.assert_allclose(more, both, rtol=1e-5)
    np.testing.assert_array_equal(bridge_weights(functional(config), parameters("llava"), [none]), np.ones(len(both)))
    with pytest.raises(AntgmmError, match="at least one calibration batch"):
        bridge_weights(functional(config), parameters("llava"), [])


def summing(features):
    """A model whose hidden state is the sum of the features of a row's slots: its pixels."""

    def apply(params, batch, gates=None, *, collect=()):
        read = batch.get("vision_features", batch["images"].get("pixels"))
        return {"final": read.sum((1, 2))[:, None], OUT: read.reshape(1, -1, *read.shape[2:])}

    def head(params, hidden, gates=None):
        return hidden @ params["out"]

    return SimpleNamespace(apply=apply, head=head, features=features, axes={"out": ("embed", "vocab")})


def rows_of(features):
    """Rows of features [slots, tokens]; the label of each is token 0, and the second row's last slot is unused."""
    pixels = jnp.asarray(features)[..., None]
    answers = np.zeros((len(pixels), 1), np.int32)
    valid = np.ones(pixels.shape[:2], bool)
    valid[1, -1] = False
    return {"images": {"pixels": pixels, "valid": valid}, "targets": answers, "positions": answers}


def test_shares_are_of_all_slots_of_a_row_by_hand():
    rows = rows_of([[[0.1, 0.2], [0.3, 0.1]], [[0.2, 0.2], [0.7, 0.9]]])
    model = summing(lambda params, images: images["pixels"])
    # Squares of features, as all gradients of a row are equal: 1 + 9 and 4 + 1 of 15 in the first row, and halves of
    # the only used slot of the second.
    expected = (np.array([10 / 15 + 1 / 2, 5 / 15 + 1 / 2]) + FLOOR) / (1 + FLOOR)
    np.testing.assert_allclose(bridge_weights(model, {"out": jnp.array([[1.0, 0.0]])}, [rows]), expected, rtol=1e-5)
    # Without a weight in the head, no answer depends on an image.
    np.testing.assert_array_equal(bridge_weights(model, {"out": jnp.zeros((1, 2))}, [rows]), [1, 1])


def test_one_token_of_a_slot_has_the_weight_1_without_a_gradient():
    model = summing(lambda params, images: pytest.fail("computes features"))
    weights = bridge_weights(model, {"out": jnp.array([[1.0, 0.0]])}, [rows_of([[[0.1], [0.3]], [[0.2], [0.7]]])])
    np.testing.assert_array_equal(weights, [1])


@pytest.mark.parametrize("family", EACH)
def test_the_bridge_loss_weighs_its_tokens(family):
    config, batch = CONFIGS[family], batch_of(CONFIGS[family])
    params, other = parameters(family), jax.tree.map(lambda leaf: 1.1 * leaf, parameters(family))
    teacher, model = online(functional(config), params), functional(config)

    def value(weights):
        compared = parts(config, identity(config), bridge_weights=weights)
        loss = make_loss(model, LossConfig(hard=0.0, bridge=1.0), teacher=teacher, parts=compared)
        return float(loss(other, {}, batch, params)[0])

    count = model.features(params, batch["images"]).shape[2]
    each = [value(np.eye(count, dtype=np.float32)[token]) for token in range(count)]
    assert max(each) > min(each) > 0
    weights = np.arange(1, count + 1, dtype=np.float32)
    np.testing.assert_allclose(value(weights), weights @ each, rtol=1e-5)
    np.testing.assert_allclose(value(None), sum(each), rtol=1e-5)
