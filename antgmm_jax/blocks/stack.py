"""The transformer stack of image encoders, bridges, text encoders and decoders."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Block, Cache, Context, CrossAttention, Gates
from antgmm_jax.blocks.flash import RESIDUALS
from antgmm_jax.blocks.low_rank import gathered
from antgmm_jax.blocks.parameters import repeated_module
from antgmm_jax.blocks.relative import RelativeBias
from antgmm_jax.config import Remat, Tower
from antgmm_jax.parallel.sharding import splits_widths

Prepared = Callable[[Any, tuple[str, ...]], Any]
"""(parameter that the mesh splits, axis names) -> parameter for use: `gathered`, or `split` for few rows."""

LOCAL = ("layers", "heads", "cross_heads", "mlp", "text_mlp", "embed")
"""Axes of a stack, named like the fields of its config."""


def rematerialised(function: Callable, remat: Remat) -> Callable:
    """Wraps a function so that its gradient recomputes intermediates instead of storing them.

    Args:
        function: the body of a scan.
        remat: "none" stores every intermediate; "dots" the matrix products (recomputing the rest costs less than
            stacking it in a scan, also on a CPU); "attention" what flash kernels read in the backward pass,
            which "dots" stores too; "full" nothing: least memory, one more forward pass.

    Returns:
        A function with equal values and gradients. None of them stores gathered weights.
    """
    if remat == "none" and not splits_widths():
        return function
    rules = jax.checkpoint_policies
    attention = rules.save_from_both_policies(rules.save_only_these_names(RESIDUALS), _by_cudnn)
    dots = rules.save_from_both_policies(rules.dots_with_no_batch_dims_saveable, attention)
    policies = {"none": _all_but_gathered, "dots": dots, "attention": attention}
    return jax.checkpoint(function, policy=policies.get(remat), prevent_cse=False)


def _by_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves what cuDNN's attention returns for its backward pass."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything but gathered weights, also when they are reshaped for a product."""
    return primitive.name not in ("sharding_constraint", "reshape", "transpose", "squeeze")


