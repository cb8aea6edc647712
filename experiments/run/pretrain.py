"""Pretraining of the image side on what generated pictures show: facts of the whole, and what stands in each cell."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float

from antgmm_jax.config import LMMConfig, Remat, VisionConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import Params, functional
from data.maad.cells import SIDE
from distill.optimizer import Optimizer, State
from distill.step import Step, jitted
from distill.teacher import to_dtype

IMAGE_SIDE = ("vision", "bridge")
"""Top-level parameters that pretraining trains."""

CELLS_WEIGHT = 3.0
"""Weight of the cells' loss beside the facts': with 0 digits stay at chance for many times the steps."""


def init_params(config: LMMConfig, params: Params, facts: Mapping[str, int], classes: int, key: jax.Array) -> Params:
    """The image side's parameters with a linear head per fact and one for the cells.

    Args:
        config: a model whose bridge has a stack.
        params: the model's parameters.
        facts: fact -> number of classes, in a fixed order; fact i is read off image token i.
        classes: number of classes of a cell, read off the patch that covers it.
        key: random key of the heads.

    Returns:
        {"model": image-side parameters, "facts": {fact: {"kernel" [D, n], "bias" [n]}}, "cells": {"kernel"
        [V, y, x, classes], "bias" [classes]}} with y by x cells a patch.

    Raises:
        AntgmmError: no such bridge, fewer image tokens than facts, or patches that do not cover whole cells.
    """
    if "bridge" not in towers(config) or config.image_tokens < len(facts):
        raise AntgmmError(f"pretraining on {len(facts)} facts needs a bridge with a stack and as many image tokens")
    width, heads, inside = towers(config)["bridge"].stack.embed, {}, _cells_a_patch(config.vision)
    cells_key, *keys = jax.random.split(key, 1 + len(facts))
    for name, fact_key in zip(facts, keys, strict=True):
        kernel = width**-0.5 * jax.random.normal(fact_key, (width, facts[name]))
        heads[name] = {"kernel": kernel, "bias": jnp.zeros((facts[name],))}
    width = config.vision.stack.embed
    kernel = width**-0.5 * jax.random.normal(cells_key, (width, inside, inside, classes))
    model = {part: params[part] for part in IMAGE_SIDE}
    return {"model": model, "facts": heads, "cells": {"kernel": kernel, "bias": jnp.zeros((classes,))}}


def _cells_a_patch(config: VisionConfig) -> int:
    patches = config.image // config.patch
    if SIDE % patches:
        raise AntgmmError(f"{patches} patches a side do not divide {SIDE} cells: choose another patch size")
    return SIDE // patches


def _cell_logits(config: VisionConfig, head: Params, states: Float[Array, "B N V"]) -> Float[Array, "B S S C"]:
    """Class logits of all cells, read off the states of the patches (the class token left out)."""
    patches = config.image // config.patch
    logits = jnp.einsum("bnv,vyxc->bnyxc", states[:, 1:], head["kernel"]) + head["bias"]
    return rearrange(logits, "b (gy gx) y x c -> b (gy y) (gx x) c", gy=patches)


def make_pretrain_step(
    config: LMMConfig,
    params: Params,
    facts: Mapping[str, int],
    optimizer: Optimizer,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = "dots",
) -> Step:
    """One jitted step on the mean cross-entropy of the facts and, weighted, of the cells; for `distill.train.train`.

    Args:
        config: the model.
        params: its parameters; the language model's are not touched and not read.
        facts: fact -> number of classes.
        optimizer: from `distill.optimizer.make_optimizer`.
        dtype: what the model is computed in; heads, losses and the parameters in the state are float32.
        remat: what the model's layers keep for the backward pass.

    Returns:
        The step, whose gates and teacher are not read; batch has `images`, `cells` [B, SIDE, SIDE] and a class
        per fact under `fact/<name>` [B]. Metrics: `loss`, `accuracy`, `worst` (the hardest fact's accuracy), `cells`
        (accuracy where a cell shows something), `grad_norm` and `learning_rate`.
    """
    vision, language = functional(config, remat).vision, params["language"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(trained: Params, batch: Mapping[str, jax.Array]):
        model = to_dtype({**trained["model"], "language": language}, dtype)
        states, queries = to_dtype(vision(model, batch["images"]), jnp.float32)
        losses, accuracies = [], []
        for i, name in enumerate(facts):
            head = trained["facts"][name]
            logits = queries[:, 0, i] @ head["kernel"] + head["bias"]
            target = batch[f"fact/{name}"]
            losses.append(cross_entropy(logits, target).mean())
            accuracies.append((logits.argmax(-1) == target).mean())
        logits, target = _cell_logits(config.vision, trained["cells"], states), batch["cells"].astype(jnp.int32)
        shows = target > 0
        # Two thirds of all cells are background, which is easy.
        weight = jnp.where(shows, 1.0, 0.2)
        dense = (weight * cross_entropy(logits, target)).sum() / weight.sum()
        seen = (shows & (logits.argmax(-1) == target)).sum() / jnp.maximum(shows.sum(), 1)
        return sum(losses[1:], losses[0]) / len(losses) + CELLS_WEIGHT * dense, (jnp.stack(accuracies), seen)

    def step(state: State, batch: Any, gates: Any, teacher: Any, rate: jax.Array):
        (value, (accuracy, seen)), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics = {"loss": value, "accuracy": accuracy.mean(), "worst": accuracy.min(), "cells": seen}
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return State(params, opt_state, state.step + 1), metrics

    return jitted(step, optimizer)
