"""Parameters, FLOPs, memory traffic and KV cache of a model, computed from its config.

FLOPs count matrix products only (2 per multiply-add), as executed: attention includes all cache slots, also padding.
Norms, softmax and activations are ignored; at real widths they are a few percent.
"""

import math
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import jax

from antgmm_jax.axes import resize, sizes
from antgmm_jax.config import IMAGE_SIDE, LMMConfig, StackConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.parallel.sharding import without_mesh
from antgmm_jax.pure import abstract, functional, is_axes

TOKENS = "tokens"  # the token table and the head


class Cost(NamedTuple):
    """The cost of generating answers for a batch by greedy decoding with a KV cache.

    Attributes:
        parameters: tower -> number of parameters; towers are `vision`, `bridge`, `encoder` and `decoder`, or `text`
            (decoder-only), and `tokens` (token table and head).
        flops: phase -> tower -> FLOPs; phases are `vision` (images to text positions), `prefill` (prompt to first
            answer token) and `decode` (all further tokens).
        bytes: phase -> tower -> minimum bytes of parameters and KV cache read or written; they limit decoding at
            batch 1.
        kv_cache: bytes of keys and values at the end.
        sublayers: phase -> tower -> number of attention and MLP layers executed in sequence, over all steps; they
            limit the latency of small models.
    """

    parameters: dict[str, int]
    flops: dict[str, dict[str, int]]
    bytes: dict[str, dict[str, int]]
    kv_cache: int
    sublayers: dict[str, dict[str, int]]


def cost(
    config: LMMConfig, batch: int, length: int, answer: int, *, itemsize: int = 2, slots: float | None = None
) -> Cost:
    """Returns the cost of one call of `generate`, without allocating the model.

    Args:
        config: model config.
        batch: number of samples.
        length: prompt tokens per sample, including image tokens.
        answer: answer tokens per sample.
        itemsize: bytes of a parameter and of a cache entry; 2 for bfloat16.
        slots: image slots per sample, possibly a mean; None for those of one image of the usual size.

    Returns:
        The cost.

    Raises:
        AntgmmError: batch, length or answer is below 1.
    """
    if min(batch, length, answer) < 1:
        raise AntgmmError(f"cost of batch {batch}, length {length}, answer {answer}: each must be at least 1")
    counts, steps, tower = parameters(config), answer - 1, decoder_tower(config)
    # With an encoder, the decoder starts from one start token, else from the prompt.
    first, memory = (1, length) if config.encoder_decoder else (length, 0)
    keys, heads = first + answer, _head_flops(config, batch)
    prefill = {"encoder": _tower_flops(config, "encoder", batch, length, length)} if config.encoder_decoder else {}
    prefill[tower] = _tower_flops(config, tower, batch, first, first, memory) + _memory_flops(config, batch, memory)
    decode = steps * _tower_flops(config, tower, batch, 1, keys, memory)
    flops = {
        "vision": _image_flops(config, batch, slots),
        "prefill": {**prefill, TOKENS: heads},
        "decode": {tower: decode, TOKENS: steps * heads},
    }
    kv_cache = _cache_entries(config.language.decoder, batch, keys, memory) * itemsize
    read = {phase: {name: counts[name] * itemsize for name in towers} for phase, towers in flops.items()}
    # Embedding the prompt reads few rows of the token table; the head is read once for the first token.
    head = config.language.vocab * config.language.decoder.embed * itemsize
    read["prefill"] |= {tower: counts[tower] * itemsize + kv_cache, TOKENS: head}
    # Decoding does not read the kernels for the encoder states' keys and values: these are in the cache.
    weights = counts[tower] - kernels(config).get((tower, "encoder"), 0)
    read["decode"] = {tower: steps * (weights * itemsize + kv_cache), TOKENS: steps * head}
    return Cost(counts, flops, read, kv_cache, _sublayers(config, steps))


