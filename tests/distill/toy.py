"""A small model with the interface of `antgmm_jax.pure`, and batches for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, LENGTH, ANSWERS, IMAGE = 11, 6, 3, 1


class Toy(NamedTuple):
    init: Callable
    apply: Callable
    head: Callable
    axes: Any


def toy(width: int, layers: int, vocab: int = VOCAB) -> Toy:
    """Embedding, residual tanh blocks with layer and channel gates, linear head."""

    def init(key):
        table, blocks, head = jax.random.split(key, 3)
        return {
            "text": {
                "table": jax.random.normal(table, (vocab, width)),
                "blocks": 0.5 * jax.random.normal(blocks, (layers, width, width)),
                "bias": jnp.zeros((layers, width)),
            },
            "head": {"kernel": jax.random.normal(head, (width, vocab)) / width**0.5},
        }

    def apply(params, batch, gates=None, *, collect=()):
        gates = gates or {}
        blocks = params["text"]["blocks"]
        open_layers = jnp.asarray(gates.get("text/layers", jnp.ones(blocks.shape[0])), blocks.dtype)
        open_channels = jnp.asarray(gates.get("text/embed", jnp.ones(blocks.shape[1])), blocks.dtype)
        x = params["text"]["table"][batch["input_ids"]]
        states = [x]
        for i in range(blocks.shape[0]):
            y = jnp.tanh((x * open_channels[None, None]) @ blocks[i] + params["text"]["bias"][i][None, None])
            x = x + open_layers[i] * y
            states.append(x)
        final = x * open_channels[None, None]
        out = {"logits": head(params, final), "final": final, "text/states": jnp.stack(states)}
        return {"logits": out["logits"], **{name: out[name] for name in collect}}

    def head(params, hidden, gates=None):
        return hidden @ params["head"]["kernel"]

    blocks = {"blocks": ("layers", "embed", "embed"), "bias": ("layers", "embed")}
    axes = {"text": {"table": ("vocab", "embed"), **blocks}, "head": {"kernel": ("embed", "vocab")}}
    return Toy(init, apply, head, axes)


def batch(seed: int, size: int = 4, length: int = LENGTH, answers: int = ANSWERS, vocab: int = VOCAB) -> dict:
    """A host batch whose rows have different numbers of valid answer tokens, padded on the right."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, vocab, (size, answers)).astype(np.int32)
    for row in range(size):
        targets[row, 1 + row % answers :] = -100
    mask = np.ones((size, length), np.int32)
    mask[1::2, -1] = 0
    return {
        "id": np.array([f"row-{seed}-{i}" for i in range(size)]),
        "index": np.arange(size) + seed * size,
        "input_ids": rng.integers(0, vocab, (size, length)).astype(np.int32),
        "attention_mask": mask,
        "positions": np.tile(np.arange(length - answers, length, dtype=np.int32), (size, 1)),
        "targets": targets,
    }


def device(host: dict) -> dict:
    return {name: x for name, x in host.items() if name not in ("id", "index")}
