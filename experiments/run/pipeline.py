"""A whole run: teacher in, stages, export, gate, scores; started again it goes on where it stopped."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers import ProcessorMixin

import distill
import pruning
from antgmm_jax import checkpoint
from antgmm_jax.bridge import OUT
from antgmm_jax.config import LMMConfig, from_dict, sizes, to_dict
from antgmm_jax.convert import load_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import Params, abstract, float32, functional
from antgmm_jax.sharding import own_rows
from distill import Teacher
from distill.teacher import to_dtype
from experiments.run.checks import check_sizes, check_states, check_steps
from experiments.run.datasets import encode_both, encoded, load_both, load_records
from experiments.run.evaluate import evaluate
from experiments.run.features import ImageFeatures
from experiments.run.folder import RunFolder, held, write_json
from experiments.run.host.console import bar, say
from experiments.run.host.energy import Energy
from experiments.run.importance import calibration_batches
from experiments.run.pairs import with_pairs
from experiments.run.prompts import prompt_of
from experiments.run.publish import Questions, publish
from experiments.run.samples import Samples, load_processor
from experiments.run.schema import Recipe, Stage
from experiments.run.stage import StageRun, Student

CACHE_BATCH = 128
IN_MEMORY = 4 << 30  # bytes of a teacher cache that each process holds whole; of a larger one it reads rows as it goes
GATE_PROMPTS = 320


class Outcome(NamedTuple):
    """What a run hands to its report.

    Attributes:
        folder: the run's folder, held by this process.
        recipe: its recipe.
        teacher: the model that was cut.
        student: the student as it was read back from the exported files.
        test: records that scores are measured on.
        hard: harder records, scored as well; None where the recipe names none.
        processor: of both models.
    """

    folder: RunFolder
    recipe: Recipe
    teacher: Student
    student: Student
    test: Samples
    hard: Samples | None
    processor: ProcessorMixin


class Run:
    """One run of `antgmm compress`, on the ambient mesh if there is one, in one process or several.

    Args:
        recipe: what to do.
        path: the run's folder.
        cache: folder of teacher caches, one for each teacher and data, for runs that share them; the run's own unless
            given.
    """

    def __init__(self, recipe: Recipe, path: str | Path, *, cache: Path | None = None):
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
        with self._opened() as (student, hard):
            exported = self._export(student)
            yield Outcome(self.folder, self.recipe, self.teacher, exported, self.test, hard, self.processor)

    def scores(self) -> dict[str, Any]:
        """Runs, or goes on with, the stages alone, and scores what they leave: neither export nor report.

        Returns:
            `params`, `sizes`, `seconds`, `exact_match`, `by_type`, and `exact_match_hard` where the recipe names hard
            records.

        Raises:
            AntgmmError: bad input.
        """
        with self._opened() as (student, hard):
            last = self.folder.stage(len(self.recipe.stages), self.recipe.stages[-1].name)
            found = checkpoint.load_record(last)["metrics"]["scores"]
            scores = {name: found[name] for name in ("exact_match", "by_type")}
            if hard is not None:
                scores["exact_match_hard"] = self._scores("scores on hard records", student, hard)["exact_match"]
            size = sum(leaf.size for leaf in jax.tree.leaves(student.params))
            return {"params": size, "sizes": sizes(student.config), "seconds": self.folder.seconds, **scores}

    @contextmanager
    def _opened(self) -> Iterator[tuple[Student, Samples | None]]:
        """The folder held, and all stages run: the last one's student, and the hard records."""
        recipe = self.recipe
        for stage in recipe.stages:
            own_rows(stage.optimizer.batch_size)  # refuses what the mesh does not divide
        self.folder.check(recipe)
        config, params = load_hf(recipe.teacher.path)
        self.teacher = Student(config, float32(config, params), pruning.identity(config))
        start = self._start()
        check_sizes(start, recipe.stages, whole=self.teacher.keep)
        check_states(config, recipe)
        self.processor = load_processor(recipe.teacher.path)
        # A recipe that cannot run must not claim the folder.
        with self.folder.opened(recipe):
            self.samples, self.test = encode_both(recipe, load_both(recipe), self.processor, config)
            self.samples.check_types({f"stage {stage.name!r}": (*stage.repeat,) for stage in recipe.stages})
            found = abstract(config)
            for stage in recipe.stages:
                rows = 0 if recipe.pack else len(self.samples.repeated(stage.repeat))
                check_steps(f"stage {stage.name!r}", stage.optimizer, found, rows, stage.frozen)
            # Read before anything is trained: what is wrong with them is told now.
            hard = self._hard(config)
            if hard is not None:
                self.test.pad_prompts_like(hard)
            if recipe.teacher.pairs:
                with self.folder.metered("pairs"):
                    self.samples = with_pairs(
                        recipe, self.samples, config, self.teacher.params, self.processor, self._cache
                    )
            self.folder.bind(teacher=teacher_key(self.teacher.params), data=self.samples.fingerprint)
            self.features = ImageFeatures(self.samples, recipe.seed)
            targets = self._targets()
            student = start
            for number in range(1, len(recipe.stages) + 1):
                student = self._stage(number, student, targets)
            yield student, hard

    def _hard(self, config: LMMConfig) -> Samples | None:
        hard = self.recipe.evaluate.hard
        return None if hard is None else encoded(self.recipe, load_records(hard), self.processor, config)

    def _start(self) -> Student:
        if not self.recipe.parent:
            return self.teacher
        record = cut_record(Path(self.recipe.parent))
        if record["teacher"] != teacher_key(self.teacher.params):
            raise AntgmmError(
                f"parent {self.recipe.parent} was cut from another teacher than {self.recipe.teacher.path}"
            )
        return load_student(Path(self.recipe.parent))

    def _targets(self) -> Teacher:
        config, params, _ = self.teacher
        table = self.recipe.teacher
        if not any(stage.loss.reads_teacher for stage in self.recipe.stages):
            return distill.NO_TEACHER
        if table.mode == "online":
            return distill.online(functional(config), to_dtype(params, jax.numpy.dtype(self.recipe.optimizer.dtype)))
        names = ("final", *(f"{tower}/states" for tower in table.states))
        if any(stage.loss.bridge for stage in self.recipe.stages):
            names = (*names, OUT)
        like = next(self.samples.in_order(CACHE_BATCH))
        key = distill.fingerprint(params, f"{json.dumps(to_dict(config))} {self.samples.fingerprint}")
        size = distill.cache_size(functional(config), params, like, samples=len(self.samples), names=names)
        say(f"teacher cache: {', '.join(f'{name} {bytes_ / 1e6:.0f} MB' for name, bytes_ in size.items())}")
        place = self._cache / key[:16]
        with (
            held(place),
            self.folder.metered("cache"),
            bar("teacher cache", len(self.samples)) as update,
        ):
            distill.build_cache(
                functional(config),
                params,
                self.samples.by_bucket(CACHE_BATCH),
                place,
                samples=len(self.samples),
                like=like,
                key=key,
                names=names,
                progress=lambda done, total: update(done, ""),
            )
        cache = distill.open_cache(place, key=key, names=names, in_memory=sum(size.values()) <= IN_MEMORY)
        return distill.cached(functional(config), params, cache)

    def _stage(self, number: int, student: Student, targets: Teacher) -> Student:
        stage = self.recipe.stages[number - 1]
        done = self.folder.stage(number, stage.name)
        if self.folder.finished(number, stage.name):
            say(f"stage {stage.name}: found complete in {done}")
            return load_student(done)
        with self.folder.metered(done.name) as energy:
            return self._distil(number, student, targets, energy)

    def _distil(self, number: int, student: Student, targets: Teacher, energy: Callable[[], Energy]) -> Student:
        stage = self.recipe.stages[number - 1]
        done, working = self.folder.stage(number, stage.name), self.folder.steps(number, stage.name)
        run = StageRun(
            stage,
            number,
            targets,
            self.recipe.teacher.states,
            self.samples,
            self.features,
            seed=self.recipe.seed,
            calibration_batches=self.recipe.calibration_batches,
            working=working,
            checkpoint_every=self.recipe.checkpoint_every,
            bridge_weights=self._bridge_weights(stage),
        )
        left, history = run.run(student)
        scores = self._scores(f"scores after {stage.name}", left, self.test)
        record = {
            "stage": stage.model_dump(mode="json"),
            "config": to_dict(left.config),
            "parent": str(self.folder.stage(number - 1, self.recipe.stages[number - 2].name))
            if number > 1
            else self.recipe.parent,
            "teacher": teacher_key(self.teacher.params),
            "keep": left.keep,
            "metrics": {"scores": scores, "history": history, "energy": energy()._asdict()},
            "seed": self.recipe.seed,
            "data": self.samples.fingerprint,
            "position": run.data.position,
        }
        checkpoint.save_stage(done, {"params": left.params}, record)
        checkpoint.discard_steps(working)
        say(f"stage {stage.name}: exact match {scores['exact_match']:.3f}")
        return left

    def _bridge_weights(self, stage: Stage) -> np.ndarray | None:
        """Weights of the tokens that the teacher's bridge hands on, where a stage weighs them apart."""
        if stage.loss.bridge_tokens == "alike":
            return None
        config, params, _ = self.teacher
        seen = calibration_batches(
            self.samples,
            **stage.optimizer.pieces(self.recipe.calibration_batches),
            seed=self.recipe.seed,
        )
        return distill.bridge_weights(functional(config), params, seen)

    def _scores(self, title: str, student: Student, records: Samples) -> dict[str, Any]:
        with bar(title, len(records)) as update:
            found, _ = evaluate(
                student.config,
                student.params,
                records,
                self.processor,
                max_new_tokens=self.recipe.evaluate.max_new_tokens,
                progress=update,
            )
        return found

    def _export(self, student: Student) -> Student:
        """Exports the student; the same as the files hold it."""
        recipe, folder = self.recipe, self.folder
        result = publish(
            student.config,
            student.params,
            folder.export,
            Path(recipe.teacher.path),
            dtype=recipe.export.dtype,
            prompt=prompt_of(recipe),
            questions=self._questions(),
        )
        if result is not None:  # in the first process
            write_json(folder.report / "gate.json", result._asdict())
        config, params = load_hf(folder.export)
        return Student(config, float32(config, params), student.keep)

    def _questions(self) -> Questions:
        """What the export gate asks: some of the questions that the student is scored on."""
        ids = np.array([record.id for record in self.test.records])
        batches, tokenizer = [], self.processor.tokenizer
        for batch in self.test.in_order(min(64, len(self.test)), prompts=True):
            batches.append({**batch, "id": ids[batch["index"]]})
            if sum(len(b["index"]) for b in batches) >= min(GATE_PROMPTS, len(self.test)):
                break
        longest = self.recipe.evaluate.max_new_tokens
        return Questions(batches, longest, tokenizer.eos_token_id, tokenizer.pad_token_id)


def teacher_key(params: Params) -> str:
    """A digest of a teacher's parameters: stages of one teacher can be recombined."""
    return distill.fingerprint(params, "")[:16]


def cut_record(directory: Path) -> dict[str, Any]:
    """The record of a stage that was cut.

    Args:
        directory: `stages/NN-name` of a run of `antgmm compress`.

    Returns:
        The record.

    Raises:
        AntgmmError: no finished stage, or a phase of `antgmm train`.
    """
    record = checkpoint.load_record(directory)
    if "keep" not in record:
        raise AntgmmError(f"{directory} is a phase of antgmm train: give a stage of antgmm compress")
    return record


def keep_of(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """A stage record's keep as arrays."""
    return {axis: pruning.as_kept(kept) for axis, kept in record["keep"].items()}


def load_student(directory: Path) -> Student:
    """The model that a finished stage left.

    Args:
        directory: `stages/NN-name`.

    Returns:
        The student.
    """
    cut_record(directory)
    return _student(*checkpoint.load_stage(directory))


def _student(tree: dict[str, Any], record: dict[str, Any]) -> Student:
    config = from_dict(record["config"])
    return Student(config, float32(config, tree["params"]), keep_of(record))
