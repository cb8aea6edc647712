"""Encoded records, and the batches that a model reads of them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from transformers import AutoProcessor, ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from data.batches import Batches, answer_lengths, batches, lengths, once
from data.encoding import encode, encode_prompts
from data.maad.source import MaadSource
from data.maad.source import fingerprint as maad_fingerprint
from data.packing import packed_batches
from data.processor import check_fit, device_batch, pictures, pixel_table, prepare
from data.readers import FileSource
from data.record import PROMPT, Record
from data.shifting import shifted


def data_fingerprint(records: Sequence[Record], arrays: dict[str, np.ndarray], table: np.ndarray) -> str:
    """A digest of what a model is trained on, data and processor: equal where the same arrays are read.

    Args:
        records: the records; MAAD-synth's latents are part of the digest.
        arrays: from `encode`: the tokenizer's ids, and pictures as the processor resizes them.
        table: from `pixel_table`, how it normalises them.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(maad_fingerprint(records).encode() if isinstance(records, MaadSource) else b"")
    for name, array in sorted({**arrays, "pixel_table": table}.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).data)  # in place: pictures fill gigabytes
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

    Args:
        records: the records.
        processor: the model's.
        config: the model.
        max_length: most tokens of a prompt beside the picture's.
        max_answer: most tokens of an answer.
        buckets: widths that training batches are cut to, beside the full one; empty: the full one alone.
        prompt_buckets: the same for the prompts of a model with an encoder, whose `buckets` are of answers.
        pack: tokens of a row that several samples share in training batches; 0: each has its own.
        prompt: template of what the model is asked, as `data.record.prompt` takes it.

    Attributes:
        records: the records, with their pictures as the model sees them.
        arrays: what `data.encoding.encode` gave.
        table: what the processor makes of each pixel value.
        pack: as given.

    Raises:
        AntgmmError: rows that are too long, all named; a model that does not pack, or has no prompts apart; what
            `data.processor.check_fit` refuses.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: ProcessorMixin,
        config: LMMConfig,
        *,
        max_length: int = 4096,
        max_answer: int = 1024,
        buckets: Sequence[int] = (),
        prompt_buckets: Sequence[int] = (),
        pack: int = 0,
        prompt: str = PROMPT,
    ):
        if pack and config.encoder_decoder:
            raise AntgmmError(f"pack = {pack}: only models without an encoder read packed rows: use buckets")
        if prompt_buckets and not config.encoder_decoder:
            raise AntgmmError("prompt_buckets: a model without an encoder reads prompt and answer in one: use buckets")
        check_fit(processor, config)
        self.records = prepare(processor, records)
        self._processor, self._max_length, self._template, self._least_width = processor, max_length, prompt, 0
        start = config.language.start_token
        try:
            self.arrays = encode(
                processor,
                self.records,
                max_length=max_length,
                max_answer=max_answer,
                start_token=start,
                template=prompt,
            )
        except AntgmmError as error:
            raise AntgmmError(f"{records.path}: {error}" if isinstance(records, FileSource) else str(error)) from None
        read = "decoder_input_ids" if "decoder_input_ids" in self.arrays else "input_ids"
        self._widths = _with_widest(buckets, self.arrays[read])
        self._prompt_widths = _with_widest(prompt_buckets, self.arrays["input_ids"])
        self.pack = pack
        self.table = pixel_table(processor)
        self.fingerprint = data_fingerprint(records, self.arrays, self.table)

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def _prompts(self) -> dict[str, np.ndarray]:
        made = encode_prompts(
            self._processor,
            self.records,
            max_length=self._max_length,
            width=self._least_width,
            template=self._template,
        )
        return {f"prompt/{name}": made[name] for name in ("input_ids", "attention_mask")}

    def pad_prompts_like(self, other: "Samples") -> None:
        """Pads the prompts of two sets of questions to one width, so that one program answers both.

        Args:
            other: the other set, whose prompts are padded too.
        """
        width = max(each._prompts["prompt/input_ids"].shape[1] for each in (self, other))
        for each in (self, other):
            if each._prompts["prompt/input_ids"].shape[1] < width:
                each._least_width = width
                del each._prompts

    def rows_of(self, types: Sequence[str]) -> np.ndarray:
        """The rows whose questions are of some types.

        Args:
            types: names of types; empty: all.

        Returns:
            Row numbers, ascending.

        Raises:
            AntgmmError: a type that no row is of.
        """
        known = sorted({record.type for record in self.records})
        if absent := sorted(set(types) - set(known)):
            raise AntgmmError(f"no question is of type {', '.join(absent)}: the data has {', '.join(known)}")
        return np.flatnonzero([not types or record.type in types for record in self.records])

    def repeated(self, times: Mapping[str, int]) -> np.ndarray:
        """Every row, those of some question types several times.

        Args:
            times: type -> how often; the others once.

        Returns:
            Row numbers, ascending.
        """
        return np.repeat(np.arange(len(self)), [times.get(record.type, 1) for record in self.records])

    def check_types(self, wanted: Mapping[str, Sequence[str]]) -> None:
        """Refuses types that no row is of.

        Args:
            wanted: who asks -> names of types.

        Raises:
            AntgmmError: the first such type, and who asks for it.
        """
        for who, types in wanted.items():
            try:
                self.rows_of(types)
            except AntgmmError as error:
                raise AntgmmError(f"{who}: {error}") from None

    def shuffled(
        self,
        size: int,
        seed: int,
        *,
        full: bool = False,
        features: Float[np.ndarray, "N V Q D"] | None = None,
        pictures: bool = False,
        rows: np.ndarray | None = None,
        shift: int = 0,
    ) -> Batches:
        """Endless shuffled training batches, cut to the length buckets or packed; the iterator's position resumes it.

        Args:
            size: rows a batch.
            seed: of the order.
            full: leave all padding and rows of one sample, and an order that does not depend on the buckets.
            features: image features of all rows, from `image_features`, that stand in for the pictures; one of a row's
                views whenever it is seen.
            pictures: keep the pictures beside them, for a teacher that reads them.
            rows: which rows an epoch visits, and each as often as it stands there; None: all once.
            shift: pixels by which pictures are moved at random, at most, each way.

        Returns:
            The iterator; of packed rows, `index` is [size, M] with -1 for none.

        Raises:
            AntgmmError: fewer rows than a batch needs.
        """
        about = {"size": size, "seed": seed, "rows": rows, "shift": shift, "finish": partial(device_batch, self.table)}
        arrays = self.arrays
        if features is not None:
            arrays = {**arrays, "views": features}
            if not pictures:
                del arrays["images"]
        if full:
            return batches(arrays, **about)
        if self.pack:
            return packed_batches(arrays, width=self.pack, **about)
        return batches(arrays, widths=self._widths, prompts=self._prompt_widths, **about)

    def in_order(self, size: int, *, prompts: bool = False, by_length: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """Every row once; the last batch repeats its last row, so that one shape is compiled.

        Args:
            size: rows a batch; under a mesh the next number that its devices divide.
            prompts: add the prompts alone, for generation, under `prompt/`.
            by_length: rows with short answers first, instead of the order of the records.

        Yields:
            Training batches with `index`, the rows' numbers; under a mesh the rows of this process's devices.
        """
        arrays = {**self.arrays, **self._prompts} if prompts else self.arrays
        order = np.argsort(answer_lengths(self.arrays), kind="stable") if by_length else None
        yield from map(partial(device_batch, self.table), once(arrays, size=size, order=order))

    def pixels(self, size: int, moves: Int[np.ndarray, "N 2"]) -> Iterator[dict[str, np.ndarray]]:
        """Every row's picture once, moved by so many pixels; batches as of `in_order`.

        Args:
            size: rows a batch.
            moves: rows and columns of each picture, as `data.shifting.shifted` takes them.

        Yields:
            Pictures as a model takes them.
        """
        for batch in once({"images": self.arrays["images"]}, size=size):
            yield pictures(self.table, shifted(batch["images"], moves[batch["index"]]))

    def by_bucket(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Every row once, the shorter first, cut to `buckets`: for a teacher that reads each row once.

        Args:
            size: rows a batch; under a mesh the next number that its devices divide.

        Yields:
            Training batches as of `in_order`.
        """
        order = np.argsort(lengths(self.arrays), kind="stable")
        yield from map(
            partial(device_batch, self.table), once(self.arrays, size=size, order=order, widths=self._widths)
        )


def _with_widest(buckets: Sequence[int], array: np.ndarray) -> tuple[int, ...]:
    """Bucket widths with the full one for all beyond it; none without buckets."""
    widest = array.shape[1]
    return (*(width for width in buckets if width < widest), widest) if buckets else ()
