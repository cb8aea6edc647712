"""The plan of a compression without a recipe: a recipe with its reasons as comments."""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tomli_w

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.io.loading import load_processor
from experiments.auto.amount import affordable
from experiments.auto.buckets import buckets
from experiments.auto.goal import PARTS, Goal, is_planned, key_of, marked
from experiments.auto.look import COARSE, Look, check_quality, longest_answer, look_at_both, warnings
from experiments.auto.prompting import about_prompts, chosen_prompt, prompt_losses
from experiments.auto.room import checkpoint_bytes, token_bytes, trial_tables, with_disk, with_room
from experiments.auto.rows import counted
from experiments.auto.schedule import Fitted, Machine, Scale, Tuned, base, draft, fitted, scored_rows, with_stages
from experiments.auto.sizing import Chosen, Sensitivity, by_side, check_budget, chosen, within
from experiments.auto.tune import PART, Trial, tuned
from experiments.run.batch_size import compute_dtype
from experiments.run.files import nearest, write_text
from experiments.run.host import facts
from experiments.run.host.console import clock, count, printable, say
from experiments.run.narrow import narrow_of, narrow_of_stage
from experiments.run.progress.forecast import REPORT, TARGETS, Rows, look_at, matmul_rate
from experiments.run.rows.datasets import encoded, load_records
from experiments.run.rows.samples import Samples
from experiments.run.schema import Recipe
from experiments.run.schema.recipe import change, recipe_of
from experiments.run.smaller_vocabulary import used_tokens
from experiments.run.student import load_student, whole
from pruning.costs import total_parameters

TESTED = 1000
"""Maximum number of test records that a planned run scores."""
WORDS = 0.25
"""Part of a student above which the parameters of its tokens are worth a line."""
QUARTER = 0.25
"""Part of the time that a plan may take: of what the look at model and data leaves, half is for the sensitivity."""

FEW_STEPS = 0.1
"""Part of the language model's steps below which a plan warns."""
BUSY = 1.5
"""Load per core above which other work must be running: a plan alone keeps each core busy once."""


class Plan(NamedTuple):
    """A plan that is not written yet.

    Attributes:
        raw: tables of the recipe.
        reasons: what was measured and is planned, in lines.
        params: parameters of the student.
        tuned: optimizer and rate of the language stages.
    """

    raw: dict[str, Any]
    reasons: list[str]
    params: int
    tuned: Tuned


def planned(goal: Goal, path: Path) -> Path:
    """Plans a compression, prints the plan and writes it as a recipe, unless it is written already.

    Args:
        goal: model, data and budget.
        path: file of the recipe.

    Returns:
        `path`.

    Raises:
        AntgmmError: as in `measured`, or the file is another plan.
    """
    if is_planned(path, goal):
        say(f"plan: {path} is written already")
    else:
        tuning = path.with_suffix(".tuning")
        shutil.rmtree(tuning, ignore_errors=True)  # a killed process may have left trials on other rows
        write(measured(goal, tuning), goal, path)
        say(f"plan: written to {path}")
    return path


def write(plan: Plan, goal: Goal, path: Path) -> None:
    """Prints a plan and writes it as a recipe.

    Args:
        plan: the plan.
        goal: its goal.
        path: file of the recipe.
    """
    for line in plan.reasons:
        say(line)
    # Names of question types come from rows, and may hold line breaks.
    lines = (printable(line).replace("\n", " ") for line in plan.reasons)
    comments = "".join(f"# {line}\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{marked(goal)}\n{comments}{tomli_w.dumps(plan.raw)}")


