"""MAAD-synth as a random-access source of records."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.maad.answers import accompanying, answer, caption
from data.maad.cell_grid import cells
from data.maad.latents import SIZES, Latents, Picture, draw
from data.maad.render import compose
from data.maad.tiers import Tier, brands, fact_sizes, tier
from data.maad.vocab import QUESTIONS, TYPES
from data.record import Record
from data.rows import Row
from data.source import Source


class MaadSource(Source):
    """A split of MAAD-synth; records are drawn on access and reproducible."""

    drawn = True

    def __init__(self, preset: Tier, split: str, size: int, seed: int):
        self.tier, self.split, self.size, self.seed = preset, split, size, seed

    def __len__(self) -> int:
        return self.size

    def latents(self, index: int) -> Latents:
        """Returns the latents of a record, without drawing it."""
        if not 0 <= index < self.size:
            raise IndexError(f"{self.split} of tier {self.tier.name} has {self.size} records, no record {index}")
        return draw(self.tier, self.split, int(index), self.seed)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        latents = self.latents(index)
        image, boxes = compose(self.tier, latents)
        row = self.words(index)
        shown = cells(self.tier, latents.picture, row.latents, boxes)
        return Record(**{**vars(row), "images": (np.array(image),)}, cells=shown)

    def words(self, index: int) -> Row:
        """Returns a record without its image, which is slow to draw."""
        return self._words(index, self.latents(index))

    def others(self, index: int, count: int) -> list[Row]:
        """Returns other questions about the image and the text of a record.

        Args:
            index: number of the record.
            count: number of questions, of different types.
        """
        latents = self.latents(index)
        types = [kind for kind in TYPES if kind != latents.type]
        order = np.random.default_rng([self.seed, index]).permutation(len(types))[:count]
        return [self._words(index, dataclasses.replace(latents, type=types[place])) for place in order]

    def caption(self, index: int) -> str:
        """Returns everything that the image of a record shows, in one line."""
        return caption(self.tier, self.latents(index).picture)

    def _words(self, index: int, latents: Latents) -> Row:
        return Row(
            images=(),
            question=QUESTIONS[latents.type],
            answer=answer(self.tier, latents),
            text=accompanying(self.tier, latents.text),
            type=latents.type,
            id=f"maad-{self.tier.name}-{self.seed}-{self.split}-{index}",
            slice=latents.slice,
            latents=facts(self.tier, latents.picture),
        )

    def digest(self) -> str:
        """Returns a digest of the data and of the code that draws it."""
        digest = hashlib.sha256(f"maad {self.tier} {self.split} {self.size} {self.seed} {fingerprint(self)}".encode())
        for path in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def source(name: str, split: str, size: int | None = None, *, seed: int = 0) -> MaadSource:
    """Returns a split of MAAD-synth.

    Args:
        name: name of the tier: `s`, `m` or `full`.
        split: `train` (16 000 records), `val` (1 000), `test` (3 000) or `test_hard` (3 000, each of one slice).
        size: number of records; at most the size of the split, but unlimited for `train`.
        seed: seed of the data set. Different splits never share image contents or texts, whatever their seeds.

    Returns:
        Source of records.

    Raises:
        AntgmmError: no such tier or split, or too many records.
    """
    preset = tier(name)
    if split not in SIZES:
        raise AntgmmError(f"no split {split!r} of MAAD-synth: choose one of {', '.join(SIZES)}")
    size = SIZES[split] if size is None else size
    if size < 1 or (size > SIZES[split] and split != "train"):
        raise AntgmmError(f"{split} of MAAD-synth has {SIZES[split]} records, not {size}: choose 1 to {SIZES[split]}")
    return MaadSource(preset, split, size, seed)


def latent_sizes(name: str) -> dict[str, int]:
    """Returns the number of classes of each fact of an image, for the heads in pretraining.

    Args:
        name: name of the tier.

    Returns:
        fact -> number of classes, in a fixed order.
    """
    return fact_sizes(tier(name))


def facts(preset: Tier, picture: Picture) -> dict[str, int]:
    """Returns the facts of an image as class numbers; a price as digits from the left, 10 for missing digits."""
    digits = str(picture.price)
    first, second = brands(preset)[0][picture.brand].parts
    values = {"product": picture.product, "brand_0": first, "brand_1": second}
    for place in range(len(str(max(preset.prices)))):
        values[f"price_{place}"] = int(digits[place]) if place < len(digits) else 10
    return values | {
        "claim": picture.claim,
        "qr": int(picture.qr),
        "phone": int(picture.phone),
        "notice": int(picture.notice),
    }


def fingerprint(split: MaadSource, count: int = 256) -> str:
    """Returns a digest of the latents of the first records; it does not depend on the drawing code.

    Args:
        split: a split.
        count: number of records.

    Returns:
        16 hexadecimal digits.
    """
    lines = (repr(split.latents(index)) for index in range(min(count, len(split))))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
