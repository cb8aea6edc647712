"""Pretraining of the image side of a model on facts of generated images and on the content of their cells."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from antgmm_jax.config import IMAGE_SIDE, LMMConfig, Remat, VisionConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import Params, functional
from data.maad.cell_grid import SIDE

CELLS_WEIGHT = 3.0
"""Weight of the cells' loss relative to the facts'; with 0, digits stay at chance for many times more steps."""

Loss = Callable[[Params, Mapping[str, jax.Array]], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def with_heads(config: LMMConfig, params: Params, facts: Mapping[str, int], classes: int, key: jax.Array) -> Params:
    """Returns the parameters of the image side with linear heads for the facts and the cells.

    Args:
        config: model config; its bridge must have a stack.
        params: model parameters.
        facts: fact -> number of classes, in a fixed order; the head of fact i reads image token i.
        classes: number of classes of a cell; its head reads the patch that contains the cell.
        key: random key of the heads.

    Returns:
        {"model": parameters of the image side, "facts": {fact: {"kernel" [D, n], "bias" [n]}}, "cells": {"kernel"
        [V, y, x, classes], "bias" [classes]}} with y x x cells per patch.

    Raises:
        AntgmmError: no such bridge, fewer image tokens than facts, or patches that do not contain whole cells.
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
        raise AntgmmError(f"{patches} patches per side do not divide {SIDE} cells: choose another patch size")
    return SIDE // patches


def cell_logits(config: VisionConfig, head: Params, states: Float[Array, "B N V"]) -> Float[Array, "B S S C"]:
    """Computes class logits of all cells from the states of the patches.

    Args:
        config: config of the image encoder.
        head: `kernel` [V, y, x, C] and `bias` [C].
        states: last states of the encoder; the first one is the class token, which is ignored.

    Returns:
        Logits of `SIDE` by `SIDE` cells.
    """
    patches = config.image // config.patch
    logits = jnp.einsum("bnv,vyxc->bnyxc", states[:, 1:], head["kernel"]) + head["bias"][None, None, None, None]
    return rearrange(logits, "b (gy gx) y x c -> b (gy y) (gx x) c", gy=patches)


def facts_loss(
    config: LMMConfig, params: Params, facts: Mapping[str, int], *, dtype: DTypeLike, remat: Remat = "dots"
) -> Loss:
    """Returns the pretraining loss: mean cross-entropy of the facts, plus the weighted cross-entropy of the cells.

    Args:
        config: model config.
        params: model parameters; the loss does not depend on those of the language model.
        facts: fact -> number of classes.
        dtype: dtype of computation; heads and losses are float32.
        remat: what the layers save for the backward pass.

    Returns:
        loss(trained, batch) -> (float32 scalar, metrics), with `trained` from `with_heads`. A batch has `images`,
        `cells` [B, SIDE, SIDE] and `fact/<name>` [B], the class of each fact. Metrics: `accuracy`, `worst` (lowest
        accuracy of a fact) and `cells` (accuracy on cells that are not background).
    """
    vision, language = functional(config, remat).vision, params["language"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(trained: Params, batch: Mapping[str, jax.Array]):
        model = optax.tree.cast({**trained["model"], "language": language}, dtype)
        states, queries = (x.astype(jnp.float32) for x in vision(model, batch["images"]))
        losses, accuracies = [], []
        for i, name in enumerate(facts):
            head = trained["facts"][name]
            logits = queries[:, 0, i] @ head["kernel"] + head["bias"][None]
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
