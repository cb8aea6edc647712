"""Greedy decoding with a key-value cache, in three jitted phases."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from antgmm_jax.blocks.language import LanguageModel, Prefilled, check_positions
from antgmm_jax.blocks.pictures import without_pixels
from antgmm_jax.blocks.split import split
from antgmm_jax.config import LMMConfig
from antgmm_jax.lmm import LMM, Batch
from antgmm_jax.parallel.memory import device_memory
from antgmm_jax.parallel.sharding import model_parts, platform
from antgmm_jax.pure import Params, functional

_ROOM = 0.5
"""Part of a device's memory that the decoder and its copy may take; the rest is for other parameters and for rows."""


class Phases(NamedTuple):
    """The jitted phases of a request, separate so that each can be timed.

    Attributes:
        vision: (params, images) -> image features.
        prefill: (params, batch with `vision_features`) -> state for `decode`.
        decode: (params, state) -> token ids [B, max_new_tokens].
    """

    vision: Callable[..., Array]
    prefill: Callable[..., tuple[Prefilled, Array | None]]
    decode: Callable[..., Array]


def generate(
    config: LMMConfig,
    params: Params,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    eos: int | Sequence[int],
    pad: int,
) -> Int[Array, "B max_new_tokens"]:
    """Generates answers by greedy decoding.

    Args:
        config: model config.
        params: model parameters.
        batch: `images` (or `vision_features` instead of pixels), `input_ids`, `attention_mask`; padding on either side.
        max_new_tokens: length of the answers.
        eos: token or tokens that end an answer; an empty sequence decodes to the full length.
        pad: token after the end of an answer.

    Returns:
        int32 token ids, filled up with `pad`.

    Raises:
        AntgmmError: the model has learned positions, too few for a prompt with `max_new_tokens`.
    """
    # The last token is not read.
    check_positions(config.language, batch["attention_mask"], new=max_new_tokens - 1)
    ends = (eos,) if isinstance(eos, int) else tuple(eos)
    run = phases(config, max_new_tokens, ends, pad)
    prompt: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    prompt["images"] = without_pixels(batch["images"])
    if "vision_features" in batch:
        prompt["vision_features"] = batch["vision_features"]
    elif prompt["images"]["valid"].shape[1]:
        prompt["vision_features"] = run.vision(params, batch["images"])
    return run.decode(params, run.prefill(params, prompt))


@lru_cache(maxsize=32)
def phases(config: LMMConfig, max_new_tokens: int, eos: tuple[int, ...], pad: int) -> Phases:
    """Builds the jitted phases of a request.

    Args:
        config: model config.
        max_new_tokens: length of the answers.
        eos: tokens that end an answer.
        pad: token after the end of an answer.

    Returns:
        The phases vision, prefill and decode.
    """
    pure = functional(config)

    def model(params):
        return nnx.merge(pure.graph, nnx.State(params))

    def prefill(params: Params, batch: Batch):
        state, memory_valid = model(params).prefill(batch, max_new_tokens)
        return state._replace(slot=jnp.int32(state.slot)), memory_valid

    def decode(params: Params, state: tuple[Prefilled, Array | None]) -> Int[Array, "B T"]:
        return _decode(model(params), *state, max_new_tokens=max_new_tokens, eos=eos, pad=pad)

    return Phases(vision=jax.jit(pure.features), prefill=jax.jit(prefill), decode=jax.jit(decode))


def _decode(
    model: LMM,
    state: Prefilled,
    memory_valid: Array | None,
    *,
    max_new_tokens: int,
    eos: tuple[int, ...],
    pad: int,
) -> Int[Array, "B T"]:
    language = model.language
    layers = _layers(language)
    batch = state.logits.shape[0]
    ends = jnp.asarray(eos, jnp.int32).reshape(-1)

    def choose(logits, done):
        ids = jnp.where(done, pad, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return ids, done | (ids[:, None] == ends[None, :]).any(axis=1)

    def more(carry):
        step, _, _, done, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def body(carry):
        step, ids, state, done, out = carry
        state = _after(language, state, ids, memory_valid, layers())
        ids, done = choose(state.logits, done)
        return step + 1, ids, state, done, jax.lax.dynamic_update_index_in_dim(out, ids, step, 1)

    ids, done = choose(state.logits, jnp.zeros((batch,), bool))
    out = jnp.full((batch, max_new_tokens), pad, jnp.int32).at[:, 0].set(ids)
    return jax.lax.while_loop(more, body, (jnp.int32(1), ids, state, done, out))[-1]


def forced_logits(
    config: LMMConfig, params: Params, batch: Mapping[str, Any], answers: Int[ArrayLike, "B N"]
) -> Float[Array, "B N V"]:
    """Computes the logits of given answers as `generate` does: with its cache, token by token.

    One pass over prompts with answers does not compute them if an answer holds the image token: there it is a word, in
    a prompt it is the place of an image.

    Args:
        config: model config.
        params: model parameters.
        batch: prompts, as in `generate`.
        answers: token ids of the answers.

    Returns:
        Logits before each token.

    Raises:
        AntgmmError: the model has learned positions, too few for a prompt with its answer.
    """
    check_positions(config.language, batch["attention_mask"], new=np.shape(answers)[1] - 1)
    return _forced(config)(params, dict(batch), answers)


@lru_cache(maxsize=32)
def _forced(config: LMMConfig) -> Callable[..., Float[Array, "B N V"]]:
    graph = functional(config).graph

    @jax.jit
    def logits(params: Params, batch: Batch, answers: Int[Array, "B N"]) -> Float[Array, "B N V"]:
        model = nnx.merge(graph, nnx.State(params))
        first, memory_valid = model.prefill(batch, answers.shape[1])
        language, layers = model.language, _layers(model.language)

        def step(state: Prefilled, ids: Int[Array, " B"]) -> tuple[Prefilled, Float[Array, "B V"]]:
            return _after(language, state, ids, memory_valid, layers()), state.logits

        return jax.lax.scan(step, first._replace(slot=jnp.int32(first.slot)), answers.T)[1].swapaxes(0, 1)

    return logits


def _layers(language: LanguageModel) -> Callable[[], Sequence[Any]]:
    """Returns a function that returns the layers of the decoder, for the body of a loop over tokens."""
    # Slices from before the loop stay beside their stack: on a v5e, 264 MB beside a decoder of 283 MB. Slices in the
    # loop leave 82, and take 5 % longer by the compiler's estimate. Other compilers would copy each for every token.
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(language.decoder))) // model_parts()
    if platform() == "tpu" or crowded(nbytes, device_memory()):
        return partial(language.decoder.unstack, split)
    layers = language.decoder.unstack(split)
    return lambda: layers


def crowded(layers: float, memory: float) -> bool:
    """Whether decoding has no room for a copy of the decoder's layers.

    Args:
        layers: bytes of the layers on a device.
        memory: bytes of the device.
    """
    return 2 * layers > _ROOM * memory


def _after(
    language: LanguageModel, state: Prefilled, ids: Int[Array, " B"], memory_valid: Array | None, layers: Sequence[Any]
) -> Prefilled:
    """The state after one more token of each answer."""
    logits, caches = language.step(ids, state, memory_valid, layers)
    return state._replace(logits=logits, caches=caches, lengths=state.lengths + 1, slot=state.slot + 1)
