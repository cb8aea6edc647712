"""Losses equal values computed by hand, by PyTorch and by optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from antgmm_jax.errors import AntgmmError
from distill import losses
from distill.losses import LossConfig

RNG = np.random.default_rng(0)
STUDENT = jnp.array(RNG.normal(size=(2, 3, 7)), jnp.float32)
TEACHER = jnp.array(RNG.normal(size=(2, 3, 7)), jnp.float32)
TARGETS = jnp.array([[0, 6, 2], [3, -100, 1]])


def test_hard_equals_torch():
    torch = pytest.importorskip("torch")
    logits, targets = torch.tensor(np.array(STUDENT)).reshape(-1, 7), torch.tensor(np.array(TARGETS)).reshape(-1).long()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none").reshape(2, 3).numpy()
    got = np.where(TARGETS >= 0, losses.hard(STUDENT, TARGETS), 0.0)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("temperature", "direction"), [(1.0, "forward"), (2.5, "forward"), (2.5, "reverse")])
def test_soft_equals_torch_and_optax(temperature, direction):
    torch = pytest.importorskip("torch")
    got = losses.soft(STUDENT, TEACHER, temperature=temperature, direction=direction)
    assert got.dtype == jnp.float32
    log = [torch.log_softmax(torch.tensor(np.array(x)) / temperature, -1) for x in (STUDENT, TEACHER)]
    of, against = (log[1], log[0]) if direction == "forward" else (log[0], log[1])
    expected = torch.nn.functional.kl_div(against, of, log_target=True, reduction="none").sum(-1) * temperature**2
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
    by_optax = optax.losses.kl_divergence_with_log_targets(jnp.asarray(against.numpy()), jnp.asarray(of.numpy()))
    np.testing.assert_allclose(got, by_optax * temperature**2, atol=1e-5)


def test_soft_of_equal_logits_has_zero_value_and_gradient():
    value, gradient = jax.value_and_grad(lambda x: losses.soft(x, TEACHER, temperature=3.0).sum())(TEACHER)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_pair_by_hand():
    logits = jnp.array([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0], [3.0, 2.0, 2.25], [3.0, 2.0, 0.0]])
    # m = 2.5 (2.625 in row 2): gaps of 2.5, -0.5 (the label is top-1), 0.375, and 0.5 for the runner-up.
    np.testing.assert_allclose(losses.pair(logits, jnp.array([2, 0, 2, 1])), [2.5, 0.0, 0.375**2, 0.25], atol=1e-7)


def test_pair_gradient_runs_through_both_factors():
    logits = jnp.array([3.0, 2.0, 2.25])  # gap = (3 + 2.25) / 2 - 2 = 0.625 for label 1: the square of the gap
    gradient = jax.grad(losses.pair)(logits, jnp.array(1))
    np.testing.assert_allclose(gradient, 2 * 0.625 * np.array([0.5, -1.0, 0.5]), atol=1e-6)
    far = jax.grad(losses.pair)(jnp.array([3.0, 0.0, 2.25]), jnp.array(1))  # gap above 1: linear
    np.testing.assert_allclose(far, [0.5, -1.0, 0.5], atol=1e-6)


def test_pair_equals_the_released_formula_in_torch():
    torch = pytest.importorskip("torch")
    logits = torch.tensor(np.array(STUDENT).reshape(-1, 7)).requires_grad_()
    targets = torch.tensor([0, 6, 2, 3, 5, 1])
    mean = logits.topk(2, dim=-1).values.mean(-1)
    gap = mean - logits.gather(-1, targets[:, None])[:, 0]
    expected = torch.clamp(gap * torch.clamp(gap.abs(), max=1.0), min=0.0)
    expected.sum().backward()
    got, gradient = jax.value_and_grad(lambda x: losses.pair(x, jnp.array(targets.numpy())).sum())(
        STUDENT.reshape(-1, 7)
    )
    np.testing.assert_allclose(got, expected.sum().item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, logits.grad.numpy(), atol=1e-6)


def test_rank_by_hand():
    teacher = jnp.array([5.0, 4.0, 3.0, -9.0])
    student = jnp.array([1.0, 1.5, 4.0, 99.0])
    # Pairs (0,1), (0,2), (1,2): gaps 0.5, 3, 2.5 give 0.25, 3, 2.5. Token 3 is not among the teacher's top three.
    np.testing.assert_allclose(losses.rank(student, teacher, top=3), (0.25 + 3.0 + 2.5) / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.rank(2 * teacher - 1, teacher, top=4), 0.0)
    assert losses.rank(student, teacher, top=50) == losses.rank(student, teacher, top=4)


def test_rank_of_a_single_token_is_zero():
    teacher, student = jnp.array([[5.0, 4.0], [1.0, 2.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    for value in (losses.rank(student, teacher, top=1), losses.rank(student[:, :1], teacher[:, :1])):
        np.testing.assert_array_equal(value, [0.0, 0.0])


def test_hidden_by_hand():
    # Layers 0 and 2 of a teacher of 3, channels 1 and 2 of 3; one token.
    teacher = jnp.arange(12.0).reshape(4, 1, 1, 3)
    student = jnp.array([[50.0, 50.0], [7.0, 9.0], [10.0, 12.0]]).reshape(3, 1, 1, 2)
    # The layer after 0 is teacher layer 2 with the input [6, 7, 8]; the final state is [9, 10, 11].
    expected = (((7 - 7) ** 2 + (9 - 8) ** 2) / (49 + 64) + (0 + 1) / (100 + 121)) / 2
    got = losses.hidden(student, teacher, layers=np.array([0, 2]), embed=np.array([1, 2]))
    np.testing.assert_allclose(got, [[expected]], rtol=1e-6)


def test_hidden_is_scale_free_and_zero_on_equal_states():
    teacher = jnp.array(RNG.normal(size=(4, 2, 3, 5)), jnp.float32)
    student = jnp.array(RNG.normal(size=(4, 2, 3, 5)), jnp.float32)

    def hidden(student, teacher):
        return losses.hidden(student, teacher, layers=np.arange(3), embed=np.arange(5))

    np.testing.assert_allclose(hidden(teacher, teacher), 0.0)
    np.testing.assert_allclose(hidden(student, teacher), hidden(90 * student, 90 * teacher), rtol=1e-5)


def test_hidden_is_equal_for_the_gated_and_the_shrunk_student():
    teacher = jnp.array(RNG.normal(size=(6, 2, 3, 7)), jnp.float32)
    gated = np.array(RNG.normal(size=(5, 2, 3, 4)), np.float32)
    layers, embed = np.array([0, 1, 3, 4]), np.array([0, 2, 3, 6])
    kept, channels = np.array([1, 3]), np.array([0, 1, 3])
    gated[1], gated[3] = gated[0], gated[2]  # a closed block leaves the stream unchanged
    got = losses.hidden(
        jnp.array(gated),
        teacher,
        layers=layers,
        embed=embed,
        layer_gates=jnp.zeros(4).at[kept].set(1.0),
        embed_gates=jnp.zeros(4).at[channels].set(1.0),
    )
    shrunk = gated[np.append(kept, 4)][..., channels]
    expected = losses.hidden(jnp.array(shrunk), teacher, layers=layers[kept], embed=embed[channels])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_bfloat16_inputs_give_float32_losses():
    logits, other = jnp.array(STUDENT, jnp.bfloat16), jnp.array(TEACHER, jnp.bfloat16)
    values = [losses.hard(logits, TARGETS), losses.soft(logits, other), losses.pair(logits, TARGETS)]
    assert all(value.dtype == jnp.float32 for value in [*values, losses.rank(logits, other)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"soft": -1.0}, "soft"),
        ({"hidden": float("nan")}, "hidden"),
        ({"hard": 0.0}, "every weight is 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"direction": "sideways"}, "'forward' or 'reverse'"),
        ({"bridge_tokens": "sensitivity"}, "bridge_tokens = 'sensitivity' has no effect: set the weight of bridge"),
    ],
)
def test_invalid_loss_configs_are_refused(fields, message):
    with pytest.raises(AntgmmError, match=message):
        LossConfig(**fields)


def test_terms_are_the_losses_with_a_weight():
    assert LossConfig(hard=0.0, soft=1.0, vision=0.5).terms() == ("soft", "vision")
