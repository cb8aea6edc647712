"""Removing layers from a decoder of local and global ones."""

from dataclasses import replace

import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.families.base import Depth, Keep

_LAYERS = "text/layers"


class Alternating(Depth):
    """Each kept layer stays local or global."""

    def reindex(self, config: LMMConfig, smaller: LMMConfig, keep: Keep) -> LMMConfig:
        """Renumbers the local layers."""
        if _LAYERS not in keep:
            return smaller
        is_local = np.isin(keep[_LAYERS], config.language.decoder.local_layers)
        decoder = replace(smaller.language.decoder, local_layers=tuple(np.flatnonzero(is_local).tolist()))
        return replace(smaller, language=replace(smaller.language, decoder=decoder))
