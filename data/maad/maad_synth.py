"""The TFDS builder `maad_synth`: MAAD-synth as array_record files, prepared and read without TensorFlow.

import tensorflow_datasets as tfds
import data.maad.maad_synth  # registers the builder

builder = tfds.builder("maad_synth/s", file_format="array_record")
builder.download_and_prepare()
source = builder.as_data_source("test")
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular, one_line, read_json
from data.limits import quoted
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


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves images as the bytes of their files, also those of a sequence."""

    def decode_batch_example_np(self, example: np.ndarray) -> np.ndarray:
        """Returns the bytes of a sequence of images."""
        return example


def _check_files(folder: Path) -> None:
    """Raises AntgmmError for a pipe, which TFDS would read for ever, and for features of a class that is not TFDS's."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            check_regular(path)
    features = folder / "features.json"
    if features.exists():
        for name in _classes(read_json(features)):
            if not str(name).startswith("tensorflow_datasets."):
                raise AntgmmError(f"{features} names a class {quoted(name)} that is not of TFDS: correct it")


def _classes(value: Any) -> Iterator[Any]:
    """Names of the Python classes in features.json, which TFDS imports."""
    if isinstance(value, dict) and "pythonClassName" in value:
        yield value["pythonClassName"]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _classes(inner)


def open_split(folder: str | Path, split: str, *, encoded: Sequence[str] = ()) -> Sequence[dict]:
    """Opens a split of a prepared TFDS folder (array_record files) without TensorFlow.

    Args:
        folder: folder with `dataset_info.json`.
        split: name of the split.
        encoded: names of images that stay the bytes of their files.

    Returns:
        Random access to dicts with `image` uint8 [H, W, 3], texts as bytes, and `latents`.

    Raises:
        AntgmmError: the folder is not such a folder, is damaged, or has no such split.
    """
    try:
        _check_files(Path(folder))
        builder = tfds.builder_from_directory(folder)
    except AntgmmError:
        raise
    except Exception as error:  # tfds raises various exceptions for other folders
        raise AntgmmError(
            f"{folder} is not a prepared TFDS folder: specify the folder with dataset_info.json"
        ) from error
    if split not in builder.info.splits:
        raise AntgmmError(f"{folder} has no split {split!r}: choose one of {', '.join(builder.info.splits)}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise AntgmmError(f"{folder} is stored as {builder.info.file_format}: prepare it with array_record")
    features: Any = builder.info.features or ()
    skipped = {name: _Encoded() for name in encoded if name in features}
    with one_line(lambda: f"{folder} cannot be read", "prepare it again"):
        return builder.as_data_source(split, decoders=skipped)  # pyright: ignore[reportCallIssue] - hidden by a decorator
