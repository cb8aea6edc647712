"""MAAD-synth as a random-access source of records."""

import hashlib
from pathlib import Path

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.maad.answers import accompanying, answer
from data.maad.cell_grid import cells
from data.maad.latents import SIZES, Latents, Picture, draw
from data.maad.render import compose
from data.maad.tiers import Tier, brands, fact_sizes, tier
from data.maad.vocab import QUESTIONS
from data.record import Record
from data.rows import Row
from data.source import Source


class MaadSource(Source):
    """A split of MAAD-synth; a record is drawn when it is asked for, and is the same every time."""

    drawn = True

    def __init__(self, preset: Tier, split: str, size: int, seed: int):
        self.tier, self.split, self.size, self.seed = preset, split, size, seed

    def __len__(self) -> int:
        return self.size

    def latents(self, index: int) -> Latents:
        """The advertisement behind record `index`, without drawing it."""
        if not 0 <= index < self.size:
            raise IndexError(f"{self.split} of tier {self.tier.name} has {self.size} records, no record {index}")
        return draw(self.tier, self.split, int(index), self.seed)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        latents = self.latents(index)
        image, boxes = compose(self.tier, latents)
        found = self.words(index)
        shown = cells(self.tier, latents.picture, found.latents, boxes)
        return Record(**{**vars(found), "images": (np.array(image),)}, cells=shown)

    def words(self, index: int) -> Row:
        """Record `index` without its picture, which is what takes time to draw."""
        latents = self.latents(index)
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
        """A digest of what is drawn, and of the code that draws it."""
        digest = hashlib.sha256(f"maad {self.tier} {self.split} {self.size} {self.seed} {fingerprint(self)}".encode())
        for path in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def source(name: str, split: str, size: int | None = None, *, seed: int = 0) -> MaadSource:
    """MAAD-synth, one split of one tier.

    Args:
        name: the tier: `s`, `m` or `full`.
        split: `train` (16 000), `val` (1 000), `test` (3 000), `test_hard` (3 000, each of one slice).
        size: how many records; at most the split's, except that `train` goes on without end.
        seed: another seed gives another data set. Splits of equal or different seeds share no picture content and
            no text.

    Returns:
        A sequence of records.

    Raises:
        AntgmmError: no such tier or split, or more records than the split has.
    """
    preset = tier(name)
    if split not in SIZES:
        raise AntgmmError(f"no split {split!r} of MAAD-synth: choose one of {', '.join(SIZES)}")
    size = SIZES[split] if size is None else size
    if size < 1 or (size > SIZES[split] and split != "train"):
        raise AntgmmError(f"{split} of MAAD-synth has {SIZES[split]} records, not {size}: ask for 1 to {SIZES[split]}")
    return MaadSource(preset, split, size, seed)


def latent_sizes(name: str) -> dict[str, int]:
    """How many classes each fact of a picture has: the heads that pretrain an image encoder.

    Args:
        name: the tier.

    Returns:
        fact -> number of classes, in a fixed order.
    """
    return fact_sizes(tier(name))


def facts(preset: Tier, picture: Picture) -> dict[str, int]:
    """A picture's facts as class numbers; a price by its digits from the left, 10 where it has no more."""
    digits = str(picture.price)
    first, second = brands(preset)[0][picture.brand].parts
    found = {"product": picture.product, "brand_0": first, "brand_1": second}
    for place in range(len(str(max(preset.prices)))):
        found[f"price_{place}"] = int(digits[place]) if place < len(digits) else 10
    return found | {
        "claim": picture.claim,
        "qr": int(picture.qr),
        "phone": int(picture.phone),
        "notice": int(picture.notice),
    }


def fingerprint(found: MaadSource, count: int = 256) -> str:
    """A digest of the first records' latents: equal wherever the same data set is drawn, whatever draws the pixels.

    Args:
        found: a split.
        count: how many records to digest.

    Returns:
        16 hexadecimal digits.
    """
    lines = (repr(found.latents(index)) for index in range(min(count, len(found))))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
