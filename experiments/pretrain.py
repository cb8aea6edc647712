"""Pretraining of the image side on facts of generated pictures: one linear head per fact, each on its own query."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from antgmm_jax.config import LMMConfig, QFormerConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import Params, functional
from distill.optimizer import Optimizer, State
from distill.step import Step

IMAGE_SIDE = ("vision", "bridge")
"""Top-level parameters that pretraining trains."""


def init_params(config: LMMConfig, params: Params, facts: Mapping[str, int], key: jax.Array) -> Params:
    """The image side's parameters with a linear head per fact.

    Args:
        config: a model with a Q-Former.
        params: the model's parameters.
        facts: fact -> number of classes, in a fixed order; fact i is read off query i.
        key: random key of the heads.

    Returns:
        {"model": image-side parameters, "heads": {fact: {"kernel" [D, n], "bias" [n]}}}.

    Raises:
        AntgmmError: no Q-Former, or fewer queries than facts.
    """
    if not isinstance(config.bridge, QFormerConfig) or config.bridge.queries < len(facts):
        raise AntgmmError(f"pretraining on {len(facts)} facts needs a Q-Former with at least as many queries")
    width, heads = config.bridge.stack.embed, {}
    for name, fact_key in zip(facts, jax.random.split(key, len(facts)), strict=True):
        kernel = width**-0.5 * jax.random.normal(fact_key, (width, facts[name]))
        heads[name] = {"kernel": kernel, "bias": jnp.zeros((facts[name],))}
    return {"model": {part: params[part] for part in IMAGE_SIDE}, "heads": heads}


def make_pretrain_step(config: LMMConfig, params: Params, facts: Mapping[str, int], optimizer: Optimizer) -> Step:
    """One jitted step on the mean cross-entropy of the facts, for `distill.train.train`.

    Args:
        config: the model.
        params: its parameters; the language model's are not touched and not read.
        facts: fact -> number of classes.
        optimizer: from `distill.optimizer.make_optimizer`.

    Returns:
        step(state, batch, gates, teacher_params) -> (state, metrics); batch has `pixel_values` and a class per fact
        under `fact/<name>` [B]. Metrics: `loss`, `accuracy`, `worst` (the hardest fact's accuracy), `grad_norm` and
        `learning_rate`.
    """
    features, language = functional(config).features, params["language"]

    def loss(trained: Params, batch: Mapping[str, jax.Array]):
        states = features({**trained["model"], "language": language}, batch["pixel_values"])
        losses, accuracies = [], []
        for i, name in enumerate(facts):
            head = trained["heads"][name]
            logits = states[:, i] @ head["kernel"] + head["bias"]
            target = batch[f"fact/{name}"]
            losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, target).mean())
            accuracies.append((logits.argmax(-1) == target).mean())
        return sum(losses[1:], losses[0]) / len(losses), jnp.stack(accuracies)

    def step(state: State, batch: Any, gates: Any, teacher: Any):
        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        rate = optimizer.schedule(state.step)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics = {"loss": value, "accuracy": accuracy.mean(), "worst": accuracy.min()}
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return State(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)
