"""The plan of a compression without a recipe: a recipe with its reasons as comments."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from antgmm_jax.axes import sizes
from experiments.auto.buckets import buckets
from experiments.auto.goal import MOST_MINUTES, Goal, is_planned, marked
from experiments.auto.look import Look, longest_answer, look_at_both, warnings
from experiments.auto.rows import counted
from experiments.auto.schedule import Machine, Tuned, base, draft, fitted
from experiments.auto.sizing import Chosen, check_budget, chosen
from experiments.auto.tune import Trial, tuned
from experiments.run.folder import write_text
from experiments.run.forecast import Rows, look_at, matmul_rate
from experiments.run.host.console import clock, count, say
from experiments.run.schema.recipe import change
from pruning.costs import total_parameters

TESTED = 1000
"""Maximum number of test records that a planned run scores."""


def planned(goal: Goal, path: Path) -> Path:
    """Plans a compression, prints the plan and writes it as a recipe, unless it is written already.

    Args:
        goal: model, data and budget.
        path: file of the recipe.

    Returns:
        `path`.

    Raises:
        AntgmmError: invalid rows, no legal model within the budget, or the file is another plan.
    """
    if is_planned(path, goal):
        say(f"plan: {path} is written already")
        return path
    begin = time.monotonic()
    check_budget(goal)
    test = counted(goal.test)
    tables = base(goal, counted(goal.data), {**test, "samples": min(TESTED, test["samples"])})
    for each in goal.changes:
        change(tables, each)
    recipe = draft(tables)
    seen = look_at_both(recipe)
    config, samples = seen.teacher.config, seen.trained
    tables["evaluate"]["max_new_tokens"] = longest_answer(samples, seen.held)
    tables |= buckets(samples.needs, config.encoder_decoder)
    choice = chosen(goal, seen, recipe.seed, recipe.optimizer.dtype)
    statistics = look_at(samples.records, samples.encoder)
    rows = Rows(len(samples), tables["evaluate"]["data"]["samples"], 0, **statistics)
    machine, wanted = Machine(rows, matmul_rate(), 0.0), choice.sized.sizes
    trials = tuned(tables, seen, wanted, machine, 60 * (goal.minutes or MOST_MINUTES), path.with_suffix(".tuning"))
    best = trials[0].tuned if trials else Tuned()
    machine = machine._replace(spent=time.monotonic() - begin)
    raw, expected = fitted(goal, tables, config, wanted, machine, best)
    reasons = [*_reasons(seen, choice, trials), *_steps(raw, expected)]
    for line in reasons:
        say(line)
    comments = "".join(f"# {line}\n" for line in reasons)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{marked(goal)}\n{comments}{tomli_w.dumps(raw)}")
    say(f"plan: written to {path}; edit it if you like, and run it with antgmm compress {path}")
    return path


def _reasons(seen: Look, choice: Chosen, trials: Sequence[Trial]) -> Iterator[str]:
    """Lines of the plan that say what was measured, and the sizes."""
    before, after = sizes(seen.teacher.config), sizes(choice.sized.config)
    old, new = total_parameters(seen.teacher.config), total_parameters(choice.sized.config)
    chance = sum(seen.chance.values()) / len(seen.chance)
    yield f"exact match on {len(seen.held)} held-out rows: teacher {seen.score:.3f}, most frequent answers {chance:.3f}"
    yield from (f"warning: {line}" for line in warnings(seen))
    measured = f", {choice.measured_ms:.1f} ms a request" if choice.measured_ms else ""
    yield f"parameters: {count(old)} to {count(new)}, {old / new:.1f} times fewer{measured}"
    for axis, size in before.items():
        grown = choice.increases.get(axis)
        why = "" if grown is None else f" (loss {grown:+.2f} with half of it closed)"
        yield f"  {axis}: {size} to {after[axis]}{why}"
    for trial in trials:
        yield f"tuning: {trial.tuned.kind} at {trial.tuned.rate:.2g} x the usual rate: held-out loss {trial.loss:.3f}"
    if not trials:
        yield "tuning: none, for want of time; optimizer and rates are those of the demo"


def _steps(raw: Mapping[str, Any], expected: float) -> Iterator[str]:
    """Lines of the plan that say what is trained, and for how long."""
    for stage in raw["stage"]:
        table = stage["optimizer"]
        kind = table.get("kind", raw["optimizer"]["kind"])
        yield (
            f"stage {stage['name']}: {stage['recover_steps']} steps of {table['batch_size']}, {kind} at"
            f" {table['learning_rate']:g}"
        )
    yield f"expected time of the run on this machine: {clock(expected)}"
