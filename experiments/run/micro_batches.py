"""Micro-batches on other devices than those for which a recipe was written."""

from dataclasses import replace

from antgmm_jax.parallel.sharding import padded_batch_size
from experiments.run.schema import Work


def with_parts(work: Work) -> Work:
    """Returns a stage whose micro-batches the devices of the mesh share evenly: at most `accumulate` of them.

    A plan for 8 devices may take a batch of 64 in 8 parts, of which 16 devices would share none: they take 4 parts. A
    device has no more rows at once than before. Steps are those of the whole batch.

    Args:
        work: the stage; its devices divide its whole batches (`checks.check_batches`).
    """
    table = work.stage.optimizer
    rows = ((parts, table.batch_size // parts) for parts in range(1, table.accumulate + 1))
    even = (parts for parts, each in rows if each * parts == table.batch_size and padded_batch_size(each) == each)
    changed = {"optimizer": replace(table, accumulate=max(even))}
    return work._replace(stage=work.stage.model_copy(update=changed))
