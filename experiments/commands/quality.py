"""The search of `antgmm compress --keep-quality`."""

from pathlib import Path

from antgmm_jax.extras import require
from experiments.commands.endings import NEEDED, advise, print_end, print_plan
from experiments.commands.goals import Wish
from experiments.commands.output import check_push, upload
from experiments.commands.starting import Options, started
from experiments.run.host.console import say


def keep(
    wish: Wish,
    run: Path,
    changes: list[str],
    options: Options,
    as_json: bool,
    push: str,
    *,
    plan_only: bool,
    as_report: bool,
) -> None:
    """Searches the smallest student that keeps the wished share of the teacher's score.

    Args:
        wish: options that replace a recipe.
        run: folder of the search.
        changes: changes of the recipes.
        options: options of the runs.
        as_json: whether to print JSON.
        push: repository to upload the export to; "" for none.
        plan_only: whether to stop after the plan of the first student.
        as_report: whether to measure a report of the smallest student.

    Raises:
        AntgmmError: invalid input, or no student keeps it.
    """
    require(*NEEDED, "torch")
    goal = wish.goal(changes)
    say(f"search: the smallest student of {wish.model} that keeps {wish.keep} of its score, in {run}")
    check_push(push)
    with started(run, options) as watch:
        from antgmm_jax.io.folders import claimed
        from experiments.auto.keeping import Search
        from experiments.report.write import finish

        search = Search(goal, run, changes, watch)
        with claimed(run):  # plans of two processes would overwrite each other
            if plan_only:
                print_plan(search.plan(), as_json)
                return
            best = search.run()
            figures = finish(best, report=as_report)
            search.publish(best)
        advise(best.recipe, best.folder.path)
        upload(run / "export", push)
    place = run if as_report else best.folder.path  # the report can be made later where the recipe is
    print_end({**figures, "tries": search.figures()}, place, as_json, as_report=as_report)
