"""InternVL: the common parts and a merger of squares of image states."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.merger import Merger, squares
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.internvl.config import InternVLConfig, ShuffleMergerConfig
from antgmm_jax.lmm import LMM, assemble

_NORM = ("layer", 1e-5)  # whatever the norms of the image encoder are


class ShuffleMerger(nnx.Module):
    """Concatenates each square of neighbouring image states and maps it to the text width."""

    def __init__(self, config: ShuffleMergerConfig, vision: Tower, text: Tower):
        units, self.scale = ("bridge/mlp", config.mlp), config.scale
        self.merger = Merger(units, True, config.scale**2, vision, text, norm=_NORM, act=config.act)

    def features(
        self, vision: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N V"], dict[str, Array]]:
        """Returns the image states unchanged: there is no stack."""
        return vision, {}

    def project(
        self, features: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q E"], dict[str, Array]]:
        """Maps image states to text embeddings; collects the norms [S, M] of `bridge/mlp` if named in `collect`."""
        joined = squares(features, self.scale)
        patches = joined.reshape(-1, *joined.shape[2:])
        out, hidden = self.merger(patches, gates.get("vision/embed"), gates.get("bridge/mlp"))
        out, hidden = (states.reshape(*joined.shape[:2], -1) for states in (out, hidden))
        kept = {"bridge/mlp": jnp.linalg.norm(hidden.astype(jnp.float32), axis=1)} if "bridge/mlp" in collect else {}
        return out, kept


def build(config: InternVLConfig, *, remat: Remat) -> LMM:
    """Builds the model; see `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower]) -> ShuffleMerger:
        return ShuffleMerger(config.bridge, stacks["vision"], stacks["text"])

    return assemble(config, bridge, remat=remat)
