"""From a recipe's data table to records, and from records to the arrays that a model reads."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from transformers import AutoProcessor, ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from data.batches import Batches, batches
from data.maad import source
from data.maad.source import MaadSource
from data.maad.source import fingerprint as maad_fingerprint
from data.processor import device_batch, encode, encode_prompts, pixel_table
from data.readers import read_records
from data.record import Record
from experiments.schema import Data


def load_records(data: Data) -> Sequence[Record]:
    """The records that a data table names.

    Args:
        data: the table of a recipe.

    Returns:
        A sequence of `data.samples` records.

    Raises:
        AntgmmError: no such data, fewer records than asked for, or bad rows (all named).
    """
    if data.kind == "maad":
        return source(data.tier, data.split, data.samples, seed=data.seed)
    records = read_records(data.kind, Path(data.path), split=getattr(data, "split", ""))
    if len(records) < data.samples:
        raise AntgmmError(
            f"{data.path} holds {len(records)} records, the recipe asks for {data.samples}: lower samples"
        )
    return records[: data.samples]


def data_fingerprint(records: Sequence[Record], arrays: dict[str, np.ndarray]) -> str:
    """A digest of what a model is trained on: equal where the same arrays are read.

    Args:
        records: the records; MAAD-synth's latents are part of the digest.
        arrays: from `encode`.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(maad_fingerprint(records).encode() if isinstance(records, MaadSource) else b"")
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:16]


def load_processor(directory: str | Path) -> ProcessorMixin:
    """The processor of a checkpoint directory.

    Raises:
        AntgmmError: the directory has none that loads offline.
    """
    try:
        return AutoProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise AntgmmError(
            f"{directory} has no processor that AutoProcessor reads offline: save the model's processor there"
        ) from error


class Samples:
    """Encoded records: pictures once as uint8, normalised when a batch is made.

    Attributes:
        records: the records.
        arrays: what `data.processor.encode` gave.
        table: what the processor makes of each pixel value.
    """

    def __init__(self, records: Sequence[Record], processor: ProcessorMixin, config: LMMConfig):
        self.records = [*records]
        self.arrays = encode(processor, self.records, start_token=config.language.start_token)
        self.table = pixel_table(processor)
        prompts = encode_prompts(processor, self.records)
        self._prompts = {f"prompt/{name}": prompts[name] for name in ("input_ids", "attention_mask")}
        self.fingerprint = data_fingerprint(records, self.arrays)

    def __len__(self) -> int:
        return len(self.records)

    def shuffled(self, size: int, seed: int) -> Batches:
        """Endless shuffled training batches; the iterator's position resumes it."""
        return batches(self.arrays, size=size, seed=seed, finish=partial(device_batch, self.table))

    def in_order(self, size: int, *, prompts: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """Every row once; the last batch repeats its last row, so that one shape is compiled.

        Args:
            size: rows a batch.
            prompts: add the prompts alone, for generation, under `prompt/`.

        Yields:
            Training batches with `index` and the number of rows that count, `count`.
        """
        arrays = {**self.arrays, **self._prompts} if prompts else self.arrays
        for first in range(0, len(self), size):
            rows = np.minimum(np.arange(first, first + size), len(self) - 1)
            batch = device_batch(self.table, {name: value[rows] for name, value in arrays.items()})
            yield {**batch, "index": rows.astype(np.int32)}