def measured(goal: Goal, place: Path) -> Plan:
    """Measures model and data, and plans a compression of the teacher.

    Args:
        goal: model, data and budget.
        place: folder for temporary files, removed at the end.

    Returns:
        The plan.

    Raises:
        AntgmmError: invalid rows, no legal model within the budget, or a teacher without a quality to keep.
    """
    begin = time.monotonic()
    check_budget(goal)
    test = counted(goal.test)
    most = min(TESTED, test["samples"])
    tables = base(goal, counted(goal.data), {**test, "samples": most})
    for each in goal.changes:
        change(tables, each)
    if (dtype := _computed(goal)) != "float32":
        tables["optimizer"].setdefault("dtype", dtype)
    amount = _amount(goal, tables, place)
    losses, seen = _looked(tables, goal.seconds)
    recipe = draft(tables)
    if goal.keep:
        check_quality(seen)
    config, samples = seen.teacher.config, seen.trained
    if "evaluate.max_new_tokens" not in {*map(key_of, goal.changes)}:
        tables["evaluate"]["max_new_tokens"] = longest_answer(samples, seen.held)
    tables |= buckets(samples.needs, config.encoder_decoder)
    # What stages of these rows refuse is said before anything is measured.
    recipe_of(with_stages(tables, config, {}, len(samples), Scale(1.0, 1.0), Tuned()), "plan")
    choice = chosen(goal, seen, recipe.seed, recipe.optimizer.dtype, _left(goal, begin) / 2)
    left, machine, wanted = _left(goal, begin), _machine(recipe, samples), choice.sized.sizes
    compared = recipe.teacher.mode == "cache" and by_side(config, wanted)[0]  # by the image stage
    cached = token_bytes(config, samples.totals["slots"]) if compared else 0.0
    narrow = narrow_of(seen.teacher.weights())
    taken = cached + checkpoint_bytes(tables, config, wanted, len(samples), narrow)
    choices = with_disk(tables, config, wanted, samples, place.parent, taken)
    roomy = trial_tables(choices[0][0], config, wanted, samples, narrow)
    trials = tuned(roomy, seen, wanted, machine, min(PART * goal.seconds, left), place)
    best = trials[0].tuned if trials else Tuned()
    test_rows = machine.rows.scored
    if test_rows == most:  # not a number of --set
        machine = machine.scoring(scored_rows(goal, choices[0][0], config, wanted, machine))
        tables["evaluate"]["data"]["samples"] = machine.rows.scored
    machine = machine._replace(spent=time.monotonic() - begin)
    fit, stored = _best(goal, choices, config, wanted, machine, best)
    raw, crowded = with_room(fit.raw, config, samples, narrow)
    reasons = [*amount, *about_prompts(losses), *_look(seen), *_sizes(config, choice, samples)]
    reasons += [*in_time(choice.sensitivity, left), *_tuning(trials)]
    reasons += [*fewer_scores(machine.rows.scored, test_rows), *_steps(raw, fit.seconds, machine.rate)]
    reasons += [*fewer_steps(goal, fit, machine.spent), *stored, *crowded, *too_long(goal, machine.spent + fit.seconds)]
    return Plan(raw, reasons, total_parameters(choice.sized.config), best)


def further(goal: Goal, first: Mapping[str, Any], best: Tuned, parent: str, place: Path) -> Plan:
    """Plans a compression that starts from a stage of an earlier one, or again from the teacher.

    Args:
        goal: model, data and number of parameters.
        first: tables of the first plan; its stages are replaced.
        best: optimizer and rate of the language stages.
        parent: folder of the stage; "" for the teacher.
        place: folder of the search.

    Returns:
        The plan.

    Raises:
        AntgmmError: no legal model is within the budget.
    """
    begin = time.monotonic()
    # What the first plan measured is measured again.
    measured_ones = {"checkpoint_every", "features"} - {*map(key_of, goal.changes)}
    tables = {key: value for key, value in first.items() if key not in {"stage", "parent", *measured_ones}}
    recipe, whole_model = draft(tables), whole(goal.model)
    start = load_student(Path(parent)) if parent else whole_model
    processor, records = load_processor(goal.model), load_records(recipe.data)
    samples = encoded(recipe, records, processor, whole_model.config, trained=True)
    seconds = _left(goal, begin)
    choice = within(start, samples, goal.params, recipe.seed, recipe.optimizer.dtype, seconds, goal.multiple)
    left = _left(goal, begin)
    # The first student has filled the teacher's cache, and only the best student gets an export and a report.
    machine = _machine(recipe, samples)._replace(
        spent=time.monotonic() - begin, without=(TARGETS, REPORT), teacher=whole_model.config
    )
    narrow = narrow_of_stage(parent) if parent else narrow_of(whole_model.weights())
    taken = checkpoint_bytes(tables, start.config, choice.sized.sizes, len(samples), narrow)
    choices = with_disk(tables, start.config, choice.sized.sizes, samples, place, taken)
    fit, stored = _best(goal, choices, start.config, choice.sized.sizes, machine, best)
    raw, crowded = with_room(fit.raw, start.config, samples, narrow)
    reasons = [*_sizes(start.config, choice, samples), *in_time(choice.sensitivity, left)]
    reasons += [*_steps(raw, fit.seconds, machine.rate), *fewer_steps(goal, fit, machine.spent), *stored, *crowded]
    reasons += too_long(goal, machine.spent + fit.seconds)
    return Plan({"parent": parent, **raw}, reasons, total_parameters(choice.sized.config), best)