def forward_flops(
    config: LMMConfig,
    batch: int,
    length: int,
    answer: int = 0,
    *,
    slots: float | None = None,
    logits: int | None = None,
) -> dict[str, int]:
    """Returns the FLOPs of one forward pass with teacher forcing.

    A training step takes about three times as many, with logits at the answer's tokens.

    Args:
        config: model config.
        batch: number of samples.
        length: prompt tokens per sample, including image tokens; for a decoder-only model, prompt and answer.
        answer: decoder tokens per sample, for a model with an encoder.
        slots: image slots per sample, possibly a mean; None for those of one image of the usual size.
        logits: tokens per sample of which logits are computed; None for all tokens of the decoder.

    Returns:
        tower -> FLOPs.
    """
    flops, tower = _image_flops(config, batch, slots), decoder_tower(config)
    tokens, memory = (answer, length) if config.encoder_decoder else (length, 0)
    if config.encoder_decoder:
        flops["encoder"] = _tower_flops(config, "encoder", batch, length, length)
    flops[tower] = _tower_flops(config, tower, batch, tokens, tokens, memory) + _memory_flops(config, batch, memory)
    return {**flops, TOKENS: _head_flops(config, batch * (tokens if logits is None else logits))}


def parameters(config: LMMConfig) -> dict[str, int]:
    """Returns the exact number of parameters per tower.

    Args:
        config: model config.

    Returns:
        tower -> count, as in `Cost.parameters`.
    """
    counts: Counter[str] = Counter()
    for tower, _, elements in _arrays(config):
        counts[tower] += elements
    order = (*IMAGE_SIDE, *towers(config), TOKENS)
    return {tower: counts[tower] for tower in dict.fromkeys(order) if tower in counts}


@lru_cache(maxsize=1024)
def total_parameters(config: LMMConfig) -> int:
    """Returns the exact number of parameters of a model."""
    return sum(parameters(config).values())


def kernels(config: LMMConfig) -> dict[tuple[str, str], int]:
    """Returns (tower, tokens that they multiply) -> number of elements of the kernels of linear maps."""
    elements_by: Counter[tuple[str, str]] = Counter()
    for tower, over, count in _arrays(config):
        if over:
            elements_by[tower, over] += count
    return dict(elements_by)


def _arrays(config: LMMConfig) -> list[tuple[str, str, int]]:
    """Tower, `over` (see `Functional.over`) and number of elements of every parameter."""
    present = {**sizes(config), **family(config).depth.sizes(config)}
    unit = _unit_arrays(resize(config, dict.fromkeys(sizes(config), 1)))
    return [(tower, over, fixed * math.prod(present[axis] for axis in axes)) for tower, over, fixed, axes in unit]


@lru_cache(maxsize=64)
def _unit_arrays(unit: LMMConfig) -> list[tuple[str, str, int, tuple[str, ...]]]:
    """The same for a model with all axes of size 1, with axis names; cached because tracing is slow."""
    known = {*sizes(unit), *family(unit).depth.sizes(unit)}
    pure, arrays = functional(unit), []
    with without_mesh():  # nothing of this size is placed, so there is nothing to warn of
        shapes = jax.tree_util.tree_leaves_with_path(abstract(unit))
    names, over = jax.tree.leaves(pure.axes, is_leaf=is_axes), jax.tree.leaves(pure.over)
    for (path, leaf), axes, tokens in zip(shapes, names, over, strict=True):
        tower = _tower_of("/".join(key.key for key in path), unit)
        fixed = math.prod(size for size, axis in zip(leaf.shape, axes, strict=True) if axis not in known)
        arrays.append((tower, tokens, fixed, tuple(axis for axis in axes if axis in known)))
    return arrays


def _tower_of(path: str, config: LMMConfig) -> str:
    """Tower of a parameter; the final norm of a stack counts as part of it."""
    for tower in towers(config).values():
        if path.startswith((f"{tower.root}/", f"{tower.root}_norm/")):
            return tower.name
    part, name = path.split("/")[:2]
    if part != "language":
        return part
    return TOKENS if name in ("tokens", "out") else decoder_tower(config)


