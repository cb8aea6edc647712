"""What a model costs, from its config alone: parameters, FLOPs, bytes and KV cache, by tower and by phase.

FLOPs are those of matrix products (2 per multiply-add), as the engine executes them: attention runs over all cache
slots, padding included. Norms, softmax and activations are left out; at real widths they are a few percent.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import jax

from antgmm_jax.config import LMMConfig, QFormerConfig, StackConfig, resize, sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import abstract, functional, is_axes
from pruning.keep import CROSS_LAYERS

TOKENS = "tokens"  # the token table and the head


class Cost(NamedTuple):
    """The cost of answering a batch, greedily, with a KV cache.

    Attributes:
        parameters: tower -> number of parameters; towers are `vision`, `bridge`, `encoder` and `decoder` (T5) or `text`
            (decoder-only), and `tokens` (token table and head).
        flops: phase -> tower -> FLOPs; phases are `vision` (images to text positions), `prefill` (prompt to first
            answer token) and `decode` (all further tokens).
        bytes: phase -> tower -> bytes of parameters and KV cache read or written at least, the bound of a decoder at
            batch 1.
        kv_cache: bytes of keys and values held at the end.
        sublayers: phase -> tower -> attentions and FFNs run one after another, over all steps; what a small model
            waits for.
    """

    parameters: dict[str, int]
    flops: dict[str, dict[str, int]]
    bytes: dict[str, dict[str, int]]
    kv_cache: int
    sublayers: dict[str, dict[str, int]]


def cost(config: LMMConfig, batch: int, length: int, answer: int, *, itemsize: int = 2) -> Cost:
    """The cost of one call of `generate`; nothing is allocated.

    Args:
        config: the model.
        batch: samples.
        length: prompt tokens a sample, image tokens included.
        answer: answer tokens a sample.
        itemsize: bytes of a parameter and of a cache entry; 2 for bfloat16.

    Returns:
        Parameters, FLOPs, bytes and KV cache.

    Raises:
        AntgmmError: for a batch, length or answer below 1.
    """
    if min(batch, length, answer) < 1:
        raise AntgmmError(f"cost of batch {batch}, length {length}, answer {answer}: each must be at least 1")
    counts, steps = parameters(config), answer - 1
    language, tower = config.language, _decoder_tower(config)
    # A T5 decoder starts from one start token, a decoder-only model from the prompt.
    first, memory = (length, 0) if language.encoder is None else (1, length)
    slots = first + answer
    flops = {
        "vision": _image_flops(config, batch),
        "prefill": {
            **({} if language.encoder is None else {"encoder": _stack_flops(language.encoder, batch, length, length)}),
            tower: _stack_flops(language.decoder, batch, first, slots, memory)
            + _memory_flops(language.decoder, batch, memory),
            TOKENS: _head_flops(config, batch),
        },
        "decode": {
            tower: steps * _stack_flops(language.decoder, batch, 1, slots, memory),
            TOKENS: steps * _head_flops(config, batch),
        },
    }
    kv_cache = _cache_entries(language.decoder, batch, slots, memory) * itemsize
    read = {phase: {name: counts[name] * itemsize for name in towers} for phase, towers in flops.items()}
    # The prompt only gathers its rows of the token table; the head is read once for the first token.
    head = language.vocab * language.decoder.embed * itemsize
    read["prefill"] |= {tower: counts[tower] * itemsize + kv_cache, TOKENS: head}
    # Keys and values of the encoder's states are in the cache: their kernels are not read again.
    weights = counts[tower] - _memory_flops(language.decoder, 1, 1) // 2
    read["decode"] = {tower: steps * (weights * itemsize + kv_cache), TOKENS: steps * head}
    return Cost(counts, flops, read, kv_cache, _sublayers(config, steps))


def forward_flops(config: LMMConfig, batch: int, length: int, answer: int = 0) -> dict[str, int]:
    """FLOPs of one teacher-forced forward pass (`Functional.apply`); a training step takes about three times as many.

    Args:
        config: the model.
        batch: samples.
        length: prompt tokens a sample, image tokens included; of a decoder-only model, prompt and answer.
        answer: decoder tokens a sample (T5).

    Returns:
        tower -> FLOPs.
    """
    language, tower = config.language, _decoder_tower(config)
    flops = _image_flops(config, batch)
    tokens, memory = length, 0
    if language.encoder is not None:
        flops["encoder"] = _stack_flops(language.encoder, batch, length, length)
        tokens, memory = answer, length
    flops[tower] = _stack_flops(language.decoder, batch, tokens, tokens, memory)
    flops[tower] += _memory_flops(language.decoder, batch, memory)
    return {**flops, TOKENS: _head_flops(config, batch * tokens)}


def parameters(config: LMMConfig) -> dict[str, int]:
    """Number of parameters by tower, exactly.

    Args:
        config: the model.

    Returns:
        tower -> count, as in `Cost.parameters`.
    """
    present = sizes(config)
    if isinstance(config.bridge, QFormerConfig):
        present[CROSS_LAYERS] = _cross_layers(config.bridge.stack)
    counts: dict[str, int] = {}
    for tower, fixed, axes in _arrays(resize(config, dict.fromkeys(sizes(config), 1))):
        counts[tower] = counts.get(tower, 0) + fixed * math.prod(present[axis] for axis in axes)
    return {
        tower: counts[tower] for tower in ("vision", "bridge", "encoder", "decoder", "text", TOKENS) if tower in counts
    }


def total_parameters(config: LMMConfig) -> int:
    """Number of parameters of a model, exactly."""
    return sum(parameters(config).values())


@lru_cache(maxsize=64)
def _arrays(unit: LMMConfig) -> list[tuple[str, int, tuple[str, ...]]]:
    """Tower, elements and axes of every parameter of a model whose axes are all 1; tracing it takes a while."""
    towers = {"encoder_norm": "encoder", "encoder": "encoder", "tokens": TOKENS, "out": TOKENS}
    known = {*sizes(unit), CROSS_LAYERS}
    found = []
    shapes = jax.tree_util.tree_leaves_with_path(abstract(unit))
    names = jax.tree.leaves(functional(unit).axes, is_leaf=is_axes)
    for (path, leaf), axes in zip(shapes, names, strict=True):
        part, name = path[0].key, path[1].key
        tower = towers.get(name, _decoder_tower(unit)) if part == "language" else part
        found.append((tower, math.prod(leaf.shape), tuple(axis for axis in axes if axis in known)))
    return found


def _decoder_tower(config: LMMConfig) -> str:
    return "text" if config.language.encoder is None else "decoder"


def _head_flops(config: LMMConfig, tokens: int) -> int:
    return 2 * tokens * config.language.decoder.embed * config.language.vocab


def _image_flops(config: LMMConfig, batch: int) -> dict[str, int]:
    vision, bridge, text = config.vision, config.bridge, config.language.decoder.embed
    embed, tokens = vision.stack.embed, vision.tokens
    patches = 2 * batch * (tokens - 1) * vision.channels * vision.patch**2 * embed
    found = {"vision": patches + _stack_flops(vision.stack, batch, tokens, tokens)}
    if isinstance(bridge, QFormerConfig):
        out = 2 * batch * bridge.queries * bridge.stack.embed * text
        reads = _stack_flops(bridge.stack, batch, bridge.queries, bridge.queries, tokens)
        found["bridge"] = reads + _memory_flops(bridge.stack, batch, tokens) + out
    else:
        found["bridge"] = 2 * batch * config.image_tokens * bridge.mlp * (embed + text)
    return found


def _stack_flops(stack: StackConfig, batch: int, queries: int, keys: int, memory: int = 0) -> int:
    """A stack over `queries` new tokens that attend to `keys` slots and `memory` states whose keys are known."""
    ffn = (3 if stack.gated else 2) * stack.embed * stack.mlp
    own = (2 * stack.q_per_kv + 2) * stack.heads * stack.head_dim * stack.embed
    scores = 2 * stack.heads * stack.q_per_kv * stack.head_dim * keys
    cross = stack.cross_heads * stack.q_per_kv * stack.head_dim * (2 * stack.embed + 2 * memory)
    return 2 * batch * queries * (stack.layers * (ffn + own + scores) + _cross_layers(stack) * cross)


def _memory_flops(stack: StackConfig, batch: int, memory: int) -> int:
    """Keys and values of the states that cross-attention reads."""
    return 2 * batch * memory * _cross_layers(stack) * 2 * stack.cross_heads * stack.head_dim * stack.cross_embed


def _cross_layers(stack: StackConfig) -> int:
    return -(-stack.layers // stack.cross_every) if stack.cross_heads else 0


def _sublayers(config: LMMConfig, steps: int) -> dict[str, dict[str, int]]:
    """Attentions (a cross-attention is one more) and FFNs by phase and tower."""

    def count(stack: StackConfig) -> int:
        return 2 * stack.layers + _cross_layers(stack)

    bridge, language, tower = config.bridge, config.language, _decoder_tower(config)
    encoder = {} if language.encoder is None else {"encoder": count(language.encoder)}
    return {
        "vision": {
            "vision": count(config.vision.stack),
            "bridge": count(bridge.stack) if isinstance(bridge, QFormerConfig) else 1,
        },
        "prefill": {**encoder, tower: count(language.decoder)},
        "decode": {tower: steps * count(language.decoder)},
    }


def _cache_entries(stack: StackConfig, batch: int, slots: int, memory: int) -> int:
    heads = stack.layers * stack.heads * slots + _cross_layers(stack) * stack.cross_heads * memory
    return 2 * batch * heads * stack.head_dim