def _looked(tables: dict[str, Any], seconds: float) -> tuple[dict[str, float], Look]:
    """Chooses the prompt of the tables and looks at model and data; the teacher is loaded once, and freed at the end.

    Returns:
        Result of `prompt_losses`, and the look.
    """
    recipe = draft(tables)
    teacher = whole(recipe.teacher.path)
    loaded = teacher.loaded_once(recipe.optimizer.dtype)
    if losses := prompt_losses(recipe, loaded, seconds):
        tables["prompt"] = chosen_prompt(losses)
    return losses, look_at_both(draft(tables), loaded, seconds)._replace(teacher=teacher)


def _computed(goal: Goal) -> str:
    """The dtype of computation for a model: on accelerators, bfloat16 unless a file has float32."""
    return compute_dtype(max(str(leaf.dtype) for leaf in jax.tree.leaves(whole(goal.model).weights())))


def _left(goal: Goal, begin: float) -> float:
    """Seconds that a plan may still take."""
    return QUARTER * goal.seconds - (time.monotonic() - begin)


def _amount(goal: Goal, tables: dict[str, Any], place: Path) -> list[str]:
    """Takes fewer training rows where all would take too much time or disk; returns a line of the plan if so."""
    recipe = draft(tables)
    if {*map(key_of, goal.changes)} & {"data", "data.samples", "data.take"}:
        return []
    teacher, processor = whole(recipe.teacher.path), load_processor(recipe.teacher.path)
    amount = affordable(goal, recipe, teacher.config, processor, nearest(place))
    if not amount.reason:
        return []
    tables["data"] |= {"samples": amount.rows, "take": "spread"}
    return [amount.reason]


def _machine(recipe: Recipe, samples: Samples) -> Machine:
    statistics = look_at(samples.records, samples.encoder)
    rows = Rows(len(samples), recipe.evaluate.data.samples, 0, **statistics)
    return Machine(rows, matmul_rate(recipe.optimizer.dtype), 0.0)


def _best(
    goal: Goal,
    choices: Sequence[tuple[Mapping[str, Any], list[str]]],
    config: LMMConfig,
    wanted: Mapping[str, int],
    machine: Machine,
    tuned: Tuned,
) -> tuple[Fitted, list[str]]:
    """The choice of `with_disk` with the most steps, and its lines."""
    each = ((fitted(goal, tables, config, wanted, machine, tuned), lines) for tables, lines in choices)
    return max(each, key=lambda one: one[0].order)


def _look(seen: Look) -> Iterator[str]:
    """Lines of the plan about teacher and data."""
    scores = f"teacher {seen.score:.3f}, most frequent answers {seen.guessed:.3f}"
    yield f"exact match on {len(seen.held)} held-out rows: {scores}"
    yield from (f"warning: {line}" for line in warnings(seen))


def _sizes(config: LMMConfig, choice: Chosen, samples: Samples) -> Iterator[str]:
    """Lines of the plan about the sizes, with the sensitivity that they follow from."""
    before, after = sizes(config), sizes(choice.sized.config)
    old, new = total_parameters(config), total_parameters(choice.sized.config)
    timed = f", {choice.milliseconds:.1f} ms a request" if choice.milliseconds else ""
    yield f"parameters: {count(old)} to {count(new)}, {old / new:.1f} times fewer{timed}"
    for axis, size in before.items():
        grown, left = (of.get(axis) for of in (choice.sensitivity.increases, choice.sensitivity.left))
        why = "" if grown is None else f" (cut to {left} alone, without training: loss {grown:+.2f})"
        yield f"  {axis}: {size} to {after[axis]}{why}"
    yield from of_words(choice.sized.config, len(used_tokens(samples)))


def of_words(student: LMMConfig, used: int) -> list[str]:
    """Returns a line about a student of which much is tokens that no row uses.

    Args:
        student: its config.
        used: number of tokens that the rows use.
    """
    language = student.language
    words = language.vocab * language.decoder.embed * (1 if language.tied else 2)
    if words < WORDS * total_parameters(student) or used > language.vocab / 2:
        return []
    return [
        f"warning: {count(words)} of the student's parameters are for {language.vocab} tokens, of which the rows use"
        f" {used}: antgmm vocabulary removes the others from the model first, without a loss"
    ]


