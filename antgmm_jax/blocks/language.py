"""The language model: an encoder and a decoder as in T5, or a decoder alone as in Llama and OPT."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from antgmm_jax.blocks import packing, spans
from antgmm_jax.blocks.block import Cache, Context, Gates
from antgmm_jax.blocks.layers import Norm, gated, linear
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.rope import rope
from antgmm_jax.blocks.split import split
from antgmm_jax.blocks.stack import Stack, unrolled
from antgmm_jax.blocks.tables import rows_of
from antgmm_jax.config import LanguageConfig, Remat, Tower
from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import processes


class Embedded(NamedTuple):
    """Embedded tokens of a decoder.

    Attributes:
        x: embeddings, [B, T, D].
        places: positions along several axes, int [B, T, A]; None for the order of the tokens.
        added: [K, B, T, D], [k] is added to the residual stream after layer k; None for nothing.
        spans: int [B, T], tokens with equal numbers above 0 see one another; None for causal attention.
    """

    x: Array
    places: Array | None = None
    added: Array | None = None
    spans: Array | None = None


def padded_right(tokens: Embedded, valid: Bool[Array, "B T"]) -> tuple[Embedded, Bool[Array, "B T"], Int[Array, " B"]]:
    """Moves padding behind the tokens of each row, where flash kernels of GPUs skip it without a mask of all pairs.

    Args:
        tokens: embedded tokens of prompts.
        valid: which positions are tokens; padding on either side.

    Returns:
        The tokens, which positions they have, and their number in each row, at least 1.
    """
    at = (jnp.arange(valid.shape[1])[None] + jnp.argmax(valid, axis=1)[:, None]) % valid.shape[1]

    def moved(values: Array, axis: int = 1) -> Array:
        return jnp.take_along_axis(
            values, at.reshape((1,) * (axis - 1) + at.shape + (1,) * (values.ndim - axis - 1)), axis
        )

    x, places, added, spans = tokens
    after = Embedded(
        moved(x),
        None if places is None else moved(places),
        None if added is None else moved(added, axis=2),
        None if spans is None else moved(spans),
    )
    return after, moved(valid), jnp.maximum(valid.sum(axis=1), 1)


class Prefilled(NamedTuple):
    """State of decoding after the prompt.

    Attributes:
        logits: of the first answer token, [B, V].
        caches: self-attention keys and values, one pair per layer.
        cross_caches: cross-attention keys and values, one pair per layer, None without cross-attention.
        mask: which cache slots may be attended to, bool [B, slots]; True for slots of future tokens.
        order: position of the token of each cache slot, [B, slots].
        lengths: position of the next token, [B].
        slot: cache slot of the next token.
    """

    logits: Array
    caches: list[Cache]
    cross_caches: list[Cache | None]
    mask: Array
    order: Array
    lengths: Array
    slot: int


def _embed_scale(config: LanguageConfig) -> float:
    # T5 initialises its table with unit variance (Mesh TensorFlow), Llama with a deviation of 0.02.
    return 1.0 if config.encoder is not None else 0.02


class LanguageModel(nnx.Module):
    """Token table, stacks, final norms and head: T5 if the config has an encoder, else decoder-only."""

    def __init__(self, config: LanguageConfig, towers: Mapping[str, Tower], *, remat: Remat = "dots"):
        self.config, decoder = config, config.decoder
        width = decoder.embed
        self.tokens = param((config.vocab, width), ("vocab", "text/embed"), scale=_embed_scale(config))
        rows, names = config.learned_positions + config.first_position, ("positions", "text/embed")
        learned = config.learned_positions > 0
        self.positions = param((rows, width), names, scale=0.02) if learned else None
        encoder = config.encoder
        self.encoder = None if encoder is None else Stack(towers["encoder"], remat=remat)
        self.encoder_norm = None if encoder is None else Norm(encoder, "text/embed")
        tower = towers["text" if encoder is None else "decoder"]
        self.decoder = Stack(tower, memory=width, remat=remat)
        self.norm = Norm(decoder, "text/embed")
        axes = ("text/embed", "vocab")
        self.out = None if config.tied else param((width, config.vocab), axes, scale=width**-0.5)

    def embed(self, ids: Int[Array, "..."], gates: Gates | None = None) -> Float[Array, "... D"]:
        """Token embeddings, in some models multiplied by width ** 0.5, which counts only open channels if gated."""
        x = rows_of(self.tokens[...], "vocab", ids)
        if not self.config.scaled_tokens:
            return x
        gate = (gates or {}).get("text/embed")
        width = jnp.float32(self.config.decoder.embed) if gate is None else gate.astype(jnp.float32).sum()
        factor = jnp.sqrt(width).astype(x.dtype)
        return x * factor if gate is None else gated(x, factor)

    def _placed(self, x: Float[Array, "B T D"], order: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Adds learned positions to embedded tokens.

        Only padding, and a last token that is not read, lie behind the table (`check_positions`): JAX gives them its
        last entry.
        """
        if self.positions is None:
            return x
        return x + rows_of(self.positions[...], "positions", order + self.config.first_position).astype(x.dtype)

    def head(self, hidden: Float[Array, "... D"], gates: Gates, *, few: bool = False) -> Float[Array, "... V"]:
        """Logits of final hidden states in float32: a bfloat16 logit of 20 would be rounded to a multiple of 0.125.

        T5 v1.0 scales them by width ** -0.5, counting only open channels if gated. With `few` rows, a head that the
        mesh splits is not gathered.
        """
        if self.config.scaled_head:
            gate = gates.get("text/embed")
            width = self.config.decoder.embed if gate is None else gate.astype(jnp.float32).sum()
            factor = jnp.asarray(width, jnp.float32).astype(hidden.dtype) ** -0.5
            hidden = hidden * factor if gate is None else gated(hidden, factor)
        kernel = self.tokens[...].T if self.out is None else self.out[...]
        kernel = split(kernel, ("text/embed", "vocab")) if few else kernel
        return linear(hidden, kernel, None, dtype=jnp.float32)

    def encode(
        self,
        x: Float[Array, "B T D"],
        valid: Bool[Array, "B T"],
        gates: Gates,
        collect: Sequence[str] = (),
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Runs T5's encoder on embedded tokens; returns normed states and the intermediates named in `collect`.

        `lengths` are the numbers of tokens of rows that are padded on the right; None for any padding.
        """
        assert self.encoder is not None and self.encoder.relative is not None and self.encoder_norm is not None
        at = jnp.arange(x.shape[1])
        bias = self.encoder.relative(at, at)
        context = Context(mask=valid[:, None, None, :], bias=bias, valid=valid, lengths=lengths)
        x, kept = self.encoder(x, context, gates, collect)
        return self.encoder_norm(x, gates.get("text/embed")), kept

    def decode(
        self,
        tokens: Embedded,
        valid: Bool[Array, "B T"] | None,
        memory: Float[Array, "B M D"] | None,
        memory_valid: Bool[Array, "B M"] | None,
        gates: Gates,
        collect: Sequence[str] = (),
        segments: Int[Array, "B T"] | None = None,
        counted: Bool[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Runs the decoder on all positions of the embedded tokens at once.

        Args:
            tokens: embedded decoder tokens.
            valid: which positions are tokens; None for all (T5 masks no decoder position, as in Hugging Face).
            memory: states that cross-attention reads; None for a decoder-only model.
            memory_valid: which of `memory` are tokens.
            gates: axis name -> gate.
            collect: names of the intermediates to return.
            segments: number of each token's sample in a packed row; None for rows of one sample.
            counted: positions that collected norms include; None for those of `valid`.
            lengths: number of tokens of each row of `memory`, or without memory of `tokens`, if they are padded on the
                right; None for any padding.

        Returns:
            Normed states for `head`, and the intermediates.
        """
        x, at = tokens.x, jnp.arange(tokens.x.shape[1])
        if valid is not None:
            check_positions(self.config, valid, segments=segments)
        if segments is None:
            mask, order = None if valid is None else valid[:, None, None, :], _positions(x, valid)
        else:
            mask, order = packing.same_sample(segments, segments), packing.positions(segments)
        if tokens.spans is not None:
            seen = spans.visible(tokens.spans, at.size)
            mask = seen if mask is None else seen & mask
        places = order if tokens.places is None else tokens.places
        context = self._context(mask, memory, memory_valid, at, at, places)
        context = context._replace(
            causal=tokens.spans is None,
            valid=valid if counted is None else counted,
            segments=segments if tokens.spans is None else None,
            lengths=lengths if tokens.spans is None and memory is None else None,
            memory_lengths=None if memory is None else lengths,
        )
        x = self._placed(x, order)
        x, kept = self.decoder(x, self._with_local(context, order, order), gates, collect, added=tokens.added)
        return self.norm(x, gates.get("text/embed")), kept

    def _context(self, mask, memory, memory_valid, queries, keys, positions) -> Context:
        config = self.config.decoder
        memory_mask = None if memory_valid is None else memory_valid[:, None, None, :]
        rotary = (config.head_dim, config.rope_theta, config.rope_sections)
        return Context(
            mask=mask,
            bias=None if self.decoder.relative is None else self.decoder.relative(queries, keys),
            positions=rope(
                positions,
                *rotary,
                interleaved=config.rope_interleaved,
                factor=config.rope_factor,
                yarn=config.yarn,
                llama3=config.llama3,
            )
            if config.positions == "rope"
            else None,
            memory=memory,
            memory_mask=memory_mask,
        )

    def _with_local(self, context: Context, queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Context:
        """Adds what local layers see, given the positions of queries and keys."""
        config = self.config.decoder
        if not config.window:
            return context
        near = spans.within(queries, keys, config.window)
        mask = near if context.mask is None else near & context.mask
        angles = rope(queries, config.head_dim, config.local_theta)
        context = context._replace(segments=None, lengths=None)
        return context._replace(local=context._replace(mask=mask, positions=angles))

    def prefill(
        self,
        tokens: Embedded,
        valid: Bool[Array, "B T"],
        memory: Float[Array, "B M D"] | None,
        slots: int,
        memory_valid: Bool[Array, "B M"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> Prefilled:
        """Runs the decoder on its first tokens and fills a cache of `slots` positions.

        Args:
            tokens: embedded decoder tokens.
            valid: which positions are tokens; padding on either side.
            memory: T5's encoder states, or None.
            slots: cache length, at least T.
            memory_valid: which encoder states are tokens, or None.
            lengths: number of tokens of each row, if they are padded on the right; None for any padding.

        Returns:
            Logits after the last token of each row, and the caches.
        """
        x, config, layers = tokens.x, self.config.decoder, self.decoder.unstack()
        (batch, length, _), places = x.shape, _positions(x, valid) if tokens.places is None else tokens.places
        empty = jnp.zeros((batch, config.heads, slots, config.head_dim), x.dtype)
        cross_caches: list[Cache | None] = [None] * len(layers)
        if memory is not None:
            cross_caches = [cross.attention.keys_values(memory) for _, cross in layers if cross is not None]
        usable = jnp.concatenate([valid, jnp.ones((batch, slots - length), bool)], axis=1)
        at, mask = jnp.arange(length), valid[:, None, None, :]
        if tokens.spans is not None:
            mask = spans.visible(tokens.spans, length) & mask
        context = self._context(mask, None, memory_valid, at, at, places)
        context = context._replace(causal=tokens.spans is None, lengths=lengths if tokens.spans is None else None)
        order = places.reshape(batch, length, -1).max(axis=-1)
        after = jnp.where(valid, order + 1, 0).max(axis=1)
        context = self._with_local(context, order, order)
        x = self._placed(x, order)
        order = jnp.concatenate([order, after[:, None] + jnp.arange(slots - length)[None]], axis=1)
        more = () if tokens.added is None else tokens.added
        x, caches = unrolled(layers, x, context, [(empty, empty)] * len(layers), cross_caches, None, more)
        last = jnp.max(jnp.where(valid, at[None, :], 0), axis=1)
        logits = self.head(self.norm(x[jnp.arange(batch), last]), {}, few=True)
        return Prefilled(logits, caches, cross_caches, usable, order, after, length)

    def step(
        self, ids: Int[Array, " B"], state: Prefilled, memory_valid: Bool[Array, "B M"] | None, layers
    ) -> tuple[Float[Array, "B V"], list[Cache]]:
        """Decodes one token and adds it to the caches.

        Args:
            ids: the token of each row.
            state: caches, with `slot` and `lengths` of this token.
            memory_valid: which encoder states are tokens, or None.
            layers: `self.decoder.unstack(split)`; inside the loop over tokens on TPUs and where a copy has no room,
                else before it.

        Returns:
            Logits of the next token, and the updated caches.
        """
        slots = state.mask.shape[1]
        keys = jnp.arange(slots)
        mask = (state.mask & (keys[None, :] <= state.slot))[:, None, None, :]
        at = state.lengths[:, None]
        context = self._context(mask, None, memory_valid, jnp.asarray(state.slot)[None], keys, at)
        context = self._with_local(context, at, state.order)
        x = self._placed(self.embed(ids)[:, None], at)
        x, caches = unrolled(layers, x, context, state.caches, state.cross_caches, state.slot)
        return self.head(self.norm(x[:, 0]), {}, few=True), caches


def check_positions(config: LanguageConfig, valid: Any, *, new: int = 0, segments: Any = None) -> None:
    """Checks that a model with learned positions has one for every token of a batch; padding takes none.

    In a program that is being compiled the lengths are not known: the width counts instead, and packed rows of any
    width are accepted, as rows of data were checked before they were packed (`data.encoding`).

    Args:
        config: the language model.
        valid: which positions of the rows are tokens, [B, T].
        new: number of tokens that are read behind each row.
        segments: number of each token's sample in packed rows, [B, T], whose positions start at 0; None for others.

    Raises:
        AntgmmError: a row or a packed sample is too long.
    """
    most, longest = config.learned_positions, valid.shape[1] + new
    if not most or longest <= most:
        return
    if isinstance(valid if segments is None else segments, Tracer):
        longest = longest if segments is None else 0
    elif segments is None:
        longest = int(processes.gather(valid).astype(bool).sum(axis=1).max(initial=0)) + new
    else:
        numbers = processes.gather(segments)
        longest = max((np.unique(row[row > 0], return_counts=True)[1].max(initial=0) for row in numbers), default=0)
    if longest > most:
        raise AntgmmError(
            f"a row of {longest} tokens: the model has {most} learned positions; shorten prompts or answers"
        )


def _positions(x: Array, valid: Array | None) -> Array:
    """Position of each token in its row, not counting padding."""
    if valid is None:
        return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
