"""Choice of a prompt template for a checkpoint that records none."""

import json
from collections.abc import Iterator, Mapping
from math import inf

from antgmm_jax.io.loading import load_processor
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel import preemption
from data.record import PROMPT
from experiments.auto.look import rows_in, spread
from experiments.run.host.console import bar
from experiments.run.rows.datasets import encoded, load_records
from experiments.run.rows.prompts import TEMPLATES, records_prompt
from experiments.run.schema import Recipe
from experiments.run.scores.evaluation import token_loss
from experiments.run.student import Student

COMPARED = 100
"""Maximum number of held-out rows on which they are compared."""
PART = 0.05
"""Part of the time of a plan and its run for the comparison."""
BETTER = 0.8
"""Another template is taken if its loss is below this part of the default's; smaller differences are chance."""


def prompt_losses(draft: Recipe, teacher: Student, seconds: float = inf) -> dict[str, float]:
    """Returns the teacher's loss for each of `TEMPLATES`, or nothing if there is no prompt to choose.

    Args:
        draft: recipe with teacher and evaluation; its stages do not matter.
        teacher: the teacher.
        seconds: time of the plan and its run.

    Returns:
        Template -> mean cross-entropy of the right answers' tokens on some held-out rows. Empty if recipe or checkpoint
        name a prompt, or if all rows are conversations.

    Raises:
        AntgmmError: as in `open_hf` and `Samples`.
    """
    if draft.prompt or records_prompt(draft.teacher.path):
        return {}
    tests = load_records(draft.evaluate.data)
    records = spread(tests, COMPARED)
    if all(records.words(row).turns for row in range(len(records))):
        return {}
    processor = load_processor(draft.teacher.path)
    config, dtype, losses = teacher.config, draft.optimizer.dtype, {}
    usual = encoded(draft, records, processor, config)
    if (most := rows_in(PART * seconds / len(TEMPLATES), config, usual, dtype)) < len(records):
        records = spread(tests, most)
    params = on_devices(config, teacher.weights(), dtype)
    with bar("prompts", len(TEMPLATES), safe_point=preemption.leave) as update:
        for number, template in enumerate(TEMPLATES, 1):
            samples = encoded(draft.model_copy(update={"prompt": template}), records, processor, config)
            losses[template] = token_loss(config, params, samples, batch_size=len(samples), dtype=dtype)
            update(number, "")
    return losses


def chosen_prompt(losses: Mapping[str, float]) -> str:
    """Returns the template with the lowest loss; the default one unless it is clearly worse.

    Args:
        losses: from `prompt_losses`, not empty.
    """
    best = min(losses, key=losses.__getitem__)
    return best if losses[best] < BETTER * losses[PROMPT] else PROMPT


def about_prompts(losses: Mapping[str, float]) -> Iterator[str]:
    """Yields a line of the plan about the prompt, if one was chosen.

    Args:
        losses: from `prompt_losses`.
    """
    if losses:
        shown = ", ".join(f"{loss:.3f} for {json.dumps(template)}" for template, loss in losses.items())
        taken = json.dumps(chosen_prompt(losses))
        yield f"prompt {taken}: the checkpoint records none; the loss on held-out rows is {shown}"
