"""The bridge of Mistral 3: a norm, a merger of the patches of a square, and a two-layer MLP."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.layers import ACTIVATIONS, gated, linear, normed
from antgmm_jax.blocks.merger import magnitudes
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.config import Tower
from antgmm_jax.families.mistral3.config import Mistral3Config


class PatchMerger(nnx.Module):
    """A norm over each patch and two linear maps: from the patches of a square to its units, and on to an MLP's."""

    def __init__(self, config: Mistral3Config, vision: Tower, text: Tower):
        inside, wide, units = config.vision.merge**2, vision.stack.embed, config.bridge.merger.mlp
        hidden, bias = config.bridge.mlp, config.bridge.bias
        self.eps = text.stack.eps
        self.scale = param((wide,), (vision.embed,), mean=1.0)
        axes = ("merged", vision.embed, "merger/mlp")
        self.up = param((inside, wide, units), axes, scale=(inside * wide) ** -0.5, over=OUT)
        axes = ("merger/mlp", "bridge/mlp")
        self.down = param((units, hidden), axes, scale=units**-0.5, over=OUT)
        self.down_bias = param((hidden,), axes[1:]) if bias else None

    def __call__(self, patches: Float[Array, "S P V"], gates: Gates) -> tuple[Float[Array, "S M"], Float[Array, "S U"]]:
        """Returns the inputs of the MLP's activation for each square, and the units of the merger."""
        x = normed(patches, self.scale[...], None, eps=self.eps, rms=True, gate=gates.get("vision/embed"))
        units = gated(linear(x, self.up[...], None, inputs=2), gates.get("merger/mlp"))
        return linear(units, self.down[...], None if self.down_bias is None else self.down_bias[...]), units


class Mistral3Bridge(nnx.Module):
    """The merger and the rest of the MLP."""

    def __init__(self, config: Mistral3Config, vision: Tower, text: Tower):
        hidden, narrow, bias = config.bridge.mlp, text.stack.embed, config.bridge.bias
        self.act = config.bridge.act
        self.merger = PatchMerger(config, vision, text)
        axes = ("bridge/mlp", text.embed)
        self.down = param((hidden, narrow), axes, scale=hidden**-0.5, over=OUT)
        self.down_bias = param((narrow,), axes[1:]) if bias else None

    def features(
        self, vision: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N V"], dict[str, Array]]:
        """Returns the image states unchanged: there is no stack."""
        return vision, {}

    def project(
        self, features: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S 1 E"], dict[str, Array]]:
        """Maps squares to text embeddings; also returns norms of the units of the axes named in `collect`."""
        inputs, units = self.merger(features, gates)
        hidden = gated(ACTIVATIONS[self.act](inputs), gates.get("bridge/mlp"))
        out = linear(hidden, self.down[...], None if self.down_bias is None else self.down_bias[...])
        norms = {"merger/mlp": units, "bridge/mlp": hidden}
        return out[:, None], {name: magnitudes(one) for name, one in norms.items() if name in collect}
