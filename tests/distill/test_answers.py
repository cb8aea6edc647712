"""The losses of answer tokens on a mesh are those of one device, with heads that stay split or are gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.parallel.sharding import make_mesh, place_tree
from antgmm_jax.pure import functional
from distill import LossConfig, answers, make_loss, online
from tests.pruning.models import CONFIGS, batch_of, parameters

CONFIG = LossConfig(hard=1.0, soft=0.5, pair=0.2, rank=0.3, temperature=2.0)


@pytest.mark.parametrize("family", ["llava", "blip2_t5"])  # a head of its own, and a scaled token table
@pytest.mark.parametrize(
    ("sizes", "split"), [({"fsdp": 2}, True), ({"fsdp": 2, "tensor": 2}, False), ({"data": 2}, False)]
)
def test_a_mesh_gives_the_losses_and_gradients_of_one_device(family, sizes, split, monkeypatch):
    config, rows = CONFIGS[family], batch_of(CONFIGS[family])
    pure, params = functional(config), jax.tree.map(jnp.asarray, parameters(family))
    frozen = jax.tree.map(lambda leaf: leaf * 1.1, params)
    teacher, used, columns = online(pure, frozen), [], answers.by_columns
    monkeypatch.setattr(answers, "by_columns", lambda *each: used.append(each) or columns(*each))
    loss = make_loss(pure, CONFIG, teacher=teacher)

    def run(params, teacher):
        return loss(params, {}, rows, teacher)

    (value, terms), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params, frozen)
    with jax.set_mesh(make_mesh(**sizes)):
        placed = (place_tree(tree, pure.axes) for tree in (params, frozen))
        (meshed, others), other = jax.jit(jax.value_and_grad(run, has_aux=True))(*placed)
    assert len(used) == (2 if split else 0)  # the student's head and the teacher's
    np.testing.assert_allclose(meshed, value, rtol=1e-5)
    for term in CONFIG.terms():
        # A divergence is a small difference of log probabilities of 4, each of which is rounded by 2e-7.
        np.testing.assert_allclose(others[term], terms[term], rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5), gradient, other)


def test_heads_are_gathered_for_many_tokens():
    """Their logits would take more to send than the heads."""
    names = [("text/embed", "vocab")] * 2
    with jax.set_mesh(make_mesh(fsdp=4)):
        assert answers._stay_split(names, jnp.zeros((4 * 16, 64)))
        assert not answers._stay_split(names, jnp.zeros((4 * 17, 64)))
        assert not answers._stay_split([*names, ("", "")], jnp.zeros((4, 64)))  # an adapter