def _layer(graph: Any, parameters: Any, prepared: Prepared = gathered) -> Any:
    """The module of one layer, its weights prepared for use, from its part of a stack's parameters."""

    def ready(variable: nnx.Variable) -> nnx.Variable:
        # The metadata is that of the stack: the first axis is the layers.
        return variable.replace(prepared(variable.get_value(), variable.get_metadata()["axes"][1:]))

    return nnx.merge(graph, jax.tree.map(ready, parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def _unit_norms(units: Mapping[str, Any], name: str, valid: Array | None) -> Array:
    """L2 norm of each unit's output over tokens (and head_dim), [B, units] float32."""
    outputs = units[name] if name == "embed" else [units[name]]
    norms = []
    for y in outputs:
        y = y.astype(jnp.float32)
        y = y.reshape(*y.shape[:2], y.shape[2], -1)
        y = y if valid is None else y * valid[:, :, None, None]
        norms.append(jnp.sqrt(jnp.sum(y * y, axis=(1, 3))))
    return sum(norms[1:], norms[0]) / len(norms)


class Stack(nnx.Module):
    """Blocks with parameters stacked on a leading `layers` axis: scanned in training, unrolled in decoding.

    If only every `cross_every`-th layer has cross-attention, the cross-attentions form a shorter stack on the axis
    `<tower>/cross_layers`, and the scan runs over groups of `cross_every` layers.
    """

    def __init__(self, tower: Tower, *, memory: int = 0, remat: Remat = "dots"):
        """`memory` is the width of the states that cross-attention reads."""
        config = tower.stack
        self.config, self.tower = config, tower.name
        self.remat: Remat = remat
        self.names = {local: tower.axis(local) for local in LOCAL}
        build = partial(Block, tower)
        self.blocks = repeated_module(build, config.layers, tower.axis("layers"))
        axis = tower.axis("layers" if config.cross_every == 1 else "cross_layers")
        build = partial(CrossAttention, tower, memory)
        self.cross = repeated_module(build, config.cross_layers, axis) if config.cross_heads else None
        self.relative = RelativeBias(tower) if config.positions == "relative" else None

    def _split_gates(self, gates: Gates) -> tuple[dict[str, Array], dict[str, Array]]:
        """Gates by local name: those with one row per layer, and those that all layers share."""
        mine = {local: gates[name] for local, name in self.names.items() if name in gates}
        by_layer = {k: g for k, g in mine.items() if k == "layers" or g.ndim == 2}
        return by_layer, {k: g for k, g in mine.items() if k not in by_layer}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        gates: Gates,
        collect: Sequence[str] = (),
        *,
        taps: Sequence[int] = (),
        added: Float[Array, "K B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Applies all blocks.

        Args:
            x: residual stream.
            context: inputs that all blocks share.
            gates: global axis name -> gate; a missing gate is open.
            collect: global names of the intermediates to return.
            taps: layers, ascending, after which the residual stream is returned.
            added: [k] is added to the residual stream after layer k.

        Returns:
            The residual stream, and the intermediates by name: `<tower>/states` [L + 1, B, T, D]; for an axis the norms
            of its units [L, B, units], or [B, D] for the width; with taps, `<tower>/taps` [taps, B, T, D].
        """
        by_layer, shared = self._split_gates(gates)
        wanted = {local for local, name in self.names.items() if name in collect and local != "layers"}
        block_graph, block_params = nnx.split(self.blocks)
        cross_graph, cross_params = nnx.split(self.cross) if self.cross is not None else (None, None)
        every = self.config.cross_every if cross_params is not None else 1
        alike = context.local is None and context.windows is None
        is_local = None if alike else jnp.array(self.config.is_local)
        numbers = jnp.arange(self.config.layers) if taps or added is not None else None

        def body(carry, layer, cross):
            (x, tapped), (params, gates_here, local, number) = carry, layer
            block = _layer(block_graph, params)
            cross_module = None if cross_graph is None or cross is None else _layer(cross_graph, cross)
            here = context if local is None else context.of_layer(local)
            y, units, _ = block(x, here, {**shared, **gates_here}, cross=cross_module)
            kept = {}
            for name in sorted(wanted):
                # Layers without cross-attention have no such units: zeros keep the rows aligned with the layers.
                absent = jnp.zeros((x.shape[0], self.config.cross_heads))
                kept[name] = _unit_norms(units, name, context.counted(name)) if name in units else absent
            if f"{self.tower}/states" in collect:
                kept["states"] = x
            # Layers that add or are tapped are not scanned apart: that would copy the weights of the whole stack.
            if added is not None:
                more = added[jnp.minimum(number, len(added) - 1)].astype(y.dtype)
                y = y + jnp.where(number < len(added), more, 0)
            tapped = tuple(jnp.where(number == tap, y, states) for tap, states in zip(taps, tapped, strict=True))
            return (y, tapped), kept

        def group(carry, xs):
            """One layer with cross-attention and the layers up to the next one."""
            rows = []
            for i in range(jax.tree.leaves(xs[0])[0].shape[0]):
                carry, row = body(carry, jax.tree.map(lambda a, i=i: a[i], xs[0]), xs[1] if i == 0 else None)
                rows.append(row)
            return carry, jax.tree.map(lambda *rows: jnp.stack(rows), *rows)

        def single(carry, xs):
            return body(carry, *xs)

        single, group = rematerialised(single, self.remat), rematerialised(group, self.remat)
        layers = block_params, by_layer, is_local, numbers
        carry = x, (x,) * len(taps)
        # Nothing reads the text after the last layer: outside of the scan, XLA drops its feed-forward layer.
        whole = (self.config.layers - bool(self.config.text_mlp)) // every
        first, crosses = (
            jax.tree.map(lambda a, n=n: a[:n], tree) for tree, n in ((layers, whole * every), (cross_params, whole))
        )
        if every == 1:  # XLA copies the weights of a whole stack if they have an axis of size 1 for the group
            carry, kept = jax.lax.scan(single, carry, (first, crosses))
        else:
            first = jax.tree.map(lambda a: a.reshape(whole, every, *a.shape[1:]), first)
            carry, kept = jax.lax.scan(group, carry, (first, crosses))
            kept = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept)
        if whole * every < self.config.layers:
            rest = jax.tree.map(lambda a: a[whole * every :], layers)
            carry, last = group(carry, (rest, jax.tree.map(lambda a: a[whole], cross_params)))
            kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, last)
        (x, tapped), named = carry, self._named(kept, carry[0])
        return x, {**named, f"{self.tower}/taps": jnp.stack(tapped)} if taps else named

    def _named(self, kept: dict[str, Array], last: Array) -> dict[str, Array]:
        out = {self.names[k]: v for k, v in kept.items() if k != "states"}
        if "embed" in kept:
            out[self.names["embed"]] = kept["embed"].mean(axis=0)
        if "states" in kept:
            out[f"{self.tower}/states"] = jnp.concatenate([kept["states"], last[None]])
        return out

    def unstack(self, prepared: Prepared = gathered) -> list[tuple[Block, CrossAttention | None]]:
        """Returns the layers as a list, for decoding: a scan would copy the weights of each layer for every token.

        Args:
            prepared: what makes parameters ready for use.
        """
        every, layers = self.config.cross_every, []
        block_graph, blocks = nnx.split(self.blocks)
        cross_graph, crosses = nnx.split(self.cross) if self.cross is not None else (None, None)
        for i in range(self.config.layers):
            block = _layer(block_graph, jax.tree.map(lambda a, i=i: a[i], blocks), prepared)
            cross = None
            if cross_graph is not None and i % every == 0:
                cross = _layer(cross_graph, jax.tree.map(lambda a, j=i // every: a[j], crosses), prepared)
            layers.append((block, cross))
        return layers


def unrolled(
    layers: Sequence[tuple[Block, CrossAttention | None]],
    x: Float[Array, "B T D"],
    context: Context,
    caches: Sequence[Cache],
    cross_caches: Sequence[Cache | None],
    slot: Array | int | None,
    added: Float[Array, "K B T D"] | Sequence[Array] = (),
) -> tuple[Float[Array, "B T D"], list[Cache]]:
    """Applies unstacked layers with key-value caches.

    Args:
        layers: result of `Stack.unstack`.
        x: residual stream of the new positions.
        context: masks and positions of the new positions, against all slots or against themselves.
        caches: self-attention caches, one per layer.
        cross_caches: cross-attention keys and values, one per layer.
        slot: first cache slot of x; None if x are the first positions, which see only one another.
        added: [k] is added to the residual stream after layer k.

    Returns:
        The residual stream, and the caches including the new positions.
    """
    new = []
    for (block, cross), cache, cross_cache in zip(layers, caches, cross_caches, strict=True):
        here = context.of_layer(block.config.is_local[len(new)])
        x, _, cache = block(x, here, {}, cross=cross, cache=cache, cross_cache=cross_cache, slot=slot)
        x = x + added[len(new)].astype(x.dtype) if len(new) < len(added) else x
        new.append(cache)
    return x, new
