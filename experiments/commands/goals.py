"""Options of a compression without a recipe, and its goal."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from antgmm_jax.errors import AntgmmError
from experiments.run.export.schemes import Scheme
from experiments.run.host.console import say

if TYPE_CHECKING:
    from experiments.auto.goal import Goal

Recipe = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file; without, use --model.")]
Model = Annotated[
    str,
    typer.Option(metavar="DIR", help="Without RECIPE: the model to compress, a Hugging Face folder or hf:ORG/NAME."),
]
Rows = Annotated[
    str,
    typer.Option(metavar="FILE", help="Rows to train on: .jsonl, .json, .parquet, .arrow or .tar, or a folder."),
]
Tested = Annotated[str, typer.Option(metavar="FILE", help="Other rows for the scores; a tenth of --data by default.")]
Smaller = Annotated[str, typer.Option(metavar="8x", help="How many times fewer parameters the student has.")]
Parameters = Annotated[str, typer.Option(metavar="10M", help="Maximum number of parameters of the student.")]
Latency = Annotated[float, typer.Option(min=0, metavar="MS", help="Maximum milliseconds of a request on this machine.")]
Keep = Annotated[
    str,
    typer.Option(
        "--keep-quality", metavar="98%", help="Search the smallest student with this share of the teacher's score."
    ),
]
Minutes = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="M",
        help="Duration that plan and run aim at (a forecast, no limit); by default that of the usual steps, or of fewer"
        " if they take over 30 minutes.",
    ),
]
_MOST = 1e6
"""Numbers of minutes and of milliseconds are below this."""
DECIDED = (
    {"optimizer"}
    | {f"optimizer.{key}" for key in ("kind", "learning_rate", "batch_size", "warmup")}
    | {
        "buckets",
        "prompt_buckets",
        "pack",
    }
)
"""Keys of a recipe that a plan sets itself."""
PlanOnly = Annotated[bool, typer.Option("--plan", help="Only print and write the plan, a recipe.")]


class Wish(NamedTuple):
    """Options that replace a recipe, as given."""

    model: str
    data: str
    test: str
    smaller: str
    params: str
    latency_ms: float
    keep: str
    minutes: float

    def goal(self, changes: list[str], scheme: Scheme | None = None) -> "Goal":
        """Returns the goal of these options.

        Args:
            changes: changes of recipe keys; those of stages are left to the run.
            scheme: numbers of a quantized copy.

        Raises:
            AntgmmError: an option is missing or invalid, or there is more than one budget.
        """
        from experiments.auto.goal import STAGES, Goal, key_of, parameters, ratio, share, stage_of
        from experiments.auto.rows import tables

        for option, value in {"--latency-ms": self.latency_ms, "--minutes": self.minutes}.items():
            if not value < _MOST:
                raise AntgmmError(f"{option} {value}: write a number below {_MOST:g}")
        if not self.data:
            raise AntgmmError("compress --model needs --data with the rows to train on")
        if sum(map(bool, (self.smaller, self.params, self.latency_ms, self.keep))) != 1:
            raise AntgmmError(
                "compress --model needs one budget: --smaller 8x, --params 10M, --latency-ms MS or --keep-quality 98%"
            )
        smaller = ratio(self.smaller) if self.smaller else 0.0
        most = parameters(self.params) if self.params else 0
        budget = smaller, most, self.latency_ms, share(self.keep) if self.keep else 0.0
        kept = tuple(one for one in changes if stage_of(one) is None)
        if absent := {stage_of(one) for one in changes} - {None, *STAGES, *map(str, range(len(STAGES)))}:
            raise AntgmmError(f"--set stage.{min(map(str, absent))}: a plan has the stages {', '.join(STAGES)}")
        if decided := [key for key in map(key_of, kept) if key in DECIDED]:
            raise AntgmmError(f"--set {decided[0]}: the plan decides it; write the plan with --plan, and edit it")
        multiple = scheme.multiple if scheme else 0
        return Goal(self.model, *tables(self.data, self.test), *budget, multiple, self.minutes, kept)


def check(recipe: Path | None, wish: Wish, *, plan_only: bool, together: bool, mirror: str) -> None:
    """Checks that there is either a recipe or what replaces it.

    Args:
        recipe: the recipe, or None.
        wish: options that replace it.
        plan_only: whether only a plan is wanted.
        together: whether several processes take part.
        mirror: URL of a copy of the run; "" for none.

    Raises:
        AntgmmError: there is neither, or both.
    """
    if recipe is not None and (any(wish) or plan_only):
        shown = {name: f"--{name.replace('_', '-')}" for name in Wish._fields} | {"keep": "--keep-quality"}
        given = [shown[name] for name, value in wish._asdict().items() if value] + ["--plan"] * plan_only
        raise AntgmmError(f"RECIPE already says what to do: leave out {', '.join(given)}")
    if recipe is None and not wish.model:
        raise AntgmmError("compress needs a RECIPE, or --model DIR --data FILE and a budget such as --smaller 8x")
    if recipe is None and (together or mirror):
        # Another machine would plan other steps, as it has another speed.
        what = "several processes need" if together else "--mirror needs"
        raise AntgmmError(f"{what} a RECIPE: write it with --plan in one process first")


def advise_changes(plan: Path, changes: list[str]) -> None:
    """Says which changes are not in a plan.

    Args:
        plan: file of the plan.
        changes: changes of recipe keys.
    """
    from experiments.auto.goal import stage_of

    if left := [each for each in changes if stage_of(each) is not None]:
        words = " ".join(f"--set {shlex.quote(each)}" for each in left)
        say(f"note: the plan is without changes of its stages: give {words} to antgmm compress {plan} too, or edit it")


def run_of(recipe: Path | None, wish: Wish) -> Path:
    """Returns the folder of a run that was not named: `runs/` and the name of the recipe or of model and budget."""
    if recipe is not None:
        return Path("runs") / recipe.stem
    if wish.keep:
        budget = f"keep-{wish.keep.strip().removesuffix('%')}"
    else:
        budget = f"{wish.smaller.removesuffix('x')}x" if wish.smaller else wish.params or f"{wish.latency_ms:g}ms"
    return Path("runs") / f"{Path(wish.model).name}-{budget}"
