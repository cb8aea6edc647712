"""Parameters that a stage leaves as they are. Its step checkpoints do without them: the model before it has them."""

from collections.abc import Callable, Sequence

import jax

from antgmm_jax.config import LMMConfig
from antgmm_jax.pure import abstract
from distill import State
from distill.trainable import by_path, is_hole, trainable, under
from experiments.run.cuts import planned, projected_by, segment_targets
from experiments.run.schema import Work
from experiments.run.student import Student


def unchanged(work: Work, config: LMMConfig) -> frozenset[str]:
    """Returns the paths of parameters that a stage neither trains nor cuts.

    Args:
        work: the stage.
        config: config of the model before it.
    """
    stage = work.stage
    if stage.weights != "kept":
        return frozenset()
    after = by_path(abstract(planned(config, stage, segment_targets(config, stage)[-1])))[0]
    changed = projected_by(stage, config)
    return frozenset(
        path
        for path, leaf in by_path(abstract(config))[0].items()
        if any(under(path, prefix) for prefix in work.constant)
        and path not in changed
        and path in after
        and after[path].shape == leaf.shape
    )


class Unchanged:
    """Leaves parameters that a stage does not change out of its states, and adds them again.

    Args:
        work: the stage.
        start: model before the stage.
        root: prefix of the model's parameter paths in the states.
    """

    def __init__(self, work: Work, start: Student, root: str = ""):
        self._work, self._start, self._root = work, start, root
        self._paths = unchanged(work, start.config)

    def without(self, state: State) -> State:
        """Returns a state of the stage, or its shapes, without them: None takes their place."""
        return state._replace(params=trainable(state.params, tuple(self._root + path for path in self._paths)))

    def restored(self, restore: Callable[[State], State], like: State) -> State:
        """Restores a state with them.

        Args:
            restore: reads a state of `without`; its argument has the shapes.
            like: shapes of the whole state.

        Returns:
            The state, with the parameters of the model before the stage in place of None.
        """
        like = self.without(like)
        holes = [path for path, leaf in by_path(like.params, is_hole)[0].items() if is_hole(leaf)]
        # Before the state, as all of that model may be read: the moments are not beside it.
        loaded = self._loaded(holes) if holes else {}
        state = restore(like)
        leaves, treedef = by_path(state.params, is_hole)
        return state._replace(params=treedef.unflatten([loaded.get(path, leaf) for path, leaf in leaves.items()]))

    def _loaded(self, paths: Sequence[str]) -> dict[str, jax.Array]:
        own = {path.removeprefix(self._root): path for path in paths}
        return {own[path]: leaf for path, leaf in self._start.only(own, self._work.narrow).items()}
