"""Pretraining of an image side on what generated pictures show: facts of the whole, and what stands in each cell."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float

from antgmm_jax.config import IMAGE_SIDE, LMMConfig, Remat, VisionConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import Params, functional
from data.maad.cell_grid import SIDE

CELLS_WEIGHT = 3.0
"""Weight of the cells' loss beside the facts': with 0 digits stay at chance for many times the steps."""

Loss = Callable[[Params, Mapping[str, jax.Array]], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def with_heads(config: LMMConfig, params: Params, facts: Mapping[str, int], classes: int, key: jax.Array) -> Params:
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


def cell_logits(config: VisionConfig, head: Params, states: Float[Array, "B N V"]) -> Float[Array, "B S S C"]:
    """Class logits of all cells, read off the states of the patches (the class token left out).

    Args:
        config: the image encoder.
        head: `kernel` [V, y, x, C] and `bias` [C].
        states: the encoder's last states, the class token first.

    Returns:
        Logits of `SIDE` by `SIDE` cells.
    """
    patches = config.image // config.patch
    logits = jnp.einsum("bnv,vyxc->bnyxc", states[:, 1:], head["kernel"]) + head["bias"]
    return rearrange(logits, "b (gy gx) y x c -> b (gy y) (gx x) c", gy=patches)


def facts_loss(
    config: LMMConfig, params: Params, facts: Mapping[str, int], *, dtype: jnp.dtype, remat: Remat = "dots"
) -> Loss:
    """The mean cross-entropy of the facts and, weighted, of the cells, as a function of what `with_heads` gives.

    Args:
        config: the model.
        params: its parameters; the language model's are not read by the loss.
        facts: fact -> number of classes.
        dtype: what the model is computed in; heads and losses are float32.
        remat: what the model's layers keep for the backward pass.

    Returns:
        loss(trained, batch) -> (float32 scalar, metrics). A batch has `images`, `cells` [B, SIDE, SIDE] and a class per
        fact under `fact/<name>` [B]. Metrics: `accuracy`, `worst` (the hardest fact's accuracy) and `cells` (accuracy
        where a cell shows something).
    """
    vision, language = functional(config, remat).vision, params["language"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(trained: Params, batch: Mapping[str, jax.Array]):
        model = optax.tree.cast({**trained["model"], "language": language}, dtype)
        states, queries = (made.astype(jnp.float32) for made in vision(model, batch["images"]))
        losses, accuracies = [], []
        for i, name in enumerate(facts):
            head = trained["facts"][name]
            logits = queries[:, 0, i] @ head["kernel"] + head["bias"]
            target = batch[f"fact/{name}"]
            losses.append(cross_entropy(logits, target).mean())
            accuracies.append((logits.argmax(-1) == target).mean())
        logits, target = cell_logits(config.vision, trained["cells"], states), batch["cells"].astype(jnp.int32)
        shows = target > 0
        # Two thirds of all cells are background, which is easy.
        weight = jnp.where(shows, 1.0, 0.2)
        dense = (weight * cross_entropy(logits, target)).sum() / weight.sum()
        seen = (shows & (logits.argmax(-1) == target)).sum() / jnp.maximum(shows.sum(), 1)
        accuracy = jnp.stack(accuracies)
        metrics = {"accuracy": accuracy.mean(), "worst": accuracy.min(), "cells": seen}
        return sum(losses[1:], losses[0]) / len(losses) + CELLS_WEIGHT * dense, metrics

    return loss