def in_time(sensitivity: Sensitivity, left: float) -> Iterator[str]:
    """Yields lines of the plan about its own time.

    Args:
        sensitivity: what the sizes follow from.
        left: seconds that the plan may still take after it; negative if it has taken more than it may.
    """
    rows, wanted = sensitivity.rows, sensitivity.wanted
    if rows < wanted:
        yield f"sensitivity: measured on {rows} of {wanted} rows, so that the plan takes at most a quarter of the time"
    if left < 0:
        yield (
            f"warning: with {rows} rows for the sensitivity the plan takes {clock(-left)} more than a quarter of the"
            " time"
        )


def fewer_scores(rows: int, most: int) -> Iterator[str]:
    """Yields a line of the plan if its run scores fewer test records than it could.

    Args:
        rows: number of test records that are scored.
        most: number of those that would be with enough time.
    """
    if rows < most:
        why = "the fewest that say anything" if rows <= COARSE else "so that they take at most a fifth of the time"
        yield f"scores: on {rows} of {most} test rows, {why}; a score is uncertain by {50 / rows**0.5:.0f} points"


def fewer_steps(goal: Goal, fit: Fitted, spent: float) -> Iterator[str]:
    """Yields a line of a plan without the time for all steps of its aim.

    Args:
        goal: the goal.
        fit: the plan's steps.
        spent: seconds that the plan itself took.
    """
    if min(fit.scale) < 0.99:
        few = fit.scale.text < FEW_STEPS
        lost = "; students with 5% of them lost 23 points, with 10% 6, with 30% 2 (docs/lab/real-weights.md)"
        yield (
            f"{'warning: ' if few else ''}steps: {min(1.0, fit.scale.image):.0%} of those aimed at for the image side"
            f" and {min(1.0, fit.scale.text):.0%} for the language model; all of them take"
            f" {math.ceil((fit.aim + spent) / 60) * (PARTS if goal.keep else 1)} minutes (--minutes)"
            f"{lost if few else ''}"
        )


def too_long(goal: Goal, duration: float) -> Iterator[str]:
    """Yields a line of a plan that takes longer than it should, even with the fewest steps.

    Args:
        goal: the goal, with the minutes.
        duration: expected seconds of plan and run.
    """
    if duration > 1.1 * goal.seconds:
        minutes = math.ceil(duration / 60)
        if goal.keep:
            given = f"a student's part of the {PARTS * goal.seconds / 60:g} minutes"
            remedy = f"--minutes {PARTS * minutes} in another --run"
        else:
            given, remedy = f"the {goal.seconds / 60:g} minutes", f"--minutes {minutes} in another --run"
        yield f"warning: plan and run take about {clock(duration)}, more than {given}: give at least {remedy}"


def _tuning(trials: Sequence[Trial]) -> Iterator[str]:
    """Lines of the plan about optimizer and rates."""
    for trial in trials:
        yield f"tuning: {trial.tuned.kind} at {trial.tuned.rate:.2g} x the usual rate: held-out loss {trial.loss:.3f}"
    if not trials:
        yield "tuning: none, for want of time or rows, or of memory; optimizer and rates are those of the demo"


def _steps(raw: Mapping[str, Any], expected: float, rate: float) -> Iterator[str]:
    """Lines of the plan that say what is trained, and for how long, from the measured FLOP/s."""
    for stage in raw["stage"]:
        table = stage["optimizer"]
        kind, frozen = table.get("kind", raw["optimizer"]["kind"]), ", ".join(stage.get("frozen", ["nothing"]))
        yield (
            f"stage {stage['name']}: {stage['recover_steps']} steps of {table['batch_size']}, {kind} at"
            f" {table['learning_rate']:g}; frozen: {frozen}"
        )
    yield f"expected time of the run on this machine: {clock(expected)} (matrix product: {rate / 1e9:.0f} GFLOP/s)"
    host = facts.machine()
    yield from shared(host["load"], host["cores"])


def shared(load: float, cores: int) -> Iterator[str]:
    """Yields a line of a plan that is made beside other work: it was measured as slow as the machine was then.

    Args:
        load: mean number of runnable threads in the last minute, those of the plan included.
        cores: cores of the machine.
    """
    if load > BUSY * cores:
        yield (
            f"warning: the load is {load:.1f} on {cores} cores: other work slows this machine, and a plan that is made"
            " without it has more steps"
        )
