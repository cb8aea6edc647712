"""MAAD-synth: generated advertisements with an auditor's questions, an open substitute for the MAAD data set."""

from data.maad.drawing import MaadSource, fingerprint, latent_sizes, source
from data.maad.latents import SIZES, SLICES
from data.maad.render import compose
from data.maad.sheet import contact_sheet
from data.maad.tiers import TIERS, tier
from data.maad.vocab import TYPES

__all__ = [
    "SIZES",
    "SLICES",
    "TIERS",
    "TYPES",
    "MaadSource",
    "compose",
    "contact_sheet",
    "fingerprint",
    "latent_sizes",
    "source",
    "tier",
]
