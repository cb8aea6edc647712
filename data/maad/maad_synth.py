"""The TFDS builder `maad_synth`: MAAD-synth as array_record files, prepared and read without TensorFlow.

import tensorflow_datasets as tfds
import data.maad.maad_synth  # registers the builder

builder = tfds.builder("maad_synth/s", file_format="array_record")
builder.download_and_prepare()
source = builder.as_data_source("test")
"""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data.maad.drawing import latent_sizes, source
from data.maad.latents import SIZES
from data.maad.tiers import TIERS

_WORDS = ("question", "answer", "text", "type", "id", "slice")


@dataclasses.dataclass
class MaadConfig(tfds.core.BuilderConfig):
    """Config of the builder; `samples` limits the records of each split (0 for all)."""

    tier: str = "s"
    samples: int = 0
    seed: int = 0


class MaadSynth(tfds.core.GeneratorBasedBuilder):
    """Generated advertisements with twelve types of auditor's questions; answers state the evidence first."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: MaadConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 - tfds reads a list from the class
        MaadConfig(name=tier, tier=tier, version="1.0.0", description=f"Tier {tier}, {preset.px} pixels.")
        for tier, preset in TIERS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        tier = self.builder_config.tier
        facts = dict.fromkeys(latent_sizes(tier), np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(TIERS[tier].px, TIERS[tier].px, 3), encoding_format="png"),
                    **{name: tfds.features.Text() for name in _WORDS},
                    "latents": tfds.features.FeaturesDict(facts),
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        count = self.builder_config.samples
        return {split: self._generate_examples(split, min(count or size, size)) for split, size in SIZES.items()}

    def _generate_examples(self, split: str, count: int):
        records = source(self.builder_config.tier, split, count, seed=self.builder_config.seed)
        for row in range(count):
            record = records[row]
            words = {name: getattr(record, name) for name in _WORDS}
            # As a PIL image: tfds would encode arrays with TensorFlow.
            yield row, {"image": Image.fromarray(record.images[0]), **words, "latents": dict(record.latents)}
