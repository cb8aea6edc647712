"""How many training rows a plan takes: those that its time and the disk allow."""

import shutil
from pathlib import Path
from typing import NamedTuple

from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from experiments.auto.goal import Goal
from experiments.auto.look import FEW
from experiments.auto.room import DISK, token_bytes
from experiments.auto.schedule import IMAGE_VISITS, LONGEST
from experiments.run.host.console import clock
from experiments.run.progress import forecast
from experiments.run.progress.flops import image_flops
from experiments.run.rows.datasets import encoder_of, load_records
from experiments.run.schema import Recipe

READ = 0.25
"""Part of the time for reading the rows and for the teacher's image tokens of them."""


class Amount(NamedTuple):
    """Training rows of a plan.

    Attributes:
        rows: number of rows.
        reason: why they are not all of them, a line of the plan; "" if they are.
    """

    rows: int
    reason: str = ""


def affordable(goal: Goal, draft: Recipe, config: LMMConfig, processor: ProcessorMixin, folder: Path) -> Amount:
    """Returns how many training rows a plan takes.

    Args:
        goal: the goal, with the minutes.
        draft: recipe with all training rows.
        config: config of the teacher.
        processor: its processor.
        folder: existing folder on the disk of the run.
    """
    if draft.data.samples <= FEW:
        return Amount(draft.data.samples)
    source = load_records(draft.data)
    if not (looks := forecast.look_at(source, encoder_of(draft, processor, config))):
        return Amount(len(source))
    rows, visits = len(source), IMAGE_VISITS * (LONGEST if goal.minutes else 1.0)
    bounds = {f"the stages see at most {visits:g}": visits}
    reading = looks["read"] if looks["unread"] else 0.0
    if draft.teacher.mode == "cache":
        reading += image_flops(config, 1, looks["slots"]) / (
            forecast.SHARE * forecast.matmul_rate(draft.optimizer.dtype)
        )
        if stored := token_bytes(config, looks["slots"]):
            free = shutil.disk_usage(folder).free
            bounds[f"the teacher's image tokens of all of them take {stored * rows / 1e9:.3g} GB of disk"] = (
                DISK * free / stored
            )
    if reading:
        bounds[f"reading all of them, with the teacher's image tokens, takes {clock(reading * rows)}"] = (
            READ * goal.seconds / reading
        )
    return fewest(rows, bounds)


def fewest(rows: int, bounds: dict[str, float]) -> Amount:
    """Returns the number of rows within all bounds, but not fewer than `FEW`.

    Args:
        rows: number of all rows.
        bounds: reason -> largest number of rows.
    """
    reason, most = min(bounds.items(), key=lambda bound: bound[1])
    if most >= rows:
        return Amount(rows)
    taken = max(min(FEW, rows), int(most))
    return Amount(taken, f"rows: {taken} of {rows}, from all over the file, as {reason}")