def decoder_tower(config: LMMConfig) -> str:
    """Returns the name of the tower that decodes answers."""
    return [*towers(config)][-1]


def _head_flops(config: LMMConfig, tokens: int) -> int:
    return 2 * tokens * config.language.decoder.embed * config.language.vocab


def _image_flops(config: LMMConfig, batch: int, slots: float | None) -> dict[str, int]:
    """FLOPs of the image side with some image slots per sample; None for those of one image of the usual size."""
    flops: Counter[str] = Counter()
    slots = config.slots if slots is None else slots
    # A slot attends to itself only, or all slots of a sample to one another.
    alone, together = (slots, 1) if config.grid is None else (1, slots)
    tokens = {name: together * count for name, count in config.tokens.items()}
    for (tower, over), elements in kernels(config).items():
        if over in tokens:
            flops[tower] += round(2 * batch * alone * tokens[over] * elements)
    for tower in towers(config).values():
        if tower.tokens == "images":
            # The feed-forward layer of the text does not run in the last layer: nothing reads its output.
            text = f"{tower.name}/text"
            unread = kernels(config).get((tower.name, text), 0) // tower.stack.layers
            flops[tower.name] -= round(2 * batch * alone * tokens.get(text, 0) * unread)
            own, memory = tokens[tower.name], tokens.get(tower.reads, 0)
            queries = tokens.get(f"{tower.name}/queries", own)  # only they have cross-attention
            near = config.vision.reach if tower.name == "vision" else 0
            attention = _attention_flops(tower.stack, own, own, near) + _cross_flops(tower.stack, queries, memory)
            flops[tower.name] += round(batch * alone * attention)
    return dict(flops)


def _tower_flops(config: LMMConfig, tower: str, batch: int, queries: int, keys: int, memory: int = 0) -> int:
    """FLOPs of a tower for `queries` new tokens that attend to `keys` slots and to `memory` cached states."""
    linear, stack = 2 * queries * kernels(config)[tower, tower], towers(config)[tower].stack
    attention = _attention_flops(stack, queries, keys, stack.window) + _cross_flops(stack, queries, memory)
    return batch * (linear + int(attention))


def _attention_flops(stack: StackConfig, queries: float, keys: float, near: int) -> float:
    """FLOPs of self-attention scores and weighted sums; a query of a local layer sees at most `near` keys, if not 0."""
    seen = sum(min(keys, near) if local and near else keys for local in stack.is_local)
    return 4 * queries * stack.q_per_kv * stack.head_dim * stack.heads * seen


def _cross_flops(stack: StackConfig, queries: float, memory: float) -> float:
    """FLOPs of cross-attention scores and weighted sums of a stack."""
    return 4 * queries * stack.q_per_kv * stack.head_dim * stack.cross_layers * stack.cross_heads * memory


def _memory_flops(config: LMMConfig, batch: int, memory: int) -> int:
    """FLOPs of the keys and values of the encoder states in the decoder's cross-attention."""
    return 2 * batch * memory * kernels(config).get((decoder_tower(config), "encoder"), 0)


def _sublayers(config: LMMConfig, steps: int) -> dict[str, dict[str, int]]:
    """Number of attentions, cross-attentions and MLPs by phase and tower; a bridge without a stack counts as 1."""
    count = {name: 2 * tower.stack.layers + tower.stack.cross_layers for name, tower in towers(config).items()}
    tower = decoder_tower(config)
    images = {name: count.get(name, 1) for name in IMAGE_SIDE}
    text = {name: n for name, n in count.items() if name not in images}
    return {"vision": images, "prefill": text, "decode": {tower: steps * count[tower]}}


def _cache_entries(stack: StackConfig, batch: int, slots: int, memory: int) -> int:
    heads = stack.layers * stack.heads * slots + stack.cross_layers * stack.cross_heads * memory
    return 2 * batch * heads * stack.head_dim
