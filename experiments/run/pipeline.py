"""A whole run: a start, stages, export, scores; started again it goes on where it stopped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.axes import sizes, to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import load_hf
from antgmm_jax.parallel.processes import by_first
from antgmm_jax.parallel.sharding import own_rows
from antgmm_jax.pure import abstract, float32
from data.encoding import Encoder
from data.source import Source
from distill import NO_TEACHER
from experiments.run.checks import check_steps
from experiments.run.datasets import encode_both, encoded, load_both, load_records
from experiments.run.features import ImageFeatures
from experiments.run.folder import RunFolder, write_json
from experiments.run.forecast import Rows, announce, look_at
from experiments.run.host.console import say
from experiments.run.host.energy import Energy
from experiments.run.objectives import Shared
from experiments.run.pairs import with_pairs
from experiments.run.prompts import prompt_of
from experiments.run.publishing import Questions, publish
from experiments.run.samples import Samples
from experiments.run.schema import Recipe, Training, Work
from experiments.run.scoring import scored
from experiments.run.stage import Left, StageRun
from experiments.run.start import opening
from experiments.run.student import Student, load_after, teacher_key
from experiments.run.targets import bridge_weights_of, targets_of
from experiments.run.training import save_processor

GATE_PROMPTS = 320


class Outcome(NamedTuple):
    """What a run hands to its report.

    Attributes:
        folder: the run's folder, held by this process.
        recipe: its recipe.
        teacher: the model that was cut; None where one was trained without a teacher.
        student: the last stage's model as it was read back from the exported files.
        test: records that scores are measured on.
        hard: harder records, scored as well; None where the recipe names none.
        processor: of both models.
    """

    folder: RunFolder
    recipe: Recipe | Training
    teacher: Student | None
    student: Student
    test: Samples
    hard: Samples | None
    processor: ProcessorMixin


class Run:
    """One run of stages, on the ambient mesh if there is one, in one process or several.

    Args:
        recipe: what to do.
        path: the run's folder.
        cache: folder of teacher caches, one for each teacher and data, for runs that share them; the run's own unless
            given.
    """

    def __init__(self, recipe: Recipe | Training, path: str | Path, *, cache: Path | None = None):
        self.recipe, self.folder = recipe, RunFolder(path)
        self._cache = cache or self.folder.cache

    @contextmanager
    def exported(self) -> Iterator[Outcome]:
        """Runs, or goes on with, the stages and the export; the folder is held, and status.json says so, until the end.

        Yields:
            What the report is made of.

        Raises:
            AntgmmError: bad input, or the export does not answer as the student does.
        """
        with self._opened() as student:
            exported = self._export(student)
            yield Outcome(
                self.folder, self.recipe, self.origin.teacher, exported, self.test, self.hard, self.origin.processor
            )

    def finish_stages(self) -> Student:
        """Runs, or goes on with, the stages alone: neither export nor report.

        Returns:
            The model that the last one leaves.

        Raises:
            AntgmmError: bad input.
        """
        with self._opened() as student:
            return student

    def scores(self) -> dict[str, Any]:
        """Runs, or goes on with, the stages alone, and scores what they leave: neither export nor report.

        The last stage trains on answers, as all do that distil.

        Returns:
            `params`, `sizes`, `seconds`, `exact_match`, `by_type`, and `exact_match_hard` where the recipe names hard
            records.

        Raises:
            AntgmmError: bad input.
        """
        with self._opened() as student:
            last = self.recipe.work[-1]
            metrics = checkpoint.load_record(self.folder.stage(last.number, last.stage.name))["metrics"]
            scores = {name: metrics["scores"][name] for name in ("exact_match", "by_type")}
            if self.hard is not None:
                scores["exact_match_hard"] = self._scores("scores on hard records", student, self.hard)["exact_match"]
            size = sum(leaf.size for leaf in jax.tree.leaves(student.params))
            return {"params": size, "sizes": sizes(student.config), "seconds": self.folder.seconds, **scores}

    @contextmanager
    def _opened(self) -> Iterator[Student]:
        """The folder held, and all stages run: the model that the last one leaves."""
        recipe = self.recipe
        for work in recipe.work:
            own_rows(work.stage.optimizer.batch_size)  # refuses what the mesh does not divide
        self.folder.check(recipe)
        begin = opening(recipe)
        # A recipe that cannot run must not claim the folder.
        with self.folder.opened(recipe):
            records = load_both(recipe)
            student, self.origin = begin(records[0])
            by_first(lambda: self._announce(records, student.config))
            shared = self._prepared(records, (self.origin.teacher or student).config)
            for work in recipe.work:
                student = self._stage(work, student, shared)
            yield student

    def _announce(self, records: tuple[Source, Source], config: LMMConfig) -> None:
        """Prints the parts of the run that are left, with about how long they take."""
        recipe, limits = self.recipe, {"max_length": self.recipe.max_length, "max_answer": self.recipe.max_answer}
        encoder = Encoder(self.origin.processor, config, **limits, template=prompt_of(recipe))
        hard = recipe.hard.samples if recipe.hard else 0
        if looks := look_at(records[0], encoder):
            done = [work.title for work in recipe.work if self.folder.finished(work.number, work.stage.name)]
            announce(recipe, config, Rows(len(records[0]), len(records[1]), hard, **looks), done)

    def _prepared(self, records: tuple[Source, Source], config: LMMConfig) -> Shared:
        """Encodes the records, checks what stages could not train with, and asks the teacher for its targets."""
        recipe, (teacher, processor, _) = self.recipe, self.origin
        samples, self.test = encode_both(recipe, records, processor, config)
        samples.check_types({work.title: (*work.stage.repeat,) for work in recipe.work})
        for work in recipe.work:
            packed = recipe.pack and work.objective == "answers"
            check_steps(work, abstract(config), 0 if packed else len(samples.repeated(work.stage.repeat)))
        # Read before anything is trained: what is wrong with them is refused now.
        self.hard = None if recipe.hard is None else encoded(recipe, load_records(recipe.hard), processor, config)
        if self.hard is not None:
            self.test.pad_prompts_like(self.hard)
        place = self.folder.cache / "features"
        if teacher is None or not isinstance(recipe, Recipe):
            self.folder.bind(data=samples.fingerprint)
            features = ImageFeatures(samples, recipe.seed, place)
            return Shared(recipe, NO_TEACHER, samples, features, lambda stage: None)
        if recipe.teacher.pairs:
            with self.folder.metered("pairs"):
                samples = with_pairs(recipe, samples, teacher.config, teacher.params, processor, self._cache)
        self.folder.bind(teacher=teacher_key(teacher.params), data=samples.fingerprint)
        targets = targets_of(recipe, teacher, samples, self.folder, self._cache)
        features = ImageFeatures(samples, recipe.seed, place)
        return Shared(
            recipe, targets, samples, features, lambda stage: bridge_weights_of(recipe, stage, teacher, samples)
        )

    def _stage(self, work: Work, student: Student, shared: Shared) -> Student:
        done = self.folder.stage(work.number, work.stage.name)
        if self.folder.finished(work.number, work.stage.name):
            say(f"{work.title}: complete in {done}")
            return load_after(done, student)
        with self.folder.metered(done.name) as energy:
            return self._trained(work, student, shared, energy)

    def _trained(self, work: Work, student: Student, shared: Shared, energy: Callable[[], Energy]) -> Student:
        working = self.folder.steps(work.number, work.stage.name)
        left = StageRun(work, shared, working).run(student)
        after = Student(left.config, {**student.params, **left.params}, left.keep)
        metrics: dict[str, Any] = {"history": left.history}
        if work.objective == "answers":
            metrics["scores"] = self._scores(f"scores after {work.title}", after, self.test)
            say(f"{work.title}: exact match {metrics['scores']['exact_match']:.3f}")
        metrics["energy"] = energy()._asdict()
        record = self._record(work, left, shared) | {"metrics": metrics}
        checkpoint.save_stage(self.folder.stage(work.number, work.stage.name), {"params": left.params}, record)
        checkpoint.discard_steps(working)
        return after

    def _record(self, work: Work, left: Left, shared: Shared) -> dict[str, Any]:
        """What a stage's folder says beside its arrays and metrics; where its units lie, if in a teacher."""
        record = {
            "stage": work.stage.model_dump(mode="json"),
            "objective": work.objective,
            "config": to_dict(left.config),
            "seed": self.recipe.seed,
            "data": shared.samples.fingerprint,
            "position": left.position,
        }
        if self.origin.teacher is None:
            return record
        parent = self.origin.parent
        if work.number > 1:
            parent = str(self.folder.stage(work.number - 1, self.recipe.work[work.number - 2].stage.name))
        return record | {"parent": parent, "teacher": teacher_key(self.origin.teacher.params), "keep": left.keep}

    def _scores(self, title: str, student: Student, records: Samples) -> dict[str, Any]:
        longest = self.recipe.evaluate.max_new_tokens
        return scored(title, student.config, student.params, records, self.origin.processor, max_new_tokens=longest)[0]

    def _export(self, student: Student) -> Student:
        """Exports the model; the same as the files hold it."""
        recipe, folder = self.recipe, self.folder
        like = Path(recipe.start or folder.path / "processor")
        if not recipe.start:
            by_first(lambda: save_processor(self.origin.processor, like))
        result = publish(
            student.config,
            student.params,
            folder.export,
            like,
            dtype=recipe.export.dtype,
            prompt=prompt_of(recipe),
            questions=self._questions() if self.origin.teacher else None,
        )

        def note() -> None:
            if result is not None:
                write_json(folder.report / "gate.json", result._asdict())

        by_first(note)
        config, params = load_hf(folder.export)
        return Student(config, float32(config, params), student.keep)

    def _questions(self) -> Questions:
        """What the export gate asks: some of the questions that the student is scored on."""
        batches, tokenizer = [], self.origin.processor.tokenizer
        for batch in self.test.in_order(min(64, len(self.test)), prompts=True):
            batches.append({**batch, "id": np.array(self.test.names(batch["index"]))})
            if sum(len(b["index"]) for b in batches) >= min(GATE_PROMPTS, len(self.test)):
                break
        longest = self.recipe.evaluate.max_new_tokens
        return Questions(batches, longest, tokenizer.eos_token_id, tokenizer.pad_token_id)
