"""Pretraining of the image side of a model on facts about images and, if known, on the content of their cells."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from antgmm_jax.config import IMAGE_SIDE, LMMConfig, Remat, VisionConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import Params, functional
from data.maad.cell_grid import SIDE

CELLS_WEIGHT = 3.0
"""Weight of the cells' loss relative to the facts'; with 0, digits stay at chance for many times more steps."""

Loss = Callable[[Params, Mapping[str, jax.Array]], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def classes_of(rows: Iterable[tuple[str, Mapping[str, int]]]) -> dict[str, int]:
    """Returns the number of classes of each fact of a data set: one more than its largest class number.

    Args:
        rows: name and facts (`latents`) of each row.

    Returns:
        fact -> number of classes, in the order of the first row.

    Raises:
        AntgmmError: rows have no facts or not the same ones, or a class number is negative.
    """
    sizes: dict[str, int] = {}
    for name, facts in rows:
        sizes = sizes or dict.fromkeys(facts, 1)
        if not facts or facts.keys() != sizes.keys():
            given, wanted = ", ".join(facts) or "(none)", f", here {', '.join(sizes)}" if sizes else ""
            raise AntgmmError(f"{name}: latents {given}: a phase of kind facts needs the same in all rows{wanted}")
        if wrong := [fact for fact, number in facts.items() if number < 0]:
            raise AntgmmError(f"{name}: latent {wrong[0]} = {facts[wrong[0]]}: number its classes from 0")
        sizes = {fact: max(sizes[fact], int(facts[fact]) + 1) for fact in sizes}
    return sizes


def with_heads(config: LMMConfig, params: Params, facts: Mapping[str, int], classes: int, key: jax.Array) -> Params:
    """Returns the parameters of the image side with linear heads for the facts and the cells.

    Args:
        config: model config.
        params: model parameters.
        facts: fact -> number of classes, in a fixed order. The head of fact i reads token i of a bridge with a stack,
            and the mean of the image states where there is none.
        classes: number of classes of a cell, 0 without cells; its head reads the patch that contains the cell.
        key: random key of the heads.

    Returns:
        {"model": parameters of the image side, "facts": {fact: {"kernel" [D, n], "bias" [n]}}} and, with cells,
        {"cells": {"kernel" [V, y, x, classes], "bias" [classes]}} with y x x cells per patch.

    Raises:
        AntgmmError: the bridge has fewer tokens than there are facts, or patches do not contain whole cells.
    """
    if _has_stack(config) and config.image_tokens < len(facts):
        raise AntgmmError(f"{len(facts)} facts need as many image tokens, not {config.image_tokens}: name fewer facts")
    width, heads = towers(config)["bridge" if _has_stack(config) else "vision"].stack.embed, {}
    cells_key, *keys = jax.random.split(key, 1 + len(facts))
    for name, fact_key in zip(facts, keys, strict=True):
        kernel = width**-0.5 * jax.random.normal(fact_key, (width, facts[name]))
        heads[name] = {"kernel": kernel, "bias": jnp.zeros((facts[name],))}
    trained = {"model": {part: params[part] for part in IMAGE_SIDE}, "facts": heads}
    if not classes:
        return trained
    width, inside = config.vision.stack.embed, _cells_a_patch(config.vision)
    kernel = width**-0.5 * jax.random.normal(cells_key, (width, inside, inside, classes))
    return {**trained, "cells": {"kernel": kernel, "bias": jnp.zeros((classes,))}}


def _has_stack(config: LMMConfig) -> bool:
    """Whether the bridge has layers, which can gather one fact in each of its tokens."""
    return "bridge" in towers(config)


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
        states: last states of the encoder; a class token is ignored.

    Returns:
        Logits of `SIDE` by `SIDE` cells.
    """
    patches = config.image // config.patch
    logits = (
        jnp.einsum("bnv,vyxc->bnyxc", states[:, -config.patches :], head["kernel"])
        + head["bias"][None, None, None, None]
    )
    return rearrange(logits, "b (gy gx) y x c -> b (gy y) (gx x) c", gy=patches)


def facts_loss(
    config: LMMConfig, params: Params, facts: Mapping[str, int], *, dtype: DTypeLike, remat: Remat = "dots"
) -> Loss:
    """Returns the pretraining loss: cross-entropy of the facts, plus the weighted one of the cells if there are any.

    Args:
        config: model config.
        params: model parameters; the loss does not depend on those of the language model.
        facts: fact -> number of classes.
        dtype: dtype of computation; heads and losses are float32.
        remat: what the layers save for the backward pass.

    Returns:
        loss(trained, batch) -> (float32 scalar, metrics), with `trained` from `with_heads`. A batch has `images`,
        `fact/<name>` [B], the class of each fact, and `cells` [B, SIDE, SIDE] if `trained` has them. Metrics:
        `accuracy`, `worst` (lowest accuracy of a fact) and `cells` (accuracy on cells that are not background).
    """
    vision, language = functional(config, remat).vision, params["language"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(trained: Params, batch: Mapping[str, jax.Array]):
        model = optax.tree.cast({**trained["model"], "language": language}, dtype)
        states, tokens = (x.astype(jnp.float32) for x in vision(model, batch["images"]))
        # The means over the slots of a row; without layers in the bridge, no token gathers a fact.
        valid = batch["images"]["valid"].astype(jnp.float32)[:, :, None, None]
        read = (tokens * valid).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1.0)
        read = read if _has_stack(config) else jnp.repeat(read.mean(axis=1, keepdims=True), len(facts), axis=1)
        losses, accuracies = [], []
        for i, name in enumerate(facts):
            head = trained["facts"][name]
            logits = read[:, i] @ head["kernel"] + head["bias"][None]
            target = batch[f"fact/{name}"]
            losses.append(cross_entropy(logits, target).mean())
            accuracies.append((logits.argmax(-1) == target).mean())
        accuracy = jnp.stack(accuracies)
        total, metrics = (
            sum(losses[1:], losses[0]) / len(losses),
            {"accuracy": accuracy.mean(), "worst": accuracy.min()},
        )
        if "cells" in trained:
            logits, target = cell_logits(config.vision, trained["cells"], states), batch["cells"].astype(jnp.int32)
            dense, metrics["cells"] = _cells_loss(logits, target)
            total = total + CELLS_WEIGHT * dense
        return total, metrics

    return loss


def _cells_loss(
    logits: Float[Array, "B S S C"], target: Int[Array, "B S S"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of all cells, and the accuracy on cells that are not background."""
    shows = target > 0
    # Two thirds of all cells are background, which is easy.
    weight = jnp.where(shows, 1.0, 0.2)
    values = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    seen = (shows & (logits.argmax(-1) == target)).sum() / jnp.maximum(shows.sum(), 1)
    return (weight * values).sum() / weight.sum(), seen
