"""Batch sizes of passes without gradients, from the memory of the devices."""

from collections.abc import Callable
from math import inf

import jax
import numpy as np

from antgmm_jax.blocks import blocked
from antgmm_jax.config import LMMConfig, Remat, StackConfig, Tower, towers
from antgmm_jax.decoding import crowded
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.memory import device_memory
from antgmm_jax.pure import abstract
from pruning.costs import cost, total_parameters

SHARE = 0.6
"""Share of a device's memory for parameters and activations; the estimate leaves out what the compiler adds."""


def compute_dtype(stored: str) -> str:
    """Returns the dtype in which a model computes.

    Args:
        stored: dtype of its files.

    Returns:
        "float32" on a CPU, which is not faster with bfloat16, and for float32 files; else "bfloat16", which has the
        range of float32.
    """
    return "float32" if jax.default_backend() == "cpu" or stored == "float32" else "bfloat16"


def rows_that_fit(
    config: LMMConfig,
    most: int,
    *,
    text: int,
    answer: int,
    slots: int = 1,
    dtype: str = "float32",
    states: int = 0,
    memory: float = 0,
    generated: int = 0,
) -> int:
    """Returns the batch size of a forward pass or of generation that fits into memory.

    Args:
        config: model config.
        most: maximum number of rows.
        text: prompt tokens of a row, with the answer in a model without an encoder.
        answer: answer tokens of a row.
        slots: image slots of a row.
        dtype: dtype of parameters and computation.
        states: bytes of a row of the result.
        memory: bytes of a device; 0 for `device_memory`.
        generated: answer tokens that are generated: keys and values are then held twice, and maybe the decoder.

    Returns:
        `most`, halved until the batch fits; at least one row for each device.
    """
    itemsize, devices = np.dtype(jax.numpy.dtype(dtype)).itemsize, sharding.padded_batch_size(1)
    memory, parts = memory or device_memory(), sharding.model_parts()
    free = SHARE * memory - total_parameters(config) * itemsize / parts
    row, rows = states + row_bytes(config, text=text, answer=answer, slots=slots, itemsize=itemsize), most
    if generated:
        layers = itemsize * sum(leaf.size for leaf in jax.tree.leaves(abstract(config)["language"]["decoder"])) / parts
        copied = sharding.platform() != "tpu" and not crowded(layers, memory)
        row += cost(config, 1, max(text, 1), generated, itemsize=itemsize).kv_cache
        free -= copied * layers
    while rows > devices and -(-rows // devices) * row > free:
        rows = max(rows // 2, devices)
    return rows


def answering(
    config: LMMConfig, most: int, tokens: int, *, dtype: str = "float32", memory: float = 0
) -> Callable[..., int]:
    """Returns the batch size that fits as a function of lengths, for greedy answers and the loss of the right ones.

    Args:
        config: model config.
        most: maximum number of rows.
        tokens: tokens that are generated.
        dtype: as in `rows_that_fit`.
        memory: as in `rows_that_fit`.

    Returns:
        Columns of text and answers, and image slots, by name -> rows, as in `rows_that_fit`.
    """

    def fits(*, answer: int, **lengths: int) -> int:
        lengths |= {"answer": max(answer, tokens), "generated": tokens}
        return rows_that_fit(config, most, **lengths, dtype=dtype, memory=memory)

    return fits


def row_bytes(config: LMMConfig, *, text: int, answer: int, slots: int, itemsize: int) -> int:
    """Returns an upper estimate of the activations of a row in a forward pass or in generation.

    One layer of one tower is active at a time. Keys and values of the decoder stay, and so do logits of the answer.

    Args:
        config: model config.
        text: prompt tokens.
        answer: answer tokens.
        slots: image slots.
        itemsize: bytes of a number.

    Returns:
        Bytes.
    """
    tokens, alone = _tokens(config, text, answer, slots), _apart(config, slots)
    # Attention within segments never holds all pairs of a long row.
    most = 2 * blocked.LARGEST if config.grid is not None else inf

    def active(tower: Tower) -> float:
        images = tower.tokens == "images"
        scores = _score_bytes(tower.stack, tokens[tower.tokens], alone if images else 1)
        return (min(scores, most) if images else scores) + _layer_bytes(tower.stack, tokens[tower.tokens], itemsize)

    cache = cost(config, 1, max(text, 1), max(answer, 1), itemsize=itemsize).kv_cache
    logits = 8 * max(answer, 1) * config.language.vocab
    return int(max(map(active, towers(config).values()))) + cache + logits


def saved_bytes(config: LMMConfig, *, text: int, answer: int, slots: int, itemsize: int, remat: Remat) -> int:
    """Returns an upper estimate of what the layers of a row store for the backward pass.

    Args:
        config: model config.
        text: prompt tokens, with the answer in a model without an encoder.
        answer: answer tokens.
        slots: image slots.
        itemsize: bytes of a number.
        remat: what the layers store.

    Returns:
        Bytes.
    """
    tokens, alone, total = _tokens(config, text, answer, slots), _apart(config, slots), 0
    for tower in towers(config).values():
        stack, count = tower.stack, tokens[tower.tokens]
        whole = remat in ("none", "dots")  # otherwise its input, and what attention reads
        layer = _layer_bytes(stack, count, itemsize) if whole else 6 * count * itemsize * stack.embed
        scores = _score_bytes(stack, count, alone if tower.tokens == "images" else 1) if remat == "none" else 0
        total += stack.layers * (layer + scores)
    return total


def _tokens(config: LMMConfig, text: int, answer: int, slots: int) -> dict[str, int]:
    """What towers process -> tokens of a row."""
    return {"images": slots * config.tokens["vision"], "text": text, "answers": max(answer, 1)}


def _apart(config: LMMConfig, slots: int) -> int:
    """Number of groups of a row's image tokens that attend only to their own group."""
    return max(slots, 1) if config.grid is None else 1


def _score_bytes(stack: StackConfig, tokens: int, groups: int) -> int:
    """Attention scores and their softmax in float32."""
    return 8 * max(stack.heads * stack.q_per_kv, stack.cross_heads) * tokens**2 // groups


def _layer_bytes(stack: StackConfig, tokens: int, itemsize: int) -> int:
    """Hidden units, and the residual stream with its projections."""
    return tokens * itemsize * (3 * stack.mlp + 8 * stack.embed)
