"""Encoded records and their batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel.sharding import local_rows, padded_batch_size
from data import collate
from data.batching import Batches, batches, sequential_batches
from data.encoding import Encoder
from data.limits import LONGEST_ANSWER, MOST_TOKENS
from data.making import ImageOptions, Views, batch, in_threads, moved
from data.packing import packed_batches, row_count
from data.record import PROMPT, Arrays, Record
from data.source import InMemorySource, Source
from data.store import THREADS, open_encoded
from experiments.run.host.console import bar
from experiments.run.schema import Work

Fits = Callable[..., int]
"""(text=, answer=, slots=) of the largest row, as in `rows_that_fit` -> rows of a batch."""


class Samples:
    """Encoded records that are read batch by batch; only a few numbers per record are in memory.

    Args:
        records: the records.
        processor: processor of the model.
        config: model config.
        max_length: maximum number of prompt tokens, without image tokens.
        max_answer: maximum number of answer tokens.
        buckets: widths of training batches, in addition to the full width; without, there is one shape for each group
            of rows with similar numbers of image slots.
        prompt_buckets: widths of prompts for a model with an encoder, whose `buckets` are for answers.
        pack: tokens per row of packed training batches; 0 for one sample per row.
        prompt: prompt template, see `data.record.prompt`.

    Attributes:
        records: the records.
        encoder: encodes the records.
        rows: the encoded records.
        needs: columns and image slots that each record needs.
        pack: as given.
        fingerprint: digest of all token ids and pixels, and of what scores are grouped by and compared with.

    Raises:
        AntgmmError: lists invalid and too long rows; or the model does not support `pack` or `prompt_buckets`, or the
            processor does not fit the model.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: ProcessorMixin,
        config: LMMConfig,
        *,
        max_length: int = MOST_TOKENS,
        max_answer: int = LONGEST_ANSWER,
        buckets: Sequence[int] = (),
        prompt_buckets: Sequence[int] = (),
        pack: int = 0,
        prompt: str = PROMPT,
    ):
        if pack and config.encoder_decoder:
            raise AntgmmError(f"pack = {pack}: only models without an encoder can read packed rows: use buckets")
        if prompt_buckets and not config.encoder_decoder:
            raise AntgmmError("prompt_buckets: a model without an encoder has no separate prompts: use buckets")
        self.records = records if isinstance(records, Source) else InMemorySource(records)
        self.encoder = Encoder(processor, config, max_length=max_length, max_answer=max_answer, template=prompt)
        self.rows = open_encoded(self.records, self.encoder, shown=bar)
        self._positions = config.language.learned_positions
        self._layout = collate.layout(self.encoder, config.language.start_token)
        self.needs, apart = collate.needs(self.rows.index, self._layout.apart), self._layout.apart
        self._whole = collate.widths(self.needs, apart)
        self._buckets = {"buckets": buckets, "prompt_buckets": prompt_buckets}
        # One large picture must not make all batches as large.
        self._full = collate.Alike.of(self.needs, apart)
        bucketed = buckets or prompt_buckets
        self._trained = collate.widths(self.needs, apart, **self._buckets) if bucketed else self._full
        self._prompt_width = collate.bucket(int(self.rows.index.prompt.max()))
        self.pack, self.fingerprint = pack, self.rows.index.fingerprint
        # Decoding image files takes longer than a step of a small model.
        self._threads = 1 if self.rows.kept else THREADS

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def end_tokens(self) -> tuple[int, int]:
        """The token that ends an answer, and the padding token."""
        return self.rows.encoder.eos, self.rows.encoder.pad

    @property
    def totals(self) -> dict[str, int]:
        """Answer tokens, tokens of text (with the answer, unless an encoder reads the prompt) and image slots."""
        return {
            "answer": int(self.needs.answer.sum()),
            "text": int(self.needs.text.sum()),
            "slots": int(self.needs.slots.sum()),
        }

    @property
    def lengths(self) -> dict[str, int]:
        """Columns of text and answers, and image slots, of the largest batch."""
        return self._whole.largest._asdict()

    def names(self, index: np.ndarray) -> list[Any]:
        """Returns the ids of records as nested lists like `index`; "" for -1."""
        if index.ndim > 1:
            return [self.names(part) for part in index]
        return [self.records.words(int(row)).id if row >= 0 else "" for row in index]

    def pad_prompts_like(self, other: "Samples") -> None:
        """Pads the prompts of two sets of samples to the same width, so that they share a compiled program.

        It has no effect on sets of several groups (`questions`), which have widths of their own.

        Args:
            other: the other samples, which are changed too.
        """
        self._prompt_width = other._prompt_width = max(self._prompt_width, other._prompt_width)

    def check_room(self, max_new_tokens: int) -> None:
        """Checks that a model with learned positions has one for each token of the longest prompt and an answer.

        Args:
            max_new_tokens: maximum length of answers; the last token is not read.

        Raises:
            AntgmmError: it has too few.
        """
        longest = int(self.rows.index.prompt.max()) + max_new_tokens - 1
        if 0 < self._positions < longest:
            raise AntgmmError(
                f"the longest prompt with max_new_tokens = {max_new_tokens} needs {longest} positions, and the model"
                f" has {self._positions}: shorten prompts, or reduce evaluate.max_new_tokens"
            )

    def rows_of(self, types: Sequence[str]) -> np.ndarray:
        """Returns the rows with given question types.

        Args:
            types: question types; empty for all.

        Returns:
            Row numbers, ascending.

        Raises:
            AntgmmError: no row has one of the types.
        """
        known = self.rows.index.names
        if absent := sorted(set(types) - set(known)):
            raise AntgmmError(f"no question has type {', '.join(absent)}: the data has {', '.join(sorted(known))}")
        wanted = np.array([not types or name in types for name in known])
        return np.flatnonzero(wanted[self.rows.index.types])

    def repeated(self, times: Mapping[str, int]) -> np.ndarray:
        """Returns all rows, with rows of some question types repeated.

        Args:
            times: question type -> number of repetitions; 1 for other types.

        Returns:
            Row numbers, ascending.
        """
        often = np.array([times.get(name, 1) for name in self.rows.index.names])
        return np.repeat(np.arange(len(self)), often[self.rows.index.types])

    def rows_to_train(self, work: Work) -> int:
        """Returns the number of rows that an epoch of a stage trains, or a lower bound of at least its batch.

        Args:
            work: the stage.

        Raises:
            AntgmmError: a sample is longer than a packed row.
        """
        rows, batch = self.repeated(work.stage.visits), work.stage.optimizer.batch_size
        if not self.pack or work.objective != "answers":
            return len(rows)
        return row_count(self.needs.text[rows], self.needs.slots[rows], self.pack, seed=work.seed, enough=batch)

    def check_types(self, wanted: Mapping[str, Sequence[str]]) -> None:
        """Checks that question types occur in the data.

        Args:
            wanted: name for messages -> question types.

        Raises:
            AntgmmError: a type does not occur.
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
        features: Views | None = None,
        pictures: bool = False,
        rows: np.ndarray | None = None,
        shift: int = 0,
    ) -> Batches:
        """Returns an endless, resumable iterator of shuffled training batches, with buckets or packing.

        Args:
            size: rows per batch.
            seed: seed of the order.
            full: no buckets and no packing: an order that does not depend on buckets, and one shape for each group of
                rows with similar numbers of image slots.
            features: cached image features of all rows instead of images; each visit uses a random view.
            pictures: also include images, for a teacher that reads them.
            rows: row numbers that an epoch visits (repeated for several visits); None for all once.
            shift: maximum random shift of images in pixels, in each direction.

        Returns:
            The iterator; with packing, `index` is [size, M] with -1 for none.

        Raises:
            AntgmmError: there are fewer rows than `size`.
        """
        seen, own = ImageOptions(shift, features, pictures), local_rows(size)
        options = {"size": size, "seed": seed, "visits": rows, "threads": self._threads}
        if self.pack and not full:
            answer = self._whole.answer[-1]
            return packed_batches(self.rows, self.needs, width=self.pack, answer=answer, own=own, seen=seen, **options)
        widths = self._full if full else self._trained

        def make(index: np.ndarray, rng: np.random.Generator) -> Arrays:
            shape, choices = widths.holds(self.needs.of(index)), seen.choices(rng, index.shape)[own]
            return batch(self.rows, index[own], self._layout, shape, seen=seen, choices=choices)

        return batches(make, widths.groups(self.needs), **options)

    def latents(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Iterates over name and facts of all records. Raises AntgmmError at one without an image."""
        for row, slots in enumerate(self.rows.index.slots):
            name = self.records.words(row).id or f"record {row + 1}"
            if not slots:
                raise AntgmmError(f"{name} has no image: a phase of kind facts needs one in every row")
            yield name, self.rows.tokens(row)["latents"]

    def facts(self, size: int, seed: int, names: Sequence[str]) -> Batches:
        """Returns an endless iterator of shuffled batches of images with facts, for pretraining an image encoder.

        Args:
            size: rows per batch.
            seed: seed of the order.
            names: names of the facts.

        Returns:
            The iterator of `images`, `fact/NAME` int32 [size] and, if the records have them, `cells`.
        """
        own = local_rows(size)

        def make(index: np.ndarray, rng: np.random.Generator) -> Arrays:
            encoded = [self.rows[int(row)] for row in index[own]]
            images = collate.pictures([[row["images"]] for row in encoded], self._whole.slots[-1])
            facts = {f"fact/{name}": np.array([row["latents"][name] for row in encoded]) for name in names}
            cells = {"cells": np.stack([row["cells"] for row in encoded])} if "cells" in encoded[0] else {}
            return {"images": images, **cells, **facts, "index": index[own].astype(np.int32)}

        return batches(make, np.zeros(len(self), int), size=size, seed=seed, threads=self._threads)

    def in_order(self, size: int, *, prompts: bool = False) -> Iterator[Arrays]:
        """Iterates over all rows once, in batches of one shape; the last batch is filled up with its last row.

        Args:
            size: rows per batch; under a mesh, rounded up to a multiple of its devices.
            prompts: also include the prompts alone under `prompt/`, for generation.

        Yields:
            Training batches with row numbers `index`; under a mesh, the rows of this process.
        """
        yield from self._once(np.arange(len(self)), size, self._whole, self._prompt_width if prompts else 0)

    def questions(self, fits: Fits, first: int = 0) -> Iterator[Arrays]:
        """Iterates over all rows once, in order of the last answer's length, with the prompts alone under `prompt/`.

        Args:
            fits: rows per batch of a group of rows; there are several groups if pictures differ much in size.
            first: only so many rows, the first ones, in batches that are as large as these need; 0 for all.

        Yields:
            Training batches as in `in_order`, of one shape for each group.
        """
        for rows, widths in self._alike(first):
            prompt = (
                self._prompt_width
                if len(rows) == len(self)
                else collate.bucket(int(self.rows.index.prompt[rows].max()))
            )
            order = rows[np.argsort(self.rows.index.answer[rows], kind="stable")]
            yield from self._once(order, _rows_of(fits, rows, widths), widths, prompt)

    def by_bucket(self, fits: Fits) -> Iterator[Arrays]:
        """Iterates over all rows once, in order of length and padded to `buckets`, for a teacher.

        Args:
            fits: as in `questions`.

        Yields:
            Training batches as in `in_order`.
        """
        apart = self._layout.apart
        lengths = self.needs.answer if apart else self.needs.text
        for rows, whole in self._alike():
            cut = collate.widths(self.needs.at(rows), apart, **self._buckets)
            order = rows[np.argsort(lengths[rows], kind="stable")]
            yield from self._once(order, _rows_of(fits, rows, whole), cut._replace(text=whole.text) if apart else cut)

    def _alike(self, first: int = 0) -> Iterator[tuple[np.ndarray, collate.Widths]]:
        """Groups of rows with similar numbers of image slots, and the shape of a batch that holds any of them."""
        needs = self.needs.at(np.arange(min(first, len(self)))) if first else self.needs
        for rows in needs.alike():
            yield rows, collate.widths(self.needs.at(rows), self._layout.apart)

    def alone(self, row: int) -> Arrays:
        """Returns one row as a batch without padding and without unused image slots, with its prompt under `prompt/`.

        Args:
            row: row number.
        """
        index = np.array([row])
        return batch(self.rows, index, self._layout, self.needs.of(index), prompt=int(self.rows.index.prompt[row]))

    def _once(self, order: np.ndarray, size: int, widths: collate.Widths, prompt: int = 0) -> Iterator[Arrays]:
        size = padded_batch_size(size)
        own = local_rows(size)
        for index in sequential_batches(order, size):
            shape = widths.holds(self.needs.of(index))
            yield batch(self.rows, index[own], self._layout, shape, prompt=prompt, threads=self._threads)

    def pictures(
        self, fits: Fits, moves: Int[np.ndarray, "V N 2"], done: Bool[np.ndarray, " N"]
    ) -> Iterator[tuple[Int[np.ndarray, " B"], list[Arrays]]]:
        """Iterates over the images of all rows once, in groups of rows as in `questions`.

        Args:
            fits: as in `questions`.
            moves: vertical and horizontal shift of each row's images in each view.
            done: rows that are not needed; batches of such rows alone are left out.

        Yields:
            Row numbers, of all processes, and `images` [B, M, ...] of each view; under a mesh, those of this process.
        """
        for rows, widths in self._alike():
            size, slots = padded_batch_size(_rows_of(fits, rows, widths)), widths.slots[-1]
            own = local_rows(size)
            for index in sequential_batches(rows, size):
                if done[index].all():
                    continue
                trees = in_threads(self.rows.images, self._threads, index[own].tolist())
                yield (
                    index,
                    [
                        collate.pictures(
                            [[moved(tree, move)] for tree, move in zip(trees, view[index[own]], strict=True)], slots
                        )
                        for view in moves
                    ],
                )


def _rows_of(fits: Fits, group: np.ndarray, widths: collate.Widths) -> int:
    """Rows per batch of a group: at most all of them, as the last batch is filled up with copies."""
    return min(fits(**widths.largest._asdict()), len(group))
